"""Detect during training that a run has left its rising stage."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from entrace.trainer.settings import AtLeastTwo, BaseConfig, Fraction


class PlateauConfig(BaseConfig):
    """When the plateau counts as reached; see ``PlateauDetector``."""

    window_steps: AtLeastTwo = 10
    tolerance: Fraction = 0.1


class PlateauDetector:
    """Compare the last two windows of steps, for both entropy and accuracy.

    With m_0 the mean over the run's first ``window_steps`` steps, m_1 over the last but one window and m_2 over the
    last, a curve is flat when |m_2 - m_1| <= tolerance * |m_2 - m_0|: the latest window added at most the tolerated
    share of all change since the start. The plateau begins at the step after the first one at which both curves are
    flat. It needs three windows of history, so that a start without change is not a plateau.
    """

    def __init__(self, config: PlateauConfig, history: Sequence[tuple[float, float]] = ()) -> None:
        """Replay ``history``, the (entropy, accuracy) of the steps already done."""
        self.config = config
        self.history: list[tuple[float, float]] = []
        self.plateau_step: int | None = None
        for entropy, accuracy in history:
            self.update(entropy, accuracy)

    def update(self, entropy: float, accuracy: float) -> None:
        """Add one finished step."""
        self.history.append((entropy, accuracy))
        if self.plateau_step is None and self._is_flat():
            self.plateau_step = len(self.history) + 1

    def _is_flat(self) -> bool:
        width = self.config.window_steps
        if len(self.history) < 3 * width:
            return False
        curves = np.array(self.history)
        first, before, last = (part.mean(0) for part in (curves[:width], curves[-2 * width : -width], curves[-width:]))
        return bool((np.abs(last - before) <= self.config.tolerance * np.abs(last - first)).all())
