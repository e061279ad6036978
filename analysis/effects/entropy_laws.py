"""Compare published formulas for the change of entropy at a token with the changes that updates made (E2, E3, E4).

The formulas, with their sources, are the macros of ``sql/staging/entropy_predictions.sql``. All correlations are within
steps, over tokens with after-update values. Two nulls apply:

- *Shuffle*: tokens of equal step, sign of the advantage, and probability exchange their changes. The expected
  correlation has a closed form, the covariance of the means of these cells, so nothing is drawn.
- *Random update*: the change depends on probability and entropy of the token and not on its advantage. Any such update
  moves entropies in a way that a property of the token predicts; the part that it would explain is the covariance of
  the means of cells of equal step, probability, and entropy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from entrace.analysis.effects.estimate import NoEffectError, count, fetch, plateau_level
from entrace.analysis.effects.potential import require_movement
from entrace.analysis.runs import Runs
from entrace.analysis.statistics.combination import MIN_BLOCKS
from entrace.analysis.statistics.estimates import Estimate

if TYPE_CHECKING:
    import polars as pl

Judged = Callable[[Runs, Sequence[str]], Estimate]

KEYS = ["run_id", "step", "prompt_id"]
# Predictions of the claims, by part. A shuffle cannot test a function of sign and probability.
SHUFFLED = ("covariance", "discriminator", "omega")
FORMULAS = (*SHUFFLED, "quadrants")
# A smaller mean square of predictions or changes is rounding.
MIN_VARIANCE = 1e-18


def beyond(null: str, predictor: str) -> Judged:
    """Return a judge of the correlation of a prediction with the measured change, minus that under a null.

    Args:
        null: ``shuffled`` or ``random``.
        predictor: Name in ``law_sums``.
    """

    def judge(runs: Runs, run_ids: Sequence[str]) -> Estimate:
        sums = of_predictor(runs, run_ids, predictor)
        return plateau_level(runs, sums, run_ids, [f"{null}_xy", "xx", "yy"], correlation)

    return judge


def more_than_entropy(predictor: str) -> Judged:
    """Return a judge of the squared correlation of a prediction minus that of the entropy before the update (E3)."""

    def judge(runs: Runs, run_ids: Sequence[str]) -> Estimate:
        sums = of_predictor(runs, run_ids, predictor)
        entropy = of_predictor(runs, run_ids, "entropy").select(*KEYS, entropy_xy="xy", entropy_xx="xx")
        joined = sums.join(entropy, on=KEYS)
        return plateau_level(runs, joined, run_ids, ["xy", "xx", "yy", "entropy_xy", "entropy_xx"], gain)

    return judge


def of_predictor(runs: Runs, run_ids: Sequence[str], predictor: str) -> pl.DataFrame:
    """Return the sums of one predictor on enough steps.

    Raises:
        NoEffectError: the run lacks what the predictor needs, has too few steps with after-update values, or its
            updates moved nothing by more than rounding.
    """
    import polars as pl

    frame = fetch(runs, "law_sums", run_ids).filter(predictor=predictor)
    require_movement(frame)
    for run in run_ids:
        part = frame.filter(run_id=run)
        steps = part["step"].unique().to_list()
        if len(steps) < MIN_BLOCKS:
            raise NoEffectError(
                f"run {run} has after-update values at {count(steps, 'step')}; a verdict needs {MIN_BLOCKS:g}: lower "
                "record.after_update_every, or train longer",
                is_recorded=True,
            )
        if not part.select(pl.min_horizontal(pl.sum("xx"), pl.sum("yy")) > MIN_VARIANCE * pl.sum("tokens")).item():
            raise NoEffectError(
                f"run {run}: predicted or measured changes do not vary between tokens", is_recorded=True
            )
    return frame


def correlation(totals: np.ndarray) -> np.ndarray:
    """Return a correlation; the totals are sums of x y, x^2, and y^2."""
    return totals[..., 0] / np.sqrt(totals[..., 1] * totals[..., 2])


def gain(totals: np.ndarray) -> np.ndarray:
    """Return a squared correlation minus another; the totals are x y, x^2, y^2, z y, and z^2."""
    return correlation(totals[..., :3]) ** 2 - correlation(totals[..., [3, 4, 2]]) ** 2
