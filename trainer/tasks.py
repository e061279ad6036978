"""Verifiable tasks: prompts by seed, answers by format, rewards by the task's own scorer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS

from analysis.trace import InputError, nearest

ANSWER = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)
# Far above any number of prompts a run draws, so that held-out and training indices never meet.
TRAIN_OFFSET = 1_000_000
MAX_DUPLICATES_IN_A_ROW = 10_000


@dataclass(frozen=True)
class Prompt:
    """One problem; ``entry`` is what the task's scorer needs to judge an answer."""

    prompt_id: str
    split: str
    task: str
    text: str
    ground_truth: str
    difficulty: str | None
    entry: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Score:
    """Verdict on one completion: ``answer`` is None for a format violation, which scores 0."""

    answer: str | None
    score: float

    @property
    def is_correct(self) -> bool:
        """Full marks."""
        return self.score >= 1.0


class ReasoningGymTask:
    """A procedural task of the reasoning-gym library, split into disjoint training and held-out prompts.

    Held-out prompts are the first distinct questions of one stream; training prompts come from another and skip every
    held-out question, so that the two never share a text, however small the space of questions is.
    """

    def __init__(self, name: str, params: dict[str, Any], seed: int, num_heldout: int) -> None:
        """Builds the task.

        Args:
            name: A reasoning-gym dataset, such as ``chain_sum``.
            params: Its parameters.
            seed: Decides all prompts of both splits.
            num_heldout: Size of the held-out set.

        Raises:
            InputError: unknown task, parameters that it does not take, or too few distinct questions.
        """
        if name not in DATASETS:
            raise InputError(f'unknown task "{name}"{nearest(name, DATASETS)}')
        try:
            self._dataset = reasoning_gym.create_dataset(name, seed=seed, size=2 * TRAIN_OFFSET, **params)
        except (TypeError, ValueError, AssertionError) as error:
            raise InputError(f"task {name}: {error}") from None
        self.name = name
        self.heldout = [prompt for prompt, _ in zip(self._draw("heldout", set()), range(num_heldout), strict=False)]
        self._heldout_questions = {prompt.text for prompt in self.heldout}
        self._train: list[Prompt] = []
        self._train_stream = self._draw("train", self._heldout_questions)

    def train_prompt(self, index: int) -> Prompt:
        """The training prompt of that index, from 0; the same for every caller with the same seed."""
        while len(self._train) <= index:
            self._train.append(next(self._train_stream))
        return self._train[index]

    def score(self, completion: str, prompt: Prompt) -> Score:
        """Scores the last ``<answer>...</answer>`` of a completion with the task's own scorer."""
        answer = extract_answer(completion)
        if answer is None:
            return Score(None, 0.0)
        return Score(answer, float(self._dataset.score_answer(answer, prompt.entry)))

    def _draw(self, split: str, excluded: set[str]) -> Iterator[Prompt]:
        """Yields prompts whose question is not in ``excluded``; the held-out split also leaves out its own repeats."""
        seen = set(excluded)
        offset = TRAIN_OFFSET if split == "train" else 0
        skipped = 0
        for index in count():
            entry = self._dataset[offset + index]
            question = entry["question"]
            if question in seen:
                skipped += 1
                if skipped > MAX_DUPLICATES_IN_A_ROW:
                    raise InputError(f"task {self.name}: too few distinct questions for its {split} split")
                continue
            skipped = 0
            if split == "heldout":
                seen.add(question)
            yield Prompt(
                prompt_id=f"{split}-{index:06d}",
                split=split,
                task=self.name,
                text=question,
                ground_truth=str(entry["answer"]),
                difficulty=_describe_difficulty(entry["metadata"]),
                entry=entry,
            )


def extract_answer(completion: str) -> str | None:
    """The content of the last non-empty ``<answer>...</answer>``, stripped; None if there is none."""
    found = [answer for answer in ANSWER.findall(completion) if answer]
    return found[-1] if found else None


def _describe_difficulty(metadata: dict[str, Any]) -> str | None:
    """The instance's own value for each axis that the task calls difficulty, as JSON."""
    axes = metadata.get("difficulty") or {}
    values = {axis: metadata.get(axis, value) for axis, value in axes.items()}
    return json.dumps(values, default=str, sort_keys=True) if values else None
