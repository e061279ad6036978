"""Check values that a training loop passes, and derive columns from them."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from entrace.analysis.trace.errors import InputError, in_one_line
from entrace.analysis.trace.groups import group_relative_advantage, mean_of, place_in_group, shared_by
from entrace.analysis.trace.ragged import Responses, as_flags, as_list, is_flag
from entrace.analysis.trace.rows import ResponseRows, nullable
from entrace.analysis.trace.schema import NO_VERDICT, TOKENS

# Booleans per response.
FLAGS = ("has_answer", "is_truncated", "is_kept")
# Largest number that float32 columns hold.
MAX_FLOAT = float(np.finfo(np.float32).max)


@dataclass
class Batch:
    """Hold the responses of a call and the values that were passed with them.

    Attributes:
        responses: Tokens.
        is_generated: True at tokens that the policy generated, (N,).
        texts: Prompt of each response.
        prompt_ids: Identifier of the prompt of each response.
        token: Values per token, null at context, by name.
        response: Values per response, by name.
        groups: Group of each response, (B,), numbered from 0.
        rewards: Reward of each response, (B,); NaN if unknown.
        advantages: Advantage of each response, (B,); NaN if unknown.
        correct: Verdict on each response.
        kept: Responses that entered the update, (B,) bool.
        drop_reasons: Why the others did not.
    """

    responses: Responses
    is_generated: np.ndarray
    texts: list[str]
    prompt_ids: list[str] = field(default_factory=list)
    token: dict[str, pa.Array] = field(default_factory=dict)
    response: dict[str, list[Any]] = field(default_factory=dict)
    groups: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    rewards: np.ndarray = field(default_factory=lambda: np.empty(0))
    advantages: np.ndarray = field(default_factory=lambda: np.empty(0))
    correct: list[bool | None] = field(default_factory=list)
    kept: np.ndarray = field(default_factory=lambda: np.empty(0, bool))
    drop_reasons: list[str | None] = field(default_factory=list)

    @cached_property
    def generated_lengths(self) -> np.ndarray:
        """Tokens of each response that the policy generated, (B,)."""
        return np.bincount(self.responses.rows, self.is_generated, len(self.responses)).astype(np.int64)

    @property
    def has_answer(self) -> list[bool | None]:
        """Return whether each response has an answer; empty if unknown."""
        return self.response.get("has_answer") or [answer is not None for answer in self.response.get("answer", ())]

    def per_response(self, name: str, values: Any) -> list[Any]:
        """Return values per response as a list; a scalar applies to all of them.

        Raises:
            InputError: there is not one value per response.
        """
        value = values.item() if getattr(values, "ndim", None) == 0 else values
        if isinstance(value, bool | int | float | str):
            return [value] * len(self.responses)
        if not hasattr(value, "__iter__"):
            raise InputError(f"{name}: expected one value per response, found {type(value).__name__}")
        found = as_list(value)
        if len(found) != len(self.responses):
            raise InputError(f"{name}: {len(found)} values, expected {len(self.responses)}, one per response")
        return found

    def numbers(self, name: str, values: Any) -> np.ndarray:
        """Return numbers per response, (B,) float64; NaN where None or not passed."""
        if values is None:
            return np.full(len(self.responses), np.nan)
        found = self.per_response(name, values)
        for i, value in enumerate(found):
            if value is not None and not isinstance(value, int | float):
                raise InputError(f"{name}: response {i} has {type(value).__name__}, expected a number or None")
            number = as_float(value)
            if number is not None and not np.isfinite(number):
                raise InputError(f"{name}: {number} at response {i}; pass None where it is unknown")
        return np.array([np.nan if value is None else value for value in found], float)

    def flags(self, name: str, values: Any) -> list[bool | None]:
        """Return Booleans per response; None where unknown.

        Raises:
            InputError: a value is neither a Boolean, nor 0 or 1, nor None.
        """
        found = self.per_response(name, values)
        for i, value in enumerate(found):
            if value is not None and not is_flag(value):
                raise InputError(f"{name}: {reprlib.repr(value)} at response {i}, expected true, false, or None")
        return [None if value is None else bool(value) for value in found]

    def add_responses(self, values: Mapping[str, Any]) -> None:
        """Add values per response; a scalar applies to all of them."""
        for name, given in values.items():
            if given is None:
                continue
            if name in FLAGS:
                self.response[name] = self.flags(name, given)
                continue
            found = self.per_response(name, given)
            self.response[name] = [_items(value) for value in found] if name == "reward_components" else found

    def add_tokens(self, values: Mapping[str, Any]) -> None:
        """Add values per token; one value per response applies to all of its tokens.

        Raises:
            InputError: a length differs, or a value is NaN or infinite.
        """
        for name, given in values.items():
            if given is None:
                continue
            if isinstance(given, bool | int | float):
                flat, is_unknown = np.full(len(self.responses.ids), given), np.zeros(len(self.responses.ids), bool)
            elif self.responses.is_per_token(given):
                flat, is_unknown = self.responses.flatten(name, given)
            else:
                found = self.per_response(name, given)
                is_unknown = np.array([value is None for value in found])[self.responses.rows]
                flat = np.array([0 if value is None else value for value in found])[self.responses.rows]
            self.token[name] = self._measure(name, flat, is_unknown)

    def _measure(self, name: str, flat: np.ndarray, is_unknown: np.ndarray) -> pa.Array:
        kind = TOKENS.arrow_schema.field(name).type
        is_null = is_unknown | ~self.is_generated if name not in ("turn", "policy_version") else is_unknown
        if flat.dtype.kind not in "biufO" or (flat.dtype.kind == "O" and not all(map(_is_number, flat))):
            raise InputError(f"{name}: expected numbers, found {flat.dtype}")
        try:
            flat = np.where(is_null, 0, flat).astype(float if flat.dtype.kind in "fO" else flat.dtype)
        except OverflowError as error:
            raise InputError(f"{name}: expected {kind} ({in_one_line(error)})") from None
        if flat.dtype.kind == "f":
            bad = np.flatnonzero(~np.isfinite(flat))
            if len(bad):
                rows, first = self.responses.rows, bad[0]
                place = f"response {rows[first]}, position {place_in_group(rows)[first]}"
                raise InputError(f"{name}: {flat[first]} at {place}; pass None where it is unknown")
        if pa.types.is_boolean(kind):
            flat = as_flags(name, flat, self.responses.rows)
        try:
            return pa.array(flat, mask=is_null).cast(kind)
        except pa.ArrowInvalid as error:
            raise InputError(f"{name}: expected {kind} ({in_one_line(error)})") from None

    def reduce(self, name: str, reduction: Callable[..., np.ndarray]) -> np.ndarray:
        """Reduce the values of each response's generated tokens, (B,).

        The reduction is ``mean_of`` or ``shared_by``. NaN where a value is unknown or no token was generated.
        """
        values = self.token.get(name)
        if values is None:
            return np.full(len(self.responses), np.nan)
        flat = values.fill_null(np.nan).to_numpy(zero_copy_only=False)
        return reduction(flat[self.is_generated], self.responses.rows[self.is_generated], len(self.responses))

    def add_advantage(self, given: Any) -> np.ndarray:
        """Add the advantage to the tokens, and return that of each response, (B,).

        The advantage is NaN where it is unknown. If none is given, it is computed from the rewards of the group. An
        advantage per token is that of its response only if it is equal for all tokens of the response.
        """
        if given is None:
            if np.isnan(self.rewards).all():
                return np.full(len(self.responses), np.nan)
            advantages = group_relative_advantage(self.rewards, self.groups)
            self.add_tokens({"advantage": advantages})
            return advantages
        self.add_tokens({"advantage": given})
        self.token.setdefault("shaped_advantage", self.token["advantage"])
        if self.responses.is_per_token(given):
            return self.reduce("advantage", shared_by)
        return self.numbers("advantage", given)

    def take_kept(self, *, has_advantage: bool) -> tuple[np.ndarray, list[str | None]]:
        """Return which responses entered the update, (B,) bool, and the drop reasons.

        Unless ``is_kept`` is passed, every response with a generated token did, except those without a verdict whose
        advantage was not passed either.
        """
        is_unknown = np.isnan(self.rewards)
        without_verdict = is_unknown & (not has_advantage and not is_unknown.all())
        kept = self.response.pop("is_kept", None)
        reasons = self.response.pop("drop_reason", None)
        if kept is None:
            reasons = reasons or [NO_VERDICT if missing else None for missing in without_verdict]
            return (self.generated_lengths > 0) & ~without_verdict, reasons
        if None in kept:
            raise InputError("is_kept: None is not a verdict; pass true or false for every response")
        return np.array(kept, bool), reasons or [None] * len(kept)

    def columns(
        self, step: int, rollout_ids: np.ndarray, completions: list[str]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the columns of ``rollouts`` and of ``tokens`` that the batch gives."""
        ids, responses = (step, rollout_ids, self.groups, self.prompt_ids), self.responses
        rows = ResponseRows(*ids, responses.lengths, self.correct, self.kept)
        entropy, surprisal = self.reduce("entropy", mean_of), -self.reduce("logprob", mean_of)
        unknown = [None] * len(completions)
        judged = {"has_answer": self.has_answer or unknown, "is_truncated": self.response.get("is_truncated", unknown)}
        return {
            **self.response,
            **rows.rollout_columns(self.texts, completions, **judged),
            **rows.generated_columns(self.generated_lengths, entropy, surprisal, ~np.isnan(surprisal)),
            "reward": nullable(self.rewards),
            "drop_reason": self.drop_reasons,
            "advantage": nullable(self.advantages),
        }, {
            **self.token,
            **rows.token_columns(responses.rows),
            "token_id": responses.ids,
            "loss_mask": None if self.is_generated.all() else self.is_generated,
        }

    def step_row(self) -> dict[str, Any]:
        """Return the columns of table ``steps`` that follow from the responses."""
        known = self.token.get("entropy", pa.array([], pa.float32())).drop_null()
        groups_kept = len(np.unique(self.groups[self.kept]))
        return {
            "reward_mean": mean_of_known(None if np.isnan(value) else value for value in self.rewards),
            "accuracy": mean_of_known(self.correct),
            "format_rate": mean_of_known(self.has_answer),
            "entropy_token_mean": float(known.to_numpy().mean(dtype=float)) if len(known) else None,
            "tokens": int(self.is_generated.sum()),
            "groups_kept": groups_kept,
            "groups_dropped": int(self.groups.max()) + 1 - groups_kept,
        }


