"""One row of a plain rollouts file: which of its fields are what, and whether they can be scored."""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, field_validator

from analysis.trace import InputError, nearest
from analysis.trace.plain import well_formed
from trainer.config import PolicyConfig
from trainer.section import MAX_INT, Positive, Section
from trainer.tasks.prompt import Question, as_text
from trainer.tasks.rows import BadRowError, kind_of, question_of, text_of

if TYPE_CHECKING:
    from trainer.policy import Policy

# What each field is called by those who do not call it by its name, such as TRL's and verl's files of completions.
ALIASES: dict[str, tuple[str, ...]] = {
    "prompt": ("input",),
    "prompt_ids": ("prompt_token_ids",),
    "response": ("completion", "output"),
    "response_ids": ("completion_ids", "response_token_ids"),
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
# Arithmetic goes by these: all rows have them, or none.
UNIFORM = ("step", "group", "advantage", "is_correct")
# Larger numbers leave float32 no room to be multiplied in.
MAX_NUMBER = 1e30
ENCODINGS_KEPT = 256


class ScoreSettings(Section):
    """How plain rollouts are read and scored.

    ``fields`` names the keys of fields that are called otherwise, dotted where nested; ``correct_at`` is the reward
    from which on a response counts as right; ``batch_tokens`` bounds a forward pass, padding counted if there is any.
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
                raise ValueError(f'"{name}" is no field of a rollout{nearest(name, ALIASES)}')
        return fields


@dataclass(frozen=True)
class Rollout:
    """One response, ready to be scored; None where the rows do not say."""

    place: str
    step: int
    group_id: int
    prompt_id: str
    prompt: str
    prompt_ids: list[int]
    completion: str
    response_ids: list[int]
    reward: float
    advantage: float | None
    is_correct: bool
    is_truncated: bool | None
    answer: str | None
    has_answer: bool | None
    ground_truth: str | None
    task: str


class RowReader:
    """Makes rollouts of rows.

    Attributes:
        keys: Key that each field stands under; what it was called in the first row, it is called in all.
        num_groups: Groups so far.
    """

    def __init__(self, settings: ScoreSettings, policy: Policy) -> None:
        """``policy`` is the one that scores."""
        self.keys: dict[str, str] = {}
        self.num_groups = 0
        self._settings, self._policy = settings, policy
        self._has_rows = False
        # A context of its own length at most: what predicts the last token does not read it.
        self._max_tokens = getattr(policy.model.config, "max_position_embeddings", MAX_INT) + 1
        self._stop_ids = set(policy.stop_ids.tolist())
        self._encode = lru_cache(ENCODINGS_KEPT)(lambda question: policy.encode_prompt(json.loads(question)))
        self._groups: dict[tuple[int, int], tuple[int, str, int]] = {}
        self._prompts: dict[tuple[int, int], str] = {}
        self._repeats: Counter[tuple[int, int]] = Counter()

    def read(self, row: dict[str, Any] | BadRowError, place: str, default_task: str) -> tuple[Rollout, dict[str, str]]:
        """One rollout, and the keys of the fields that its row has.

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
        if len(prompt_ids) + len(response_ids) > self._max_tokens:
            raise BadRowError(
                f"prompt and response have {len(prompt_ids) + len(response_ids)} tokens, {self._policy.name} takes "
                f"{self._max_tokens - 1}"
            )
        reward = _number(given["reward"], keys["reward"])
        is_correct = reward >= self._settings.correct_at
        if "is_correct" in keys:
            is_correct = _flag(given["is_correct"], keys["is_correct"])
        answer = _plain_text(given.get("answer"))
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
        """Keys and values of the fields that a row has."""
        keys, given = {}, {}
        for name in ALIASES:
            if key := self._key(row, name):
                keys[name], given[name] = key, _look_up(row, key)
                if self.keys.get(name, key) != key:
                    raise BadRowError(f'{name} stands in "{key}" here, in "{self.keys[name]}" in rows before')
        for name in UNIFORM:
            if self._has_rows and (name in keys) != (name in self.keys):
                raise BadRowError(f'{"a" if name in keys else "no"} "{name}", unlike rows before')
        for name in ("prompt", "response"):
            if not {name, f"{name}_ids"} & keys.keys():
                raise BadRowError(f'no "{name}"{nearest(name, row)}')
        if "reward" not in keys:
            raise BadRowError(f'no "reward"{nearest("reward", row)}')
        return keys, given

    def _key(self, row: dict[str, Any], name: str) -> str | None:
        """Where a field stands in a row; None if nowhere, null being nothing, but for an answer: that there is none."""
        chosen = self._settings.fields.get(name)
        names = (chosen,) if chosen else (name, *ALIASES[name])
        there = [key for key in names if _look_up(row, key) is not None]
        if len(there) > 1 and there[0] != name:
            raise BadRowError(
                f'"{there[0]}" and "{there[1]}" may both be {name}; choose with --field {name}={there[0]}'
            )
        if not there and name == "answer":
            there = [key for key in names if key in row]
        return there[0] if there else None

    def _prompt(self, given: Mapping[str, Any], keys: Mapping[str, str]) -> tuple[str, list[int]]:
        """Text and tokens."""
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
        """Text and tokens; text that was not cut gets the end of sequence that it was sampled with."""
        text = _response_text(given["response"], keys["response"]) if "response" in keys else None
        if "response_ids" in keys:
            ids = self._ids(given["response_ids"], keys["response_ids"])
            return self._text(ids) if text is None else well_formed(text), ids
        text = text_of(text, f'"{keys["response"]}"')
        tokens: Any = self._policy.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = self._ids(tokens, keys["response"])
        end: Any = self._policy.tokenizer.eos_token_id
        return text, [*ids, end] if truncated is False and end is not None and ids[-1] not in self._stop_ids else ids

    def _ids(self, value: Any, key: str) -> list[int]:
        if not isinstance(value, list):
            raise BadRowError(f'"{key}" is {kind_of(value)}, expected a list of token ids')
        if not value:
            raise BadRowError(f'"{key}" is empty')
        size = self._policy.vocab_size
        for place, token in enumerate(value):
            if type(token) is not int or not 0 <= token < size:
                raise BadRowError(
                    f'"{key}" holds {reprlib.repr(token)} at place {place}, the vocabulary is 0 to {size - 1}'
                )
        return value

    def _text(self, ids: list[int]) -> str:
        return self._policy.decode([ids])[0]

    def _place(self, step: int, prompt: int, group: Any) -> tuple[int, str]:
        """Number of the group within all files, and id of the prompt; groups that share a prompt at one step differ."""
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
    """The value at a key, dotted where nested; None if there is none."""
    if key in row:
        return row[key]
    value: Any = row
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _response_text(value: Any, key: str) -> str:
    """Text, or a list of the assistant's one turn."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("content")
    if not isinstance(value, str):
        raise BadRowError(f'"{key}" is {kind_of(value)}, expected text or one turn of the assistant')
    return value


def _number(value: Any, key: str) -> float:
    if not isinstance(value, int | float | Decimal):
        raise BadRowError(f'"{key}" is {kind_of(value)}, expected a number')
    # Also false for what is no number at all.
    if not abs(value) <= MAX_NUMBER:
        raise BadRowError(f'"{key}" is {reprlib.repr(value)}, expected a finite number up to {MAX_NUMBER:g}')
    return float(value)


def _flag(value: Any, key: str) -> bool:
    if not isinstance(value, int | float) or value not in (0, 1):
        raise BadRowError(f'"{key}" is {reprlib.repr(value)}, expected true or false')
    return bool(value)


def _step(value: Any, key: str) -> int:
    """A whole number, as text or with a decimal point too."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1
    if not 0 <= number <= MAX_INT:
        raise BadRowError(f'"{key}" is {reprlib.repr(value)}, expected a whole number from 0 to {MAX_INT}')
    return number


def _group(value: Any, key: str) -> str | int:
    if not isinstance(value, str | int):
        raise BadRowError(f'"{key}" is {kind_of(value)}, expected text or a number')
    return value


def _plain_text(value: Any) -> str | None:
    """Text as it is, None if it is empty; whatever else there is, as JSON."""
    if value is None or isinstance(value, str):
        return well_formed(value) if value else None
    return json.dumps(value, default=str)


def _digest(value: Any) -> int:
    return int.from_bytes(blake2b(json.dumps(value).encode(), digest_size=8).digest(), "big")
