"""Warn about settings that do not fit task or verifier, in a run's first steps."""

from __future__ import annotations

import logging

from entrace.trainer.algorithm.shaping import waits_for_plateau
from entrace.trainer.config import Config
from entrace.trainer.rollouts import Batch
from entrace.trainer.tasks import Score

log = logging.getLogger("entrace")

# Steps after which a correctness threshold that separates no responses causes a warning.
EARLY_STEPS = 3


class Remarks:
    """Log each warning once per run."""

    def __init__(self, config: Config) -> None:
        """Start without any step seen."""
        self._config = config
        self._early: list[Score] = []
        self._is_idle = False

    def after_step(self, step: int, batch: Batch) -> None:
        """Warn if all or no responses reach the threshold, or if a step has no update."""
        if step <= EARLY_STEPS:
            self._early += batch.scores
            if step == min(EARLY_STEPS, self._config.steps):
                self._remark_on_threshold()
        if not self._is_idle and not batch.is_kept.any():
            self._is_idle = True
            metric = self._config.rollout.filter_metric
            log.warning("step %d: %s is uniform in every group, so the policy is not updated", step, metric)

    def at_end(self, plateau_step: int | None) -> None:
        """Warn of shaping that waited for a plateau until the end."""
        if plateau_step is None and waits_for_plateau(self._config.shaping):
            steps = self._config.steps
            log.warning("no plateau was detected in %d steps, so shaping that starts at the plateau stayed off", steps)

    def _remark_on_threshold(self) -> None:
        judged = [score for score in self._early if score.score is not None]
        if len({score.is_correct for score in judged}) == 1:
            values = [score.score for score in judged if score.score is not None]
            log.warning(
                "%s of the first %d responses is correct: their scores range from %g to %g, task.correct_at is %g",
                "every one" if judged[0].is_correct else "none",
                len(judged),
                min(values),
                max(values),
                self._config.task.correct_at,
            )
