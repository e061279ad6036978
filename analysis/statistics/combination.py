"""Combine the estimates of several runs, or of several benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from entrace.analysis.statistics.autocorrelation import VARIANCE_RATIOS
from entrace.analysis.statistics.estimates import Estimate
from entrace.analysis.statistics.mixture import summarize_mixture
from entrace.analysis.statistics.shares import bounded
from entrace.analysis.verdict_rules import MIN_RUNS

# Effective number of independent steps that a verdict needs.
MIN_BLOCKS = 3.0
# Prior weight of runs whose effects are equal, so that they differ by their errors alone.
ALIKE = 0.2
# Smallest error of a run relative to the root mean square over runs: a run whose steps all agree still has some.
MIN_RELATIVE_ERROR = 0.05
# Student's t with more degrees of freedom is normal.
MAX_DF = 1e9


def combine(estimates: Sequence[Estimate], of: str) -> Estimate:
    """Return the mean of the estimates of independent runs.

    The interval generalizes to other runs. True effects of R runs scatter with variance u, and each estimate has an
    error e, so the mean has variance sum(e^2 + u) / R^2. A few runs cannot determine u. The interval averages over its
    posterior, on a grid relative to the mean of e^2, by the likelihood of the residuals (see ``autocorrelation``).
    Errors within runs are added with Welch and Satterthwaite's degrees of freedom. Student's t over runs is used
    instead if the errors are negligible beside u. With at least ``MIN_RUNS`` runs, it is also used if an error is
    unknown or rests on fewer than ``MIN_BLOCKS`` effective steps.

    Args:
        estimates: One per run. A single estimate is returned unchanged, and applies to that run only.
        of: Name of the units of the mean.
    """
    if len(estimates) == 1:
        return replace(estimates[0], of=of)
    num = len(estimates)
    values = np.array([found.value for found in estimates])
    squares = np.array([found.error for found in estimates]) ** 2
    df = np.array([found.df for found in estimates])
    value, between = float(values.mean()), float(values.var(ddof=1))
    n = sum(found.n for found in estimates)
    blocks = min(found.blocks for found in estimates)
    is_known = bool(np.isfinite(squares).all() and (df > 0).all())
    unit = float(squares.mean())
    if num >= MIN_RUNS and (not is_known or blocks < MIN_BLOCKS):
        return Estimate.from_error(value, float(np.sqrt(between / num)), num - 1, n, of)
    if not is_known:
        return Estimate(value, -np.inf, np.inf, 1.0, n, of, np.nan, 0.0, blocks)
    if between >= unit * max(VARIANCE_RATIOS):
        return Estimate.from_error(value, float(np.sqrt(between / num)), num - 1, n, of, blocks=blocks)
    ratios = np.array((0.0, *VARIANCE_RATIOS))
    # A run with error 0 would make the likelihood at u = 0 degenerate.
    own = np.maximum(squares / unit, MIN_RELATIVE_ERROR**2)
    total = own + ratios[:, None]
    part = 1 / total
    center = (part @ values) / part.sum(1)
    fit = -0.5 * (np.log(total).sum(1) + np.log(part.sum(1)) + (part * (values - center[:, None]) ** 2).sum(1) / unit)
    weight = np.full(len(ratios), (1 - ALIKE) / len(VARIANCE_RATIOS))
    weight[0] = ALIKE
    weight *= np.exp(fit - fit.max())
    pooled = total.sum(1) ** 2 / (own**2 / np.minimum(df, MAX_DF)).sum()
    scale = np.sqrt(unit * total.sum(1)) / num
    return summarize_mixture(value, weight / weight.sum(), scale, pooled, n, of, blocks)


def mean_of_parts(estimates: Sequence[Estimate], of: str, bounds: tuple[float, float]) -> Estimate:
    """Return the unweighted mean of independent estimates.

    The interval is for the mean of these parts. Unlike the runs of ``combine``, parts such as benchmarks are not a
    sample from a population, so differences between them are not errors. The errors within parts are added with Welch
    and Satterthwaite's degrees of freedom. If the error of a part is unknown, the interval is ``bounds``.

    Args:
        estimates: One per part; a single estimate is returned unchanged.
        of: Name of the units of the mean; ``n`` is the sum over the parts.
        bounds: Lowest and highest possible value; see ``bounded``.
    """
    if len(estimates) == 1:
        return replace(estimates[0], of=of)
    squares = np.array([found.error for found in estimates]) ** 2
    df = np.array([found.df for found in estimates])
    value = float(np.mean([found.value for found in estimates]))
    n = sum(found.n for found in estimates)
    if not np.isfinite(squares).all() or (df <= 0).any():
        return bounded(value, np.nan, 0.0, n, of, bounds)
    pooled = float(squares.sum() ** 2 / (squares**2 / np.minimum(df, MAX_DF)).sum())
    return bounded(value, float(np.sqrt(squares.sum())) / len(estimates), pooled, n, of, bounds)
