"""What every method is made of: the tokens it looks at, and the entry that names it and describes it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.batch import Batch
from trainer.config import Section
from trainer.seeding import Stream, generator

HEADLINE = re.compile(r"(?P<equation>.+?): (?P<summary>.+) \((?P<source>[^()]+)\)\.")

Settings = dict[str, Any]


@dataclass(frozen=True)
class TokenBatch:
    """What a method may look at; nothing here carries a gradient.

    Attributes:
        logprobs: Of the sampled tokens, under the policy that sampled, nats, (B, T).
        entropy: Of the distributions sampled from, nats, (B, T).
        is_correct: (B,) bool; False without a verdict.
        response_mask: (B, T) bool, True at the first |o_i| places of each row.
        group_ids: The prompt of each response, (B,).
        rng: For methods that draw.
    """

    logprobs: Tensor
    entropy: Tensor
    is_correct: Tensor
    response_mask: Tensor
    group_ids: Tensor
    rng: np.random.Generator

    @classmethod
    def of(cls, batch: Batch, seed: int, stream: Stream, step: int) -> TokenBatch:
        """What a step's batch shows of itself; the random numbers are those of ``seed``, purpose and ``step``."""
        samples = batch.samples
        return cls(
            samples.stats.logprob,
            samples.stats.entropy,
            torch.tensor([bool(score.is_correct) for score in batch.scores]),
            samples.response_mask,
            batch.group_ids,
            generator(seed, stream, step),
        )

    def take(self, rows: Tensor) -> TokenBatch:
        """The responses at ``rows``, with the same random generator."""
        parts = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rng"}
        return TokenBatch(**{name: part[rows] for name, part in parts.items()}, rng=self.rng)


@dataclass(frozen=True)
class Method:
    """A named method.

    Attributes:
        function: Does it, or, for a recipe, returns the settings that make it.
        section: Config section of its parameters, below that of its kind.
        settings: What the source sets beside it, as nested config values.
    """

    function: Callable[..., Any]
    section: str | None = None
    settings: Settings = field(default_factory=dict)

    @property
    def defaults(self) -> dict[str, Any]:
        """Parameters of the function that have a default; the others are what it works on."""
        found = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in found if p.default is not p.empty}

    def parameters(self, config: Section) -> dict[str, Any]:
        """Keyword arguments of the function, as the config of its kind sets them."""
        return {name: getattr(getattr(config, self.section), name) for name in self.defaults} if self.section else {}

    def describe(self) -> dict[str, Any]:
        """Equation, summary and source from the docstring, and the parameters with their defaults."""
        headline = HEADLINE.fullmatch((inspect.getdoc(self.function) or "").splitlines()[0])
        assert headline, f"{self.function.__name__}: the first line is no headline"
        return {**headline.groupdict(), "parameters": self.defaults}
