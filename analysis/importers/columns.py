"""Find the fields of a rollout in a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from entrace.analysis.importers.row_files import BadRowError
from entrace.analysis.trace.errors import nearest

# Fields with their other names, such as those in the completion files of TRL and verl.
ALIASES: dict[str, tuple[str, ...]] = {
    "prompt": ("input",),
    "prompt_ids": ("prompt_token_ids",),
    "response": ("completion", "output"),
    "response_ids": ("completion_ids", "response_token_ids"),
    "loss_mask": ("response_mask", "completion_mask", "tool_mask", "assistant_mask"),
    "reward": ("score",),
    "step": ("global_step",),
    "group": ("uid",),
    "advantage": ("advantages",),
    "is_correct": ("acc",),
    "is_truncated": ("truncated",),
    "answer": ("pred",),
    "ground_truth": ("solution", "gts", "reward_model.ground_truth"),
    "task": ("data_source",),
    "id": ("rollout_id", "request_id", "trace_id"),
    "finish_reason": (),
    "logprob": ("logprobs", "old_logprobs", "old_log_probs", "trainer_logprobs"),
    "sampling_logprob": ("sampling_logprobs", "rollout_log_probs", "generation_logprobs", "inference_logprobs"),
    "reference_logprob": ("reference_logprobs", "ref_log_probs", "ref_log_prob"),
    "entropy": ("entropies", "entropys"),
    "entropy_mean": (),
    "reward_components": (),
    "is_kept": (),
    "turn": (),
    "policy_version": (),
    "temperature": (),
    # Texts of the tokens, if the dump has no ids.
    "token_texts": (),
    # Text that the tokens of the response must occur in.
    "checked_text": (),
}
# Fields that all rows must have, or none, because they determine groups and advantages.
UNIFORM = ("step", "group", "advantage", "is_correct")
# Fields that the rows of most formats must have, and what is expected of them.
NEEDED = {"prompt": "text or a list of turns", "response": "text"}


class Columns:
    """Find fields in rows, whose keys must agree.

    Attributes:
        keys: Key of each field, equal in all rows.
        columns: Keys of the rows so far.
    """

    def __init__(
        self,
        chosen: Mapping[str, str],
        needed: Mapping[str, str],
        uniform: Sequence[str] = UNIFORM,
    ) -> None:
        """Look for the ``chosen`` keys of fields, and for those in ``ALIASES`` otherwise.

        Args:
            chosen: Key of each field; empty to ignore the field.
            needed: Fields that every row must have, and what is expected of them.
            uniform: Fields that all rows must have, or none.
        """
        self.keys: dict[str, str] = {}
        self.columns: dict[str, None] = {}
        self._chosen, self._needed, self._uniform = chosen, needed, uniform
        self._has_rows = False

    def find(self, row: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
        """Return keys and values of the fields in a row.

        Raises:
            BadRowError: a field is missing, ambiguous, or at another key than in earlier rows.
        """
        keys, given = {}, {}
        self.columns |= dict.fromkeys(row)
        for name in ALIASES:
            if key := self._key(row, name):
                keys[name], given[name] = key, look_up(row, key)
                if self.keys.get(name, key) != key:
                    raise BadRowError(f'{name} is in "{key}" here, but in "{self.keys[name]}" in earlier rows')
        for name in self._uniform:
            if self._has_rows and name in keys and name not in self.keys:
                raise BadRowError(f'a "{name}", unlike earlier rows')
            if name in self.keys and name not in keys:
                null = self._null(row, name)
                raise BadRowError(f"{null}, unlike earlier rows" if null else f'no "{name}", unlike earlier rows')
        for name, expected in self._needed.items():
            stand_ins = {name, f"{name}_ids", *(("token_texts",) if name == "response" else ())}
            if not stand_ins & keys.keys() and (self._chosen.get(name) != "" or name != "reward"):
                null = self._null(row, name)
                raise BadRowError(f"{null}, expected {expected}" if null else self._missing(row, name, keys))
        return keys, given

    def accept(self, keys: Mapping[str, str]) -> None:
        """Require the keys of a well-formed row in later rows."""
        self._has_rows = True
        self.keys |= keys

    def names(self, name: str) -> tuple[str, ...]:
        """Return the keys that a field may have."""
        chosen = self._chosen.get(name)
        if chosen is None:
            return (name, *ALIASES[name])
        return (chosen,) if chosen else ()

    def _null(self, row: Mapping[str, Any], name: str) -> str | None:
        """Return a message that names the key of a null field.

        The result is None if the row lacks the field.
        """
        return next((f'"{key}" is null' for key in self.names(name) if _has(row, key)), None)

    def _missing(self, row: Mapping[str, Any], name: str, keys: Mapping[str, str]) -> str:
        """Return a message that names a missing field and the most similar unused key."""
        wanted = self._chosen.get(name, name)
        if not wanted:
            return f'no "{name}", which every row needs; remove --field {name}='
        spare = [key for key in row if key not in keys.values() and not self._is_known(key)]
        without = "; --field reward= imports without" if name == "reward" else ""
        return f'no "{wanted}"{nearest(wanted, spare, "found")} (--field {name}=KEY names the key of {name}{without})'

    def _is_known(self, key: str) -> bool:
        return any(key in self.names(name) for name in ALIASES)

    def _key(self, row: Mapping[str, Any], name: str) -> str | None:
        """Return the key of a field in a row, or None.

        Null counts as missing, except for ``answer``.
        """
        names = self.names(name)
        there = [key for key in names if look_up(row, key) is not None]
        if len(there) > 1 and there[0] != name:
            raise BadRowError(
                f'"{there[0]}" and "{there[1]}" may both be {name}; choose one, such as --field {name}={there[0]}'
            )
        if not there and name == "answer":
            there = [key for key in names if _has(row, key)]
        return there[0] if there else None


def look_up(row: Mapping[str, Any], key: str) -> Any:
    """Return the value at a key, or None.

    The key is dotted where nested, with indices from 0 for lists. ``a+b`` is the sum of two keys.
    """
    if key in row:
        return row[key]
    if "+" in key:
        parts = [look_up(row, part) for part in key.split("+")]
        is_number = all(isinstance(part, int | float) for part in parts)
        return sum(parts) if is_number else None
    value: Any = row
    for part in key.split("."):
        if isinstance(value, list) and part.isdecimal():
            value = value[int(part)] if int(part) < len(value) else None
        else:
            value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _has(row: Mapping[str, Any], key: str) -> bool:
    """Return whether a key, dotted where nested, exists, even with a null value."""
    parent, _, last = key.rpartition(".")
    place = look_up(row, parent) if parent else row
    return key in row or (isinstance(place, Mapping) and last in place)
