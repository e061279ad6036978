"""Verifiable tasks: prompts by seed and index, and verdicts on responses.

A task is a mixture of sources, each a reasoning-gym task or a file of rows. Held-out prompts of all sources are chosen
first. No training prompt has the text of a held-out one, after normalization of white space and Unicode.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from entrace.analysis.importers.chat import Question, as_chat, as_text
from entrace.analysis.trace import InputError
from entrace.analysis.trace.errors import explained
from entrace.trainer.seeding import Stream, generator
from entrace.trainer.tasks.config import TaskConfig
from entrace.trainer.tasks.files import FileSource
from entrace.trainer.tasks.gym import GymSource
from entrace.trainer.tasks.normalize import normalize_text
from entrace.trainer.tasks.prompt import Prompt, Score, extract_answer
from entrace.trainer.tasks.source import Context, Source
from entrace.trainer.tasks.verifiers import Verifiers, answer_classes

__all__ = [
    "Mixture",
    "Prompt",
    "Question",
    "Score",
    "Task",
    "answer_classes",
    "as_chat",
    "as_text",
    "extract_answer",
    "load_task",
]

BLOCK = 1024
NUM_NAMED = 5

logger = logging.getLogger(__name__)


class Task:
    """Held-out and training prompts, and their verifiers.

    Attributes:
        sources: Sources of prompts, the task's own first.
        heldout: Held-out prompts of all sources.
        train_prompt: Maps an index, from 0, to a training prompt; equal for equal seeds.
        num_timeouts: Answers that count as wrong because their verifier timed out.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], seed: int, correct_at: float = 1.0) -> None:
        """Combine sources; sources of weight 0 are only evaluated.

        ``correct_at`` is ``task.correct_at``.
        """
        self.heldout = [prompt for source in sources for prompt in source.heldout]
        excluded = {normalize_text(prompt.text) for prompt in self.heldout}
        drawn = [(source.training(excluded), weight) for source, weight in zip(sources, weights, strict=True) if weight]
        self.train_prompt = Mixture([draw for draw, _ in drawn], [weight for _, weight in drawn], seed)
        self.num_timeouts = 0
        self.sources, self._correct_at = sources, correct_at

    def describe(self) -> dict[str, Any]:
        """Return the manifest's entry on files: counts of rows and of skipped rows.

        Rows without an answer are counted only if there are any.
        """
        files = [source for source in self.sources if isinstance(source, FileSource)]
        data = {path: asdict(count) for source in files for path, count in source.counts.items()}
        for count in data.values():
            if not count["without_answer"]:
                del count["without_answer"]
        return {"data": data} if data else {}

    def score(self, completion: str, prompt: Prompt) -> Score:
        """Return the verdict of the prompt's verifier.

        Raises:
            InputError: the verifier raised an error.
        """
        with explained(f"the verifier of {prompt.task} failed on {prompt.origin}", passes=InputError):
            score = prompt.verifier(completion, prompt)
        self.num_timeouts += score.is_timeout
        if score.is_timeout and self.num_timeouts <= NUM_NAMED:
            logger.warning("entrace: %s: the verifier timed out on an answer, which counts as wrong", prompt.origin)
        return replace(score, correct_at=self._correct_at)


class Mixture:
    """Prompts by index, from sources drawn in proportion to their weights."""

    def __init__(self, draws: Sequence[Callable[[int], Prompt]], weights: Sequence[float], seed: int) -> None:
        """Mix sources, whose ``draws`` return their own prompts by index."""
        self._draws, self._seed = draws, seed
        self._shares = [weight / sum(weights) for weight in weights]
        self._places: list[tuple[int, int]] = []
        self._counts = [0] * len(draws)

    def __call__(self, index: int) -> Prompt:
        """Return the prompt of an index.

        The prompts of a source come in its order, without gaps.
        """
        while len(self._places) <= index:
            rng = generator(self._seed, Stream.MIXTURE, len(self._places) // BLOCK)
            for source in rng.choice(len(self._draws), size=BLOCK, p=self._shares).tolist():
                self._places.append((source, self._counts[source]))
                self._counts[source] += 1
        source, place = self._places[index]
        return self._draws[source](place)


def load_task(config: TaskConfig, seed: int, encode: Callable[[Question], list[int]] | None = None) -> Task:
    """Open all sources of a task.

    Args:
        config: The task.
        seed: Determines training prompts and their order; ``config.heldout_seed`` determines the held-out ones.
        encode: Returns the token ids of a question, which ``max_prompt_tokens`` bounds.

    Raises:
        InputError: an unknown task, an unreadable file, malformed rows, too few prompts, an unavailable verifier, or a
            token limit without ``encode``.
    """
    limit = config.max_prompt_tokens
    if limit and encode is None:
        raise InputError("task.max_prompt_tokens: needs a tokenizer, and none is loaded yet; remove the key")
    verifiers = Verifiers(config.verifiers)
    sources: list[Source] = []
    for number, (label, source) in enumerate(config.sources.items()):
        context = Context(
            section=f"task.mix.{label}" if number else "task",
            label=label,
            prefix=f"{label}/" if number else "",
            number=number,
            seed=seed,
            heldout_seed=config.heldout_seed,
            verifiers=verifiers,
            is_too_long=lambda prompt: bool(limit and encode and len(encode(prompt.question)) > limit),
            skips_bad_rows=config.on_bad_rows == "skip",
        )
        sources.append(FileSource(source, context) if source.is_file else GymSource(source, context))
    verifiers.check_names()
    _check_benchmarks(config, sources)
    weights = [source.weight for source in config.sources.values()]
    return Task(sources, weights, seed, config.correct_at)


def _check_benchmarks(config: TaskConfig, sources: Sequence[Source]) -> None:
    """Refuse a held-out file whose name other held-out prompts share.

    The results of both would be pooled.
    """
    names = [{prompt.task for prompt in source.heldout} for source in sources]
    for number, (label, source) in enumerate(config.sources.items()):
        others = {name for other, found in enumerate(names) if other != number for name in found}
        for name in others.intersection(name for name in source.heldout_files if name):
            section = f"task.mix.{label}" if number else "task"
            raise InputError(
                f'{section}.heldout_file: another held-out set is already called "{name}"; name this one in a table, '
                f'heldout_file = {{ NAME = "{source.heldout_files[name]}" }}'
            )
