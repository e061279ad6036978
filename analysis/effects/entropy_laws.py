"""Compare formulas for entropy changes with actual changes (E2, E3, E4, E5).

Published formulas predict the change of entropy at a token; updates make the actual change.

The formulas, with their sources, are the macros of ``sql/staging/entropy_predictions.sql``. E2 to E4 correlate
within steps, over tokens with after-update values. Two nulls apply, and leave no correlation between comparable tokens:

- *Shuffle*: tokens of equal step, sign of the advantage, and probability exchange their changes. Whatever a formula
  owes to sign and probability alone does not count.
- *Random update*: the change depends on probability and entropy of the token and not on its advantage, so that tokens
  of equal step, probability, and entropy exchange their changes.

A correlation between comparable tokens, unlike the excess of a correlation over that after a shuffle, can reach 1 if a
formula is right: the excess would be limited by the share of the variance within cells.

E5 compares changes from one evaluation to the next. Any two quantities that shrink or grow over training correlate, so
a smooth trend does not count. Neither does a change that the entropy before and the size of the updates predict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from entrace.analysis.effects.estimate import Estimator, NoEffectError, count, fetch, over_runs, plateau_level
from entrace.analysis.effects.potential import require_movement
from entrace.analysis.queries import NEEDS
from entrace.analysis.runs import Runs
from entrace.analysis.statistics.combination import MIN_BLOCKS
from entrace.analysis.statistics.estimates import Estimate
from entrace.analysis.statistics.partial import MIN_CHANGES, beyond_trend, to_correlation

if TYPE_CHECKING:
    import polars as pl


KEYS = ["run_id", "step", "prompt_id"]
# Predictions of the claims, by part. A shuffle cannot test a function of sign and probability.
SHUFFLED = ("covariance", "discriminator", "omega")
FORMULAS = (*SHUFFLED, "quadrants")
# A smaller mean square of predictions or changes is rounding.
MIN_VARIANCE = 1e-18


def beyond(null: str, predictor: str) -> Estimator:
    """Return an estimator of the correlation of prediction and change under a null.

    The correlation is between tokens that the null makes exchangeable.

    Args:
        null: ``shuffle`` or ``random``.
        predictor: Name in ``law_sums``.
    """

    def estimate(runs: Runs, run_ids: Sequence[str]) -> Estimate:
        sums = of_predictor(runs, run_ids, predictor, null)
        return plateau_level(runs, sums, run_ids, ["xy", "xx", "yy"], correlation)

    return estimate


def more_than_entropy(predictor: str) -> Estimator:
    """Return an estimator of the gain of a predictor over the entropy (E3).

    The gain is the signed square of the predictor's correlation minus the square for the entropy before the update.
    """

    def estimate(runs: Runs, run_ids: Sequence[str]) -> Estimate:
        sums = of_predictor(runs, run_ids, predictor, "overall")
        entropy = of_predictor(runs, run_ids, "entropy", "overall").select(*KEYS, entropy_xy="xy", entropy_xx="xx")
        joined = sums.join(entropy, on=KEYS)
        return plateau_level(runs, joined, run_ids, ["xy", "xx", "yy", "entropy_xy", "entropy_xx"], gain)

    return estimate


def between_evaluations(predictor: str) -> Estimator:
    """Return an estimator of forecast and measured change between evaluations (E5)."""

    def of_run(run: str, part: pl.DataFrame) -> Estimate:
        if part.height < MIN_CHANGES:
            raise NoEffectError(_too_few(run, part), is_recorded=True)
        found = beyond_trend(part)
        if found is None:
            raise NoEffectError(
                f"run {run}: entropy, or the change that the formula predicts, only follows a smooth trend",
                is_recorded=True,
            )
        return found

    def estimate(runs: Runs, run_ids: Sequence[str]) -> Estimate:
        frame = fetch(runs, "entropy_forecasts", run_ids).filter(predictor=predictor)
        return to_correlation(over_runs(frame, run_ids, of_run, "changes between evaluations"))

    return estimate


def _too_few(run: str, part: pl.DataFrame) -> str:
    """Return why a run has too few evaluations, and how many steps it would need."""
    between = part["num_updates"].mean()
    changes = count(range(part.height), "change")
    found = f"run {run} has {changes} of entropy between evaluations; a verdict needs {MIN_CHANGES}"
    at_least = f", at this distance {math.ceil(between * MIN_CHANGES)} steps" if isinstance(between, float) else ""
    return f"{found}{at_least}: lower eval.every, or train longer"


def of_predictor(runs: Runs, run_ids: Sequence[str], predictor: str, comparison: str) -> pl.DataFrame:
    """Return the sums of one predictor and comparison on enough steps.

    Raises:
        NoEffectError: the run lacks what the predictor needs, has too few steps with after-update values, or its
            updates moved nothing by more than rounding.
    """
    import polars as pl

    frame = fetch(runs, "law_sums", run_ids).filter(predictor=predictor, comparison=comparison)
    for run in run_ids:
        part = frame.filter(run_id=run)
        if part.is_empty():
            raise NoEffectError(NEEDS["gradient norms"].remedy)
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
    require_movement(frame)
    return frame


def correlation(totals: np.ndarray) -> np.ndarray:
    """Return a correlation; the totals are sums of x y, x^2, and y^2."""
    return totals[..., 0] / np.sqrt(totals[..., 1] * totals[..., 2])


def gain(totals: np.ndarray) -> np.ndarray:
    """Return the signed square of a correlation minus the square of another.

    The totals are x y, x^2, y^2, z y, and z^2. A prediction of the wrong sign explains less than nothing; the entropy
    before the update predicts no sign.
    """
    predicted = correlation(totals[..., :3])
    return predicted * np.abs(predicted) - correlation(totals[..., [3, 4, 2]]) ** 2
