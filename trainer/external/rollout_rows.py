"""Read one row of a rollouts file: find its fields and check their values."""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, field_validator

from entrace.analysis.trace import InputError, nearest
from entrace.analysis.trace.plain import well_formed
from entrace.trainer.config import PolicyConfig
from entrace.trainer.settings import MAX_INT, BaseConfig, Positive
from entrace.trainer.tasks.prompt import Question, as_text
from entrace.trainer.tasks.rows import BadRowError, kind_of, question_of, text_of

if TYPE_CHECKING:
    from entrace.trainer.model.policy import Policy

# Other names of each field, such as those in the completion files of TRL and verl.
ALIASES: dict[str, tuple[str, ...]] = {
    "prompt": ("input",),
    "prompt_ids": ("prompt_token_ids",),
    "response": ("completion", "output"),
    "response_ids": ("completion_ids", "response_token_ids"),
    "loss_mask": ("response_mask", "completion_mask", "tool_mask", "assistant_mask"),
    "reward": ("score",),
    "step": ("global_step",),
    "group": ("uid",),
    "advantage": (),
    "is_correct": ("acc",),
    "is_truncated": ("truncated",),
    "answer": ("pred",),
    "ground_truth": ("solution", "gts", "reward_model.ground_truth"),
    "task": ("data_source",),
}
# Fields that all rows must have, or none, because they determine groups and advantages.
UNIFORM = ("step", "group", "advantage", "is_correct")
# Products of larger numbers may overflow float32.
MAX_NUMBER = 1e30
ENCODINGS_KEPT = 256
NEEDED = {"prompt": "text or a list of turns", "response": "text", "reward": "a number"}
# Some JSON writers store the Booleans and numbers of other libraries as text.
FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
NUMBER = re.compile(r"\s*[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?\s*", re.ASCII)
# Text that verifiers write if they find no answer: verl's [INVALID], lm-eval's [invalid].
NO_ANSWER = re.compile(r"\s*(?:\[(?:invalid|(?:invalid|no)[ _-]?answer)\]\s*)?", re.IGNORECASE)


class ImportSettings(BaseConfig):
    """Settings of an import.

    ``fields`` maps fields to their keys, dotted where nested, and to an empty key to ignore a field. ``correct_at`` is
    the lowest reward of a correct response. ``batch_tokens`` bounds the tokens of a forward pass, padding included.
    """

    policy: PolicyConfig
    temperature: Annotated[float, Field(gt=0)] = 1.0
    correct_at: float = 1.0
    batch_tokens: Positive = 8192
    skip_bad_rows: bool = False
    fields: dict[str, str] = Field(default_factory=dict)

    @field_validator("fields")
    @classmethod
    def _exist(cls, fields: dict[str, str]) -> dict[str, str]:
        for name in fields:
            if name not in ALIASES:
                raise ValueError(f'"{name}" is not a field of a rollout{nearest(name, ALIASES)}')
        return fields


@dataclass(frozen=True)
class Rollout:
    """One response, ready for the teacher-forced pass; a field that the rows lack is None.

    ``loss_mask`` marks the tokens of ``response_ids`` that the policy generated, and is None if it generated all. Other
    tokens, such as the output of a tool, are context and are not recorded.
    """

    place: str
    step: int
    group_id: int
    prompt_id: str
    prompt: str
    prompt_ids: list[int]
    completion: str
    response_ids: list[int]
    loss_mask: list[bool] | None
    reward: float
    advantage: float | None
    is_correct: bool
    is_truncated: bool | None
    answer: str | None
    has_answer: bool | None
    ground_truth: str | None
    task: str

    @property
    def is_generated(self) -> list[bool]:
        """Return which tokens of the response the policy generated."""
        return self.loss_mask or [True] * len(self.response_ids)

    @property
    def generated_ids(self) -> list[int]:
        """Return the tokens of the response that the policy generated."""
        return [token for token, mark in zip(self.response_ids, self.is_generated, strict=True) if mark]


