"""Estimate the exchange of entropy for accuracy (E1).

The law is accuracy = -a exp(H) + b (arXiv 2505.22617).

Hard prompts have higher entropy and lower accuracy, so a batch of hard prompts moves both means even if the policy does
not change. Entropy and accuracy are therefore taken from different halves of a step's prompts, which share only the
policy. Any quantity that rises or falls throughout training also correlates with the step. The association is therefore
conditional on a straight line in the step, and the fit is compared with a smooth function of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from entrace.analysis.effects.estimate import NoEffectError, count, fetch, over_runs
from entrace.analysis.runs import Runs
from entrace.analysis.statistics.contrasts import contrast, draw_errors
from entrace.analysis.statistics.estimates import ONE_SD, Estimate
from entrace.analysis.statistics.stages import MIN_STEPS

if TYPE_CHECKING:
    import polars as pl

# Share of the variance of exp(entropy), given the step, that both halves must have in common.
MIN_RELIABILITY = 0.3
# Interior knots of the smooth function of the step.
NUM_KNOTS = 7
BOOTSTRAPS = 400
# Factor by which the systematic change of accuracy must exceed that of noise alone.
MIN_SIGNAL = 3.0
GOOD_FIT = 0.9


def association(runs: Runs, run_ids: Sequence[str]) -> Estimate:
    """Return a in accuracy = -a exp(H) + b + c step (E1).

    The estimate is corrected for the noise of exp(H).
    """
    return over_runs(fetch(runs, "exchange_halves", run_ids), run_ids, _association, "steps")


def captured(runs: Runs, run_ids: Sequence[str]) -> Estimate:
    """Return the share of accuracy change that the law captures, minus .9 (E1).

    Only the systematic change of accuracy counts.
    """
    return over_runs(fetch(runs, "exchange_halves", run_ids), run_ids, _captured, "steps")


def _association(run: str, part: pl.DataFrame) -> Estimate:
    steps, x, y = halves(run, part)
    line = np.column_stack((np.ones_like(steps), steps - steps[0]))
    detrended = x - line @ np.linalg.lstsq(line, x, rcond=None)[0]
    shared = float(detrended[:, 0] @ detrended[:, 1])
    reliability = shared / max(float((detrended**2).sum()) / 2, 1e-300)
    if reliability < MIN_RELIABILITY:
        raise NoEffectError(
            f"run {run}: apart from a straight line in the step, entropy moves no more than the noise of its prompts",
            is_recorded=True,
        )
    found = []
    for own, other in ((0, 1), (1, 0)):
        basis = np.column_stack((line, x[:, own]))
        weights = -np.linalg.pinv(basis)[2]
        found.append(contrast(y[:, other], basis, weights, steps=steps))
    value = float(np.mean([estimate.value for estimate in found])) / reliability
    # Both directions share their errors, so averaging does not reduce the error.
    error = float(np.mean([estimate.error for estimate in found])) / reliability
    df = min(estimate.df for estimate in found)
    blocks = min(estimate.blocks for estimate in found)
    return Estimate.from_error(value, error, df, len(steps), "steps", blocks=blocks)


def _captured(run: str, part: pl.DataFrame) -> Estimate:
    steps, x, y = halves(run, part)
    time = (steps - steps[0]) / (steps[-1] - steps[0])
    knots = np.linspace(0, 1, NUM_KNOTS + 2)[1:-1]
    basis = np.column_stack((np.ones_like(time), time, *(np.maximum(time - knot, 0) for knot in knots)))
    solver = np.linalg.pinv(basis)
    values = np.column_stack((x, y))
    smooth = basis @ (solver @ values)
    errors = draw_errors(values - smooth, basis, steps, BOOTSTRAPS, np.random.default_rng(0))
    smooth_errors = np.einsum("np,pm,msd->nsd", basis, solver, errors, optimize=True)
    noise = np.abs(_products(smooth_errors)[2])
    own, total = _captured_share(smooth[:, :, None])
    if total[0] < MIN_SIGNAL * np.quantile(noise, 0.95):
        raise NoEffectError(f"run {run}: accuracy moves no more than its noise", is_recorded=True)
    drawn, _ = _captured_share(smooth[:, :, None] + smooth_errors)
    low, high = np.percentile(drawn, ONE_SD)
    error = float(high - low) / 2
    return Estimate.from_error(float(own[0]) - GOOD_FIT, error, len(steps) - basis.shape[1], len(steps), "steps")


def halves(run: str, part: pl.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return steps, exp(entropy), and accuracy of both halves.

    The shapes are ``(n,)``, ``(n, 2)``, and ``(n, 2)``.

    Raises:
        NoEffectError: too few steps have prompts in both halves.
    """
    import polars as pl

    wide = part.with_columns(
        x=(pl.col("entropy_sum") / pl.col("tokens")).exp(), y=pl.col("correct") / pl.col("responses")
    ).pivot(on="half", index="step", values=["x", "y"])
    names = ["x_0", "x_1", "y_0", "y_1"]
    if set(names) <= set(wide.columns):
        wide = wide.drop_nulls(names).sort("step")
        if wide.height >= MIN_STEPS:
            values = wide.select(names).to_numpy()
            return wide["step"].cast(float).to_numpy(), values[:, :2], values[:, 2:]
    raise NoEffectError(
        f"run {run}: fewer than {count(range(MIN_STEPS), 'step')} with at least two prompts", is_recorded=True
    )


def _captured_share(smooth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the captured share and the total systematic change.

    ``smooth`` holds smooth series, ``(n, 4, draws)``. Sums of squares are products between halves, so noise does not
    inflate them.
    """
    squares, cross, total = _products(smooth)
    a = -cross / squares
    centered = smooth - smooth.mean(0)
    rest = centered[:, 2:] + a * centered[:, :2]
    return 1 - (rest[:, 0] * rest[:, 1]).sum(0) / total, total


def _products(smooth: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return products between halves, ``(draws,)`` each.

    The products are exp(entropy) twice, exp(entropy) and accuracy, and accuracy twice.
    """
    x, y = (smooth - smooth.mean(0))[:, :2], (smooth - smooth.mean(0))[:, 2:]
    cross = (x[:, 0] * y[:, 1] + x[:, 1] * y[:, 0]).sum(0) / 2
    return (x[:, 0] * x[:, 1]).sum(0), cross, (y[:, 0] * y[:, 1]).sum(0)
