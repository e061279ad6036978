"""Convert rows to rollouts: find fields, check their values, and restore tokens."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from entrace.analysis.importers.chat import as_text
from entrace.analysis.importers.codec import Codec, DumpTexts, placeholder
from entrace.analysis.importers.columns import Columns, look_up
from entrace.analysis.importers.groups import Groups, digest
from entrace.analysis.importers.prompts import PromptReader, PromptText, holds, matches
from entrace.analysis.importers.rewards import Rewards
from entrace.analysis.importers.rollout import ENGINE, TRAINER, Rollout
from entrace.analysis.importers.row_files import BadRowError, question_of, text_of
from entrace.analysis.importers.settings import ImportSettings
from entrace.analysis.importers.values import (
    MAX_LOGPROB,
    answer_of,
    components_of,
    flag_of,
    floats_of,
    group_of,
    ids_of,
    integers_of,
    mask_of,
    number_of,
    plain_text,
    response_text,
    step_of,
    truncated_of,
)
from entrace.analysis.trace.errors import InputError

NO_TOKENS = "the rows hold text without token ids; add --tokenizer PATH or --model MODEL to tokenize it"


@dataclass
class Mismatches:
    """Rows whose token ids differ from the text beside them.

    Attributes:
        checked: Rows with both.
        rows: Rows that differ.
        first: Place and description of the first of them.
    """

    checked: int = 0
    rows: int = 0
    first: str = ""


class RowReader:
    """Convert rows to rollouts.

    Attributes:
        columns: Keys of the fields.
        groups: Groups as recorded.
        shared_groups: Groups by prompt and step.
        texts: Texts of tokens that the dump holds.
        prompts: Restores prompts; None without a tokenizer.
        mismatches: Rows whose token ids differ from their text.
        bad_groups: Ids of groups and of shared groups that hold a malformed row.
        num_lost: Malformed rows whose group is unknown.
        num_ungrouped: Rollouts without a recorded group.
    """

    def __init__(
        self,
        settings: ImportSettings,
        codec: Codec | None,
        columns: Columns,
        kind: PromptText,
        has_model: bool,
        rewards: Rewards | None = None,
    ) -> None:
        """Read for ``codec``, the tokenizer; None to use tokens as they are.

        ``rewards`` are joined by id.
        """
        self.columns = columns
        self.groups, self.shared_groups = Groups(), Groups()
        self.texts = DumpTexts()
        self.prompts = PromptReader(codec, kind, has_model=has_model) if codec else None
        self.mismatches = Mismatches()
        self.bad_groups: tuple[set[int], set[int]] = (set(), set())
        self.num_lost = self.num_ungrouped = 0
        self._settings, self._codec, self._has_model, self._rewards = settings, codec, has_model, rewards
        self._numbers: dict[str, int] | None = None

    def read(self, row: dict[str, Any] | BadRowError, place: str, default_task: str) -> Rollout:
        """Return one rollout.

        Raises:
            BadRowError: the row is malformed.
        """
        ids: tuple[int, str, int, str] | None = None
        try:
            if isinstance(row, BadRowError):
                raise row
            row = self._rewards.join(row) if self._rewards else row
            keys, given = self.columns.find(row)
            ids, step, task = self._place(given, keys, default_task)
            rollout = self._rollout(given, keys, place, ids, step, task)
        except BadRowError:
            if ids is None:
                ids = self._place_of_bad(row, default_task)
            if ids is None:
                self.num_lost += 1
            else:
                self.bad_groups[0].add(ids[0])
                self.bad_groups[1].add(ids[2])
            raise
        self.columns.accept(keys)
        self.num_ungrouped += "group" not in keys
        return rollout

    def _place_of_bad(self, row: Any, default_task: str) -> tuple[int, str, int, str] | None:
        """Return the groups of a malformed row, None if it does not say."""
        if isinstance(row, BadRowError):
            return None
        keys, given = {}, {}
        for name in ("step", "group", "task", "prompt", "prompt_ids"):
            for key in self.columns.names(name):
                if name not in keys and (value := look_up(row, key)) is not None:
                    keys[name], given[name] = key, value
        # A row without a field that others have may belong to any group.
        if any(name in self.columns.keys and name not in keys for name in ("step", "group")):
            return None
        try:
            return self._place(given, keys, default_task)[0]
        except BadRowError:
            return None

    def _place(
        self, given: Mapping[str, Any], keys: Mapping[str, str], default_task: str
    ) -> tuple[tuple[int, str, int, str], int, str]:
        """Return group and prompt as recorded and as shared, the step, and the task."""
        step = step_of(given["step"], keys["step"]) if "step" in keys else 1
        task = text_of(given["task"], f'"{keys["task"]}"') if "task" in keys else default_task
        group = group_of(given["group"], keys["group"]) if "group" in keys else None
        if "prompt_ids" in keys:
            prompt = digest([task, ids_of(given["prompt_ids"], keys["prompt_ids"], None)])
        elif "prompt" in keys:
            prompt = digest([task, as_text(question_of(given["prompt"], keys["prompt"]))])
        else:
            prompt = digest([task, group])
        own = self.groups.place(step, prompt, group)
        shared = self.shared_groups.place(step, prompt, None)
        return (*own, *shared), step, task

    def _rollout(
        self,
        given: dict[str, Any],
        keys: dict[str, str],
        place: str,
        ids: tuple[int, str, int, str],
        step: int,
        task: str,
    ) -> Rollout:
        prompt, prompt_ids = self._prompt(given, keys)
        truncated = _truncated(given, keys)
        text, response_ids = self._response(given, keys, truncated)
        if self._has_model and not prompt_ids:
            raise BadRowError('no "prompt" or "prompt_ids"; --model needs one of them')
        num_prompt = len(prompt_ids or [])
        loss_mask = mask_of(given, keys, num_prompt, len(response_ids))
        self._check_length(num_prompt + len(response_ids))
        generated = [token for token, mark in zip(response_ids, loss_mask, strict=True) if mark] if loss_mask else None
        self._compare(given, keys, place, (prompt, text), (prompt_ids, response_ids, generated))
        completion = self._completion(text, response_ids, generated)
        prompt_text = as_text(prompt) if prompt is not None else self._decode(prompt_ids)
        reward = number_of(given["reward"], keys["reward"]) if "reward" in keys else None
        is_correct = None if reward is None else reward >= self._settings.correct_at
        if "is_correct" in keys:
            is_correct = flag_of(given["is_correct"], keys["is_correct"], "is_correct")
        answer = answer_of(given.get("answer"))
        size = (num_prompt, len(response_ids))
        advantage, advantages = _advantage(given, keys, *size)
        measures = _measures(given, keys, *size)
        return Rollout(
            place=place,
            step=step,
            group_id=ids[0],
            prompt_id=ids[1],
            shared_group_id=ids[2],
            shared_prompt_id=ids[3],
            prompt=prompt_text or "",
            prompt_ids=prompt_ids,
            completion=placeholder(generated or response_ids) if completion is None else completion,
            has_text=completion is not None and prompt_text is not None,
            response_ids=response_ids,
            ids_given="response_ids" in keys,
            loss_mask=loss_mask,
            reward=reward,
            reward_components=(
                components_of(given["reward_components"], keys["reward_components"])
                if "reward_components" in keys
                else None
            ),
            advantage=advantage,
            advantages=advantages,
            is_correct=is_correct,
            is_truncated=truncated,
            is_kept=flag_of(given["is_kept"], keys["is_kept"], "is_kept") if "is_kept" in keys else None,
            answer=answer,
            has_answer=answer is not None if "answer" in given else None,
            ground_truth=plain_text(given.get("ground_truth")),
            task=task,
            **measures,
        )

    def _prompt(self, given: Mapping[str, Any], keys: Mapping[str, str]) -> tuple[Any, list[int] | None]:
        """Return prompt and tokens; None for what is unknown."""
        question = question_of(given["prompt"], keys["prompt"]) if "prompt" in keys else None
        size = self._codec.vocab_size if self._codec else None
        if "prompt_ids" in keys:
            return question, ids_of(given["prompt_ids"], keys["prompt_ids"], size)
        if question is None or not self.prompts:
            return question, None
        restored, ids = self.prompts.read(question)
        return restored, ids_of(ids, keys["prompt"], size)

    def _response(
        self, given: Mapping[str, Any], keys: Mapping[str, str], truncated: bool | None
    ) -> tuple[str | None, list[int]]:
        """Return the text and the tokens of a response.

        Text that was not truncated gets the stop token that ended it.
        """
        text = response_text(given["response"], keys["response"]) if "response" in keys else None
        codec = self._codec
        end = codec.turn_end if codec else None
        if "response_ids" in keys:
            ids, key = given["response_ids"], keys["response_ids"]
            if "token_texts" in keys and isinstance(ids, list) and len(ids) == len(given["token_texts"]):
                self.texts.learn(ids, given["token_texts"])
        elif "token_texts" in keys:
            return text, self._number(given["token_texts"])
        elif codec is None:
            raise InputError(NO_TOKENS)
        else:
            key = keys["response"]
            ids = codec.encode(text or "")
            has_end = bool(ids) and ids[-1] in codec.stop_ids
            ids = [*ids, end] if truncated is False and end is not None and not has_end else ids
        if ids == []:
            ids = self._empty(key, truncated, end)
        return text, ids_of(ids, key, codec.vocab_size if codec else None)

    def _number(self, texts: list[str]) -> list[int]:
        """Return ids of tokens that the dump records as texts."""
        if not texts:
            raise BadRowError("the response has no tokens")
        if not self._codec:
            return self.texts.number(texts)
        if self._numbers is None:
            entries = enumerate(self._codec.vocabulary().texts)
            # The first entry of each text.
            self._numbers = {text: token for token, text in reversed(list(entries))}
        for place, text in enumerate(texts):
            if text not in self._numbers:
                raise BadRowError(f"token {text!r} at index {place} is not in the vocabulary of {self._codec.name}")
        return [self._numbers[text] for text in texts]

    def _empty(self, key: str, truncated: bool | None, end: int | None) -> list[int]:
        """Return the tokens of an empty, untruncated response: one stop token."""
        if truncated is not False:
            raise BadRowError(f'"{key}" is empty; with "is_truncated": false it would count as one stop token')
        if self._codec is None:
            raise BadRowError(f'"{key}" is empty; add --tokenizer PATH or --model MODEL to know its stop token')
        if end is None:
            raise BadRowError(f'"{key}" is empty, and {self._codec.name} has no end-of-sequence token')
        return [end]

    def _check_length(self, length: int) -> None:
        limit = self._codec.max_tokens if self._codec else None
        if self._codec and limit is not None and length > limit:
            raise BadRowError(f"prompt and response have {length} tokens, {self._codec.name} takes at most {limit - 1}")

    def _completion(self, text: str | None, ids: list[int], generated: list[int] | None) -> str | None:
        """Return the generated text; a text beside a mask may include tool output."""
        if text is not None and generated is None:
            return text
        return self._decode(generated or ids)

    def _decode(self, ids: list[int] | None) -> str | None:
        if ids is None:
            return None
        return self._codec.decode(ids) if self._codec else self.texts.text_of(ids)

    def _compare(
        self,
        given: Mapping[str, Any],
        keys: Mapping[str, str],
        place: str,
        texts: tuple[Any, str | None],
        tokens: tuple[list[int] | None, list[int], list[int] | None],
    ) -> None:
        """Compare recorded token ids with the texts beside them.

        Args:
            given: Values of the fields.
            keys: Keys of the fields.
            place: Place of the row.
            texts: Prompt and response; None if the row has only tokens.
            tokens: Tokens of the prompt, of the response, and those of the response that were generated.
        """
        (question, text), (prompt_ids, response_ids, generated) = texts, tokens
        codec = self._codec
        if codec is None or "response_ids" not in keys:
            return
        wrong = ""
        is_checked = False
        if text is not None:
            is_checked = True
            if not matches(codec, response_ids, text) and not (generated and matches(codec, generated, text)):
                wrong = keys["response_ids"]
        if "checked_text" in keys and isinstance(given["checked_text"], str):
            is_checked = True
            if codec.decode(generated or response_ids).strip() not in given["checked_text"]:
                wrong = keys["response_ids"]
        if "prompt" in keys and "prompt_ids" in keys and prompt_ids:
            is_checked = True
            if not holds(codec, prompt_ids, question):
                wrong = wrong or keys["prompt_ids"]
        self.mismatches.checked += is_checked
        self.mismatches.rows += bool(wrong)
        if wrong and not self.mismatches.first:
            shown = codec.decode(prompt_ids or [] if wrong == keys.get("prompt_ids") else response_ids)
            self.mismatches.first = f'{place}: "{wrong}" are the tokens of {json.dumps(shown[:60], ensure_ascii=False)}'


def _truncated(given: Mapping[str, Any], keys: Mapping[str, str]) -> bool | None:
    if "is_truncated" in keys:
        return flag_of(given["is_truncated"], keys["is_truncated"])
    return truncated_of(given.get("finish_reason"))


def _advantage(
    given: Mapping[str, Any], keys: Mapping[str, str], num_prompt: int, num_response: int
) -> tuple[float | None, list[float | None] | None]:
    """Return the advantage of the response and those of its tokens.

    A response whose tokens differ has no advantage of its own.
    """
    if "advantage" not in keys:
        return None, None
    value, key = given["advantage"], keys["advantage"]
    if not isinstance(value, list):
        return number_of(value, key), None
    values = floats_of(value, key, num_prompt, num_response)
    return None, values


def _measures(given: Mapping[str, Any], keys: Mapping[str, str], num_prompt: int, num_response: int) -> dict[str, Any]:
    """Return the values that the dump records per token.

    Engine logprobs count as logprob if the trainer's are missing.
    """
    found: dict[str, Any] = {}
    limits = {"high": MAX_LOGPROB}
    entropy = {"low": 0}
    for name in ("logprob", "sampling_logprob", "reference_logprob", "entropy"):
        if name == "entropy" and name in keys and not isinstance(given[name], list):
            found[name] = None
            continue
        bounds = entropy if name == "entropy" else limits
        found[name] = _optional(floats_of, name, given, keys, num_prompt, num_response, **bounds)
    for name in ("turn", "policy_version"):
        found[name] = _optional(integers_of, name, given, keys, num_prompt, num_response)
    kind = TRAINER if found["logprob"] is not None else None
    if found["logprob"] is None and found["sampling_logprob"] is not None:
        kind = ENGINE
        found["logprob"], found["sampling_logprob"] = found["sampling_logprob"], None
    mean = given.get("entropy_mean", given["entropy"] if "entropy" in keys and found["entropy"] is None else None)
    found["entropy_mean"] = None if mean is None else number_of(mean, keys.get("entropy_mean", keys.get("entropy", "")))
    found["temperature"] = _temperature(given, keys)
    return {**found, "logprob_kind": kind}


def _temperature(given: Mapping[str, Any], keys: Mapping[str, str]) -> float | None:
    """Return the sampling temperature; 0 is greedy decoding."""
    if (value := given.get("temperature")) is None:
        return None
    key = keys["temperature"]
    if (temperature := number_of(value, key)) < 0:
        raise BadRowError(
            f'"{key}" is {reprlib.repr(value)}, expected a number of at least 0; ignore it with --field temperature='
        )
    return temperature


def _optional(
    check: Any,
    name: str,
    given: Mapping[str, Any],
    keys: Mapping[str, str],
    num_prompt: int,
    num_response: int,
    **bounds: float,
) -> Any:
    if name not in keys:
        return None
    try:
        return check(given[name], keys[name], num_prompt, num_response, **bounds)
    except BadRowError as fault:
        raise BadRowError(f"{fault}; ignore it with --field {name}=") from None