def find_generated(responses: Responses, loss_mask: Any) -> np.ndarray:
    """Return True at the tokens that the policy generated, (N,).

    Raises:
        InputError: the mask is None at a token.
    """
    if loss_mask is None:
        return np.ones(len(responses.ids), bool)
    flat, is_unknown = responses.flatten("loss_mask", loss_mask)
    if is_unknown.any():
        raise InputError("loss_mask: None is not a mask; pass true or false for every token")
    return as_flags("loss_mask", flat, responses.rows)


def group_indices(labels: Sequence[Any]) -> np.ndarray:
    """Return the group of each response, (B,), numbered in order of appearance.

    Raises:
        InputError: a label is a list or another object that cannot be compared.
    """
    numbers: dict[Any, int] = {}
    try:
        return np.array([numbers.setdefault(label, len(numbers)) for label in labels], np.int64)
    except TypeError as error:
        raise InputError(f"group: expected one text or number per response ({in_one_line(error)})") from None


def as_float(value: float | None) -> float | None:
    """Return a number of any type as a float, infinite if no float is as large."""
    if value is None:
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def mean_of_known(values: Iterable[Any]) -> float | None:
    """Return the mean of the values that are not None; None if there is none."""
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _items(values: Any) -> list[tuple[str, float]] | None:
    """Return a mapping as Arrow stores it, without the entries that are None."""
    if values is None:
        return None
    if not isinstance(values, Mapping):
        raise InputError(f"reward_components: expected a mapping of name to score, found {type(values).__name__}")
    for name, value in values.items():
        if value is not None and not (_is_number(value) and np.isfinite(as_float(value) or 0.0)):
            raise InputError(f'reward_components: "{name}" is {reprlib.repr(value)}, expected a finite number or None')
    return [(str(name), float(value)) for name, value in values.items() if value is not None]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number | np.bool_)
