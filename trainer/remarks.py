"""Remarks on a run while it trains: settings that fit neither task nor verifier show in its first steps."""

from __future__ import annotations

import logging

from entrace.trainer.algorithm.shaping import waits_for_plateau
from entrace.trainer.config import Config
from entrace.trainer.rollouts import Batch
from entrace.trainer.tasks import Score

log = logging.getLogger("entrace")

# Steps after which a threshold of correctness that separates nothing is remarked on.
EARLY_STEPS = 3


class Remarks:
    """Logs each remark once per run."""

    def __init__(self, config: Config) -> None:
        """Nothing has been seen yet."""
        self._config = config
        self._early: list[Score] = []
        self._is_idle = False

    def after_step(self, step: int, batch: Batch) -> None:
        """Remark on a threshold that no response, or every one, reaches, and on a step without an update."""
        if step <= EARLY_STEPS:
            self._early += batch.scores
            if step == min(EARLY_STEPS, self._config.steps):
                self._remark_on_threshold()
        if not self._is_idle and not batch.is_kept.any():
            self._is_idle = True
            metric = self._config.rollout.filter_metric
            log.warning("step %d: no group differs in %s, the policy is not updated", step, metric)

    def at_end(self, plateau_step: int | None) -> None:
        """Remark on shaping that waited for a plateau in vain."""
        if plateau_step is None and waits_for_plateau(self._config.shaping):
            steps = self._config.steps
            log.warning("no plateau was detected in %d steps: shaping that starts there stayed off", steps)

    def _remark_on_threshold(self) -> None:
        judged = [score for score in self._early if score.score is not None]
        if len({score.is_correct for score in judged}) == 1:
            values = [score.score for score in judged if score.score is not None]
            log.warning(
                "%s of the first %d responses counts as right: their scores lie from %g to %g, task.correct_at is %g",
                "every one" if judged[0].is_correct else "none",
                len(judged),
                min(values),
                max(values),
                self._config.task.correct_at,
            )
