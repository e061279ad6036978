"""Two runs of the embedded policy in which nothing that the claims are about can be true.

- *frozen*: the learning rate is 0 for all purposes, and weights never move. No claim about training may be supported.
- *random update*: training is real, and so is the plateau, but after-update values are those of weights that moved by
  random noise as long as the update. No claim about what an update does may be supported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from entrace.analysis.claims import CONTRADICTED, SUPPORTED, judge
from entrace.analysis.runs import open_runs
from entrace.trainer import train as training
from entrace.trainer.config import load_config
from entrace.trainer.learner import AfterUpdate, Learner, UpdateMetrics
from entrace.trainer.rollouts import Batch

FROZEN = ("optim.lr=1e-12", "optim.weight_decay=0.0")
# Parts about what an update does to tokens, and all about training. (The gradient of T3 is one of the policy as it is.)
ABOUT_UPDATES = ("S5", "S6", "T3/movement")
ABOUT_TRAINING = ("S1", "E1", "S2", "S3", "S4", *ABOUT_UPDATES)


class RandomlyCaptured(Learner):
    """A learner whose after-update values come from weights moved at random, each tensor as far as the update did."""

    def update(self, batch: Batch, advantages: torch.Tensor, step: int) -> UpdateMetrics:
        """Keep the weights that the update starts from."""
        self._before = [weight.detach().clone() for weight in self.policy.model.parameters()]
        return super().update(batch, advantages, step)

    @torch.no_grad()
    def capture(self, batch: Batch, metrics: UpdateMetrics, step: int) -> AfterUpdate:
        """Capture at random weights, and put back those of the update."""
        weights = list(self.policy.model.parameters())
        updated = [weight.detach().clone() for weight in weights]
        rng = torch.Generator().manual_seed(step)
        for weight, old, new in zip(weights, self._before, updated, strict=True):
            noise = torch.randn(weight.shape, generator=rng)
            weight.copy_(old + noise * (new - old).norm() / noise.norm())
        try:
            return super().capture(batch, metrics, step)
        finally:
            for weight, new in zip(weights, updated, strict=True):
                weight.copy_(new)


def train_frozen(folder: Path, overrides: Sequence[str]) -> Path:
    """Train the embedded policy without moving it, and record the run in ``folder``."""
    training.train(load_config("tiny", [*FROZEN, *overrides]), folder, {"study": "real", "arm": "none"})
    return folder


def train_with_random_updates(folder: Path, overrides: Sequence[str]) -> Path:
    """Train the embedded policy, capture what random updates would have done, and record the run in ``folder``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "Learner", RandomlyCaptured)
        training.train(load_config("tiny", list(overrides)), folder, {"study": "real", "arm": "none"})
    return folder


@dataclass(frozen=True)
class RealCase:
    """A real run: what it is, how to make it, and the claims that must earn no verdict on it."""

    about: str
    train: Callable[[Path, Sequence[str]], Path]
    overrides: tuple[str, ...]
    absent: tuple[str, ...]


REAL_CASES = {
    "real-frozen": RealCase(
        "The embedded policy for 60 steps, its weights never moved.",
        train_frozen,
        ("steps=60", "eval.every=60"),
        ABOUT_TRAINING,
    ),
    "real-random-update": RealCase(
        "The embedded policy, trained for 120 steps; after-update values of weights that moved at random, as far as "
        "the update moved them.",
        train_with_random_updates,
        ("steps=120", "eval.every=120"),
        ABOUT_UPDATES,
    ),
}


def judge_real(
    name: str, folder: Path, overrides: Sequence[str] | None = None
) -> list[tuple[str, str, float | None, float | None, float | None]]:
    """Train a real case in ``folder`` and return part, verdict, effect, and interval of the claims absent from it."""
    case = REAL_CASES[name]
    verdicts = judge(open_runs(case.train(folder, case.overrides if overrides is None else overrides)))
    found = [(f"{v.claim}/{v.part}", v.verdict, v.effect, v.low, v.high) for v in verdicts]
    return [row for row in found if row[0].startswith(case.absent)]


def false_parts(rows: Sequence[Sequence[object]]) -> list[str]:
    """Return the parts that earned a verdict all the same."""
    return [str(part) for part, verdict, *_ in rows if verdict in (SUPPORTED, CONTRADICTED)]
