"""Train two runs of the embedded policy in which the claims cannot be true.

- *frozen*: the learning rate is effectively 0 and weights never move. No claim about training may be supported.
- *random update*: training and plateau are real, but after-update values come from weights moved by random noise with
  the norm of the update. No claim about the effect of an update may be supported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from entrace.analysis.claims import CONTRADICTED, SUPPORTED, judge
from entrace.analysis.runs import open_runs
from entrace.trainer import train as training
from entrace.trainer.algorithm.mini_batch import Objective
from entrace.trainer.config import load_config
from entrace.trainer.learner import AfterUpdate, Learner, UpdateMetrics
from entrace.trainer.rollouts import Batch

FROZEN = ("optim.lr=1e-12", "optim.weight_decay=0.0")
# Parts about the effect of an update on tokens, and all parts about training. The gradient of T3 does not depend on the
# update.
ABOUT_UPDATES = ("S5", "S6", "T3/movement")
ABOUT_TRAINING = ("S1", "E1", "S2", "S3", "S4", *ABOUT_UPDATES)


class RandomlyCaptured(Learner):
    """Capture after-update values at randomly moved weights.

    Each tensor moves as far as in the update.
    """

    def update(self, batch: Batch, objectives: Iterable[tuple[torch.Tensor, Objective]], step: int) -> UpdateMetrics:
        """Store the step, and the weights before the update."""
        self._step = step
        self._before = [weight.detach().clone() for weight in self.policy.model.parameters()]
        return super().update(batch, objectives, step)

    @torch.no_grad()
    def capture(self, batch: Batch, metrics: UpdateMetrics, rows: torch.Tensor) -> AfterUpdate:
        """Capture at randomly moved weights, then restore the updated weights."""
        weights = list(self.policy.model.parameters())
        updated = [weight.detach().clone() for weight in weights]
        rng = torch.Generator().manual_seed(self._step)
        for weight, old, new in zip(weights, self._before, updated, strict=True):
            noise = torch.randn(weight.shape, generator=rng)
            weight.copy_(old + noise * (new - old).norm() / noise.norm())
        try:
            return super().capture(batch, metrics, rows)
        finally:
            for weight, new in zip(weights, updated, strict=True):
                weight.copy_(new)


def train_frozen(folder: Path, overrides: Sequence[str]) -> Path:
    """Train the embedded policy with frozen weights, and record it in ``folder``."""
    training.train(load_config("tiny", [*FROZEN, *overrides]), folder, {"study": "real", "arm": "none"})
    return folder


def train_with_random_updates(folder: Path, overrides: Sequence[str]) -> Path:
    """Train the embedded policy, and capture random updates.

    The run is recorded in ``folder``.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "Learner", RandomlyCaptured)
        training.train(load_config("tiny", list(overrides)), folder, {"study": "real", "arm": "none"})
    return folder


@dataclass(frozen=True)
class RealCase:
    """Describe a real run and the claims that must earn no verdict on it.

    ``train`` trains the run.
    """

    about: str
    train: Callable[[Path, Sequence[str]], Path]
    overrides: tuple[str, ...]
    absent: tuple[str, ...]


REAL_CASES = {
    "real-frozen": RealCase(
        "The embedded policy for 60 steps with frozen weights.",
        train_frozen,
        ("steps=60", "eval.every=60"),
        ABOUT_TRAINING,
    ),
    "real-random-update": RealCase(
        "The embedded policy, trained for 120 steps; after-update values come from weights moved at random, as far as "
        "the update moved them.",
        train_with_random_updates,
        ("steps=120", "eval.every=120"),
        ABOUT_UPDATES,
    ),
}


def judge_real(
    name: str, folder: Path, overrides: Sequence[str] | None = None
) -> list[tuple[str, str, float | None, float | None, float | None]]:
    """Train a real case, and return the verdicts of the claims absent from it.

    A verdict has part, word, effect, and interval. The run is written to ``folder``.
    """
    case = REAL_CASES[name]
    verdicts = judge(open_runs(case.train(folder, case.overrides if overrides is None else overrides)))
    found = [(f"{v.claim}/{v.part}", v.verdict, v.effect, v.low, v.high) for v in verdicts]
    return [row for row in found if row[0].startswith(case.absent)]


def false_parts(rows: Sequence[Sequence[object]]) -> list[str]:
    """Return the parts that earned a verdict, which is an error."""
    return [str(part) for part, verdict, *_ in rows if verdict in (SUPPORTED, CONTRADICTED)]