class RowReader:
    """Convert rows to rollouts.

    Attributes:
        keys: Key of each field, equal in all rows.
        columns: Keys of the rows so far.
        num_groups: Groups so far.
    """

    def __init__(self, settings: ImportSettings, policy: Policy) -> None:
        """Read for ``policy``, the model of the teacher-forced pass."""
        self.keys: dict[str, str] = {}
        self.columns: dict[str, None] = {}
        self.num_groups = 0
        self._settings, self._policy = settings, policy
        self._has_rows = False
        # The last token is predicted but never read, so one more than the context length fits.
        self._max_tokens = getattr(policy.model.config, "max_position_embeddings", MAX_INT) + 1
        self._stop_ids = set(policy.stop_ids.tolist())
        self._encode = lru_cache(ENCODINGS_KEPT)(lambda question: policy.encode_prompt(json.loads(question)))
        self._groups: dict[tuple[int, int], tuple[int, str, int]] = {}
        self._prompts: dict[tuple[int, int], str] = {}
        self._repeats: Counter[tuple[int, int]] = Counter()

    def read(self, row: dict[str, Any] | BadRowError, place: str, default_task: str) -> tuple[Rollout, dict[str, str]]:
        """Return one rollout and the keys of the fields in its row.

        Raises:
            BadRowError: the row is malformed.
        """
        if isinstance(row, BadRowError):
            raise row
        keys, given = self._fields(row)
        step = _step(given["step"], keys["step"]) if "step" in keys else 1
        task = text_of(given["task"], f'"{keys["task"]}"') if "task" in keys else default_task
        group = _group(given["group"], keys["group"]) if "group" in keys else None
        prompt, prompt_ids = self._prompt(given, keys)
        truncated = _flag(given["is_truncated"], keys["is_truncated"]) if "is_truncated" in keys else None
        completion, response_ids = self._response(given, keys, truncated)
        if loss_mask := _loss_mask(given, keys, len(prompt_ids), len(response_ids)):
            # The text may include the output of a tool.
            completion = self._text([token for token, mark in zip(response_ids, loss_mask, strict=True) if mark])
        if len(prompt_ids) + len(response_ids) > self._max_tokens:
            raise BadRowError(
                f"prompt and response have {len(prompt_ids) + len(response_ids)} tokens, "
                f"{self._policy.name} takes at most {self._max_tokens - 1}"
            )
        reward = _number(given["reward"], keys["reward"])
        is_correct = reward >= self._settings.correct_at
        if "is_correct" in keys:
            is_correct = _flag(given["is_correct"], keys["is_correct"], "is_correct")
        answer = _answer(given.get("answer"))
        advantage = _number(given["advantage"], keys["advantage"]) if "advantage" in keys else None
        group_id, prompt_id = self._place(step, _digest([task, prompt]), group)
        rollout = Rollout(
            place=place,
            step=step,
            group_id=group_id,
            prompt_id=prompt_id,
            prompt=prompt,
            prompt_ids=prompt_ids,
            completion=completion,
            response_ids=response_ids,
            loss_mask=loss_mask,
            reward=reward,
            advantage=advantage,
            is_correct=is_correct,
            is_truncated=truncated,
            answer=answer,
            has_answer=answer is not None if "answer" in given else None,
            ground_truth=_plain_text(given.get("ground_truth")),
            task=task,
        )
        self._has_rows = True
        self.keys |= keys
        return rollout, keys

    def _fields(self, row: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
        """Return keys and values of the fields in a row."""
        keys, given = {}, {}
        self.columns |= dict.fromkeys(row)
        for name in ALIASES:
            if key := self._key(row, name):
                keys[name], given[name] = key, _look_up(row, key)
                if self.keys.get(name, key) != key:
                    raise BadRowError(f'{name} is in "{key}" here, but in "{self.keys[name]}" in earlier rows')
        for name in UNIFORM:
            if self._has_rows and name in keys and name not in self.keys:
                raise BadRowError(f'a "{name}", unlike earlier rows')
            if name in self.keys and name not in keys:
                null = self._null(row, name)
                raise BadRowError(f"{null}, unlike earlier rows" if null else f'no "{name}", unlike earlier rows')
        for name, expected in NEEDED.items():
            if not {name, f"{name}_ids"} & keys.keys():
                null = self._null(row, name)
                raise BadRowError(f"{null}, expected {expected}" if null else self._missing(row, name, keys))
        return keys, given

    def _null(self, row: dict[str, Any], name: str) -> str | None:
        """Return a message that names the key of a null field, or None if the row lacks the field."""
        return next((f'"{key}" is null' for key in self._names(name) if _has(row, key)), None)

    def _missing(self, row: dict[str, Any], name: str, keys: Mapping[str, str]) -> str:
        """Return a message that names a missing field and the most similar unused key."""
        wanted = self._settings.fields.get(name, name)
        if not wanted:
            return f'no "{name}", which every row needs; remove --field {name}='
        spare = [key for key in row if key not in keys.values() and not self._is_known(key)]
        return f'no "{wanted}"{nearest(wanted, spare, "found")} (--field {name}=KEY names the key of {name})'

    def _is_known(self, key: str) -> bool:
        return any(key in self._names(name) for name in ALIASES)

    def _names(self, name: str) -> tuple[str, ...]:
        """Return the keys that a field may have."""
        chosen = self._settings.fields.get(name)
        if chosen is None:
            return (name, *ALIASES[name])
        return (chosen,) if chosen else ()

    def _key(self, row: dict[str, Any], name: str) -> str | None:
        """Return the key of a field in a row, or None. Null counts as missing, except for ``answer``."""
        names = self._names(name)
        there = [key for key in names if _look_up(row, key) is not None]
        if len(there) > 1 and there[0] != name:
            raise BadRowError(
                f'"{there[0]}" and "{there[1]}" may both be {name}; choose one, such as --field {name}={there[0]}'
            )
        if not there and name == "answer":
            there = [key for key in names if _has(row, key)]
        return there[0] if there else None

    def _prompt(self, given: Mapping[str, Any], keys: Mapping[str, str]) -> tuple[str, list[int]]:
        """Return text and tokens of the prompt."""
        question: Question | None = question_of(given["prompt"], keys["prompt"]) if "prompt" in keys else None
        if "prompt_ids" in keys:
            ids = self._ids(given["prompt_ids"], keys["prompt_ids"])
        else:
            try:
                ids = self._ids(self._encode(json.dumps(question)), keys["prompt"])
            except InputError as error:
                raise BadRowError(str(error)) from None
        return self._text(ids) if question is None else as_text(question), ids

    def _response(
        self, given: Mapping[str, Any], keys: Mapping[str, str], truncated: bool | None
    ) -> tuple[str, list[int]]:
        """Return text and tokens; text that was not truncated gets the stop token that ended it."""
        text = _response_text(given["response"], keys["response"]) if "response" in keys else None
        end = self._policy.turn_end
        if "response_ids" in keys:
            ids, key = given["response_ids"], keys["response_ids"]
        else:
            key = keys["response"]
            ids = self._policy.tokenizer(text, add_special_tokens=False)["input_ids"]
            has_end = bool(ids) and ids[-1] in self._stop_ids
            ids = [*ids, end] if truncated is False and end is not None and not has_end else ids
        if ids == []:
            ids = self._empty(key, truncated, end)
        ids = self._ids(ids, key)
        return self._text(ids) if text is None else well_formed(text), ids

    def _empty(self, key: str, truncated: bool | None, end: int | None) -> list[int]:
        """Return the tokens of an empty response that was not truncated: a single stop token."""
        if truncated is not False:
            raise BadRowError(f'"{key}" is empty; with "is_truncated": false it would count as one stop token')
        if end is None:
            raise BadRowError(f'"{key}" is empty, and {self._policy.name} has no end-of-sequence token')
        return [end]

    def _ids(self, value: Any, key: str) -> list[int]:
        if not isinstance(value, list):
            raise BadRowError(f'"{key}" is {kind_of(value)}, expected a list of token ids')
        if not value:
            raise BadRowError(f'"{key}" is empty')
        size = self._policy.vocab_size
        for place, token in enumerate(value):
            if type(token) is not int or not 0 <= token < size:
                raise BadRowError(
                    f'"{key}" holds {reprlib.repr(token)} at index {place}, expected a token id from 0 to {size - 1}'
                )
        return value

    def _text(self, ids: list[int]) -> str:
        return self._policy.decode([ids])[0]

    def _place(self, step: int, prompt: int, group: Any) -> tuple[int, str]:
        """Return the number of the group over all files, and the id of the prompt.

        Groups that share a prompt at one step have different ids.
        """
        key = (step, prompt if group is None else _digest(group))
        if key not in self._groups:
            repeat = (prompt, self._repeats[step, prompt])
            self._repeats[step, prompt] += 1
            name = self._prompts.setdefault(repeat, f"prompt-{len(self._prompts) + 1:06d}")
            self._groups[key] = (self.num_groups, name, prompt)
            self.num_groups += 1
        group_id, name, own = self._groups[key]
        if own != prompt:
            raise BadRowError(f"group {reprlib.repr(group)} holds another prompt at step {step}")
        return group_id, name


def _look_up(row: Mapping[str, Any], key: str) -> Any:
    """Return the value at a key, dotted where nested, or None."""
    if key in row:
        return row[key]
    value: Any = row
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _has(row: Mapping[str, Any], key: str) -> bool:
    """Return whether a key, dotted where nested, exists, even with a null value."""
    parent, _, last = key.rpartition(".")
    place = _look_up(row, parent) if parent else row
    return key in row or (isinstance(place, Mapping) and last in place)


def _response_text(value: Any, key: str) -> str:
    """Return text, given as such or as a list of one assistant turn."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value, key = value[0].get("content"), f"{key}.content"
    if not isinstance(value, str):
        raise BadRowError(f'"{key}" is {kind_of(value)}, expected text or one turn of the assistant')
    # A policy may sample nothing but white space.
    return text_of(value, f'"{key}"') if value.strip() else value


def _loss_mask(
    given: Mapping[str, Any], keys: Mapping[str, str], num_prompt: int, num_response: int
) -> list[bool] | None:
    """Return which tokens of a response were generated, None if all; the mask may also cover the prompt."""
    if "loss_mask" not in keys:
        return None
    value, key = given["loss_mask"], keys["loss_mask"]
    if not isinstance(value, list):
        raise BadRowError(f'"{key}" is {kind_of(value)}, expected a list of 0 and 1')
    for place, mark in enumerate(value):
        if not isinstance(mark, int | float) or mark not in (0, 1):
            raise BadRowError(f'"{key}" holds {reprlib.repr(mark)} at index {place}, expected 0 or 1')
    mask = [bool(mark) for mark in value]
    if "response_ids" not in keys:
        if all(mask):
            return None
        raise BadRowError(f'"{key}" excludes tokens of a text; add "response_ids" to identify them')
    if len(mask) == num_prompt + num_response and not any(mask[:num_prompt]):
        mask = mask[num_prompt:]
    if len(mask) != num_response:
        raise BadRowError(f'"{key}" has {len(mask)} entries, "{keys["response_ids"]}" has {num_response}')
    if not any(mask):
        raise BadRowError(f'"{key}" excludes every token of the response')
    return None if all(mask) else mask


def _number(value: Any, key: str) -> float:
    if isinstance(value, str) and NUMBER.fullmatch(value):
        value = float(value)
    if not isinstance(value, int | float | Decimal):
        raise BadRowError(f'"{key}" is {kind_of(value)}, expected a number')
    # Also false for NaN.
    if not abs(value) <= MAX_NUMBER:
        raise BadRowError(f'"{key}" is {reprlib.repr(value)}, expected a finite number up to {MAX_NUMBER:g}')
    return float(value)


def _flag(value: Any, key: str, field: str = "") -> bool:
    """Return a Boolean, also if written as text; ``field`` names an optional field for the error message."""
    if (flag := FLAGS.get(str(value).strip().lower())) is None:
        remedy = f"; ignore it with --field {field}=" if field else ""
        raise BadRowError(f'"{key}" is {reprlib.repr(value)}, expected true or false{remedy}')
    return flag


def _step(value: Any, key: str) -> int:
    """Return an integer, which may be text or have a decimal point."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1
    if not 0 <= number <= MAX_INT:
        raise BadRowError(f'"{key}" is {reprlib.repr(value)}, expected an integer from 0 to {MAX_INT}')
    return number


def _group(value: Any, key: str) -> str | int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int):
        found = reprlib.repr(value) if isinstance(value, float) else kind_of(value)
        raise BadRowError(f'"{key}" is {found}, expected text or an integer')
    return value


def _answer(value: Any) -> str | None:
    """Return an answer as text; None for a blank, NaN, and markers of a missing answer."""
    is_nan = isinstance(value, float) and math.isnan(value)
    return None if is_nan or (isinstance(value, str) and NO_ANSWER.fullmatch(value)) else _plain_text(value)


def _plain_text(value: Any) -> str | None:
    """Return text unchanged, None if it is empty, and other values as JSON."""
    if value is None or isinstance(value, str):
        return well_formed(value) if value else None
    return json.dumps(value, default=str)


def _digest(value: Any) -> int:
    return int.from_bytes(blake2b(json.dumps(value).encode(), digest_size=8).digest(), "big")
