"""Generate prompts with tasks of the reasoning-gym library."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

from entrace.analysis.trace import InputError, nearest
from entrace.trainer.tasks.config import SourceConfig
from entrace.trainer.tasks.math_verifier import EXPECTED, fault_of
from entrace.trainer.tasks.normalize import normalize_text
from entrace.trainer.tasks.prompt import Prompt
from entrace.trainer.tasks.source import Context
from entrace.trainer.tasks.verifiers import score_by

# Entries per stream, far above the prompts that a run draws. The library seeds an entry with the sum of the dataset's
# seed and the entry's index, so streams whose seeds are this far apart share no entry.
STREAM_LENGTH = 1_000_000
MAX_SKIPPED_IN_A_ROW = 10_000


class GymSource:
    """A reasoning-gym task, split into disjoint training and held-out prompts.

    Held-out prompts are the first distinct questions of one stream, equal for all seeds of a run. Training prompts come
    from another stream per seed and skip held-out questions, so that the splits never share a text, even if there are
    few questions.
    """

    def __init__(self, config: SourceConfig, context: Context) -> None:
        """Draw the held-out prompts.

        Raises:
            InputError: the task is unknown, its parameters are invalid, or it has too few distinct questions.
        """
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

        if config.name not in DATASETS:
            raise InputError(f'unknown task "{config.name}"{nearest(config.name, DATASETS)}')
        streams = {"heldout": 2 * context.heldout_seed, "train": 2 * context.seed + 1}
        try:
            self._datasets = {
                split: reasoning_gym.create_dataset(
                    config.name, seed=stream * STREAM_LENGTH, size=STREAM_LENGTH, **config.params
                )
                for split, stream in streams.items()
            }
        except (TypeError, ValueError, AssertionError) as error:
            raise InputError(f"task {config.name}: {error}") from None
        self._name, self._num_heldout, self._context = config.name, config.heldout_limit, context
        scorer = score_by(self._datasets["heldout"].score_answer)
        self._verifier = context.verifiers.of(context.label, scorer=scorer)
        self.heldout = list(islice(self._draw("heldout", set()), config.heldout_limit))
        for prompt in self.heldout:
            if fault := fault_of(self._verifier, prompt.ground_truth):
                raise InputError(f"{prompt.origin}: answer {fault}, expected {EXPECTED}; choose another verifier")

    @property
    def prompts(self) -> list[Prompt]:
        """Return the held-out prompts."""
        return self.heldout

    def training(self, excluded: set[str]) -> Callable[[int], Prompt]:
        """Return training prompts by index, from 0, whose texts are not ``excluded``.

        Texts are normalized before the comparison.
        """
        drawn: list[Prompt] = []
        stream = self._draw("train", excluded)

        def draw(index: int) -> Prompt:
            while len(drawn) <= index:
                drawn.append(next(stream))
            return drawn[index]

        return draw

    def _draw(self, split: str, excluded: set[str]) -> Iterator[Prompt]:
        """Yield prompts whose question is not ``excluded``.

        The held-out split also skips its own repeats.
        """
        seen, dataset = set(excluded), self._datasets[split]
        skipped = 0
        for index in count():
            entry = dataset[index]
            prompt = Prompt(
                prompt_id=f"{self._context.prefix}{split}-{index:06d}",
                split=split,
                task=self._context.label,
                question=entry["question"],
                ground_truth=str(entry["answer"]),
                difficulty=_describe_difficulty(entry["metadata"]),
                origin=f"{self._name}, {split} index {index}",
                entry=entry,
                verifier=self._verifier,
            )
            text = normalize_text(prompt.text)
            if text in seen or self._context.is_too_long(prompt):
                skipped += 1
                if skipped > MAX_SKIPPED_IN_A_ROW:
                    raise InputError(self._shortage(split, len(seen)))
                continue
            skipped = 0
            if split == "heldout":
                seen.add(text)
            yield prompt

    def _shortage(self, split: str, known: int) -> str:
        section = self._context.section
        if split == "heldout":
            return (
                f"{section}.num_heldout = {self._num_heldout}: too few distinct questions, {self._name} has {known} "
                f"with these params; lower it, or change {section}.params"
            )
        return (
            f"{section}.params: too few distinct questions, all those of {self._name} are held out; change params, "
            f"or lower {section}.num_heldout"
        )


def _describe_difficulty(metadata: dict[str, Any]) -> str | None:
    """Return the instance's value on each difficulty axis of the task, as JSON."""
    axes = metadata.get("difficulty") or {}
    values = {axis: metadata.get(axis, value) for axis, value in axes.items()}
    return json.dumps(values, default=str, sort_keys=True) if values else None
