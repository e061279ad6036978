"""Estimate functions of totals over prompts and steps.

Tokens of a response, and responses to a prompt, are drawn together, so prompts are the clusters. ``over_clusters``
treats prompts as independent. ``level`` also accounts for the steps, which share a drifting policy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from entrace.analysis.statistics.autocorrelation import MEASURED
from entrace.analysis.statistics.contrasts import contrast
from entrace.analysis.statistics.estimates import Estimate
from entrace.analysis.statistics.shares import bounded

# From totals, shape (..., values), to an effect, shape (...).
Effect = Callable[[np.ndarray], np.ndarray]


def level(
    steps: np.ndarray,
    prompts: np.ndarray,
    sums: np.ndarray,
    effect: Effect,
    of: str | None = None,
    persistence: tuple[float, ...] = MEASURED,
) -> Estimate:
    """Estimate an effect on totals over the steps of one run.

    The effect is linearized: the influence of a row is its sums times the gradient of the effect at the totals
    (infinitesimal jackknife). The influences summed by step form a series for ``contrast``, with the spread of the
    prompts within steps as noise. If prompts recur at several steps, the result is the wider of this interval and the
    interval over prompts.

    Args:
        steps: Step of each row, ``(rows,)``.
        prompts: Prompt or group of each row, integers.
        sums: Contribution of each row to the totals, ``(rows, values)``.
        effect: See ``Effect``; a homogeneous function of degree 0, such as a ratio.
        of: Name of the units.
        persistence: See ``contrast``.
    """
    totals = sums.sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(effect(totals))
    if not np.isfinite(value):
        return Estimate(value, np.nan, np.nan, 1.0, len(sums), of or "prompts", np.nan, 0.0, 0.0)
    influence = sums @ _gradient(effect, totals, np.abs(sums).sum(0))
    found, where = np.unique(steps, return_inverse=True)
    num_clusters = len(np.unique(prompts))
    of = of or f"prompts in {len(found)} steps"
    num_steps = len(found)
    if num_steps == 1:
        return replace(over_clusters(sums, prompts, effect, of), blocks=1.0)
    pairs = _pair(where, prompts)
    series, noise, noise_df = _series(*pairs, influence, num_steps)
    over_time = contrast(
        series * num_steps + value,
        np.ones((num_steps, 1)),
        np.full(num_steps, 1 / num_steps),
        steps=found,
        noise=None if noise is None else noise * num_steps**2,
        noise_df=noise_df,
        persistence=persistence,
        n=num_clusters,
        of=of,
    )
    # Influences of ratios add up to 0, so the series averages to the value up to rounding; the value is exact.
    over_time = over_time.moved_to(value)
    if num_clusters == len(pairs[0]):
        return over_time
    over_prompts = over_clusters(sums, prompts, effect, of)
    return over_time if over_prompts.width <= over_time.width else replace(over_prompts, blocks=over_time.blocks)


def step_values(
    steps: np.ndarray, prompts: np.ndarray, sums: np.ndarray, effect: Effect
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, float]:
    """Return an effect on the totals of each step as a series for ``contrast``.

    Arguments as for ``level``. Steps with an undefined effect are dropped.

    Returns:
        Steps, values, sampling variances of the values (None if unknown), and degrees of freedom of these variances.
    """
    found, where = np.unique(steps, return_inverse=True)
    totals, scales = np.zeros((2, len(found), sums.shape[1]))
    np.add.at(totals, where, sums)
    np.add.at(scales, where, np.abs(sums))
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.asarray(effect(totals), dtype=float)
    gradients = np.array([_gradient(effect, *row) for row in zip(totals, scales, strict=True)]).reshape(totals.shape)
    gradients = np.where(np.isfinite(gradients), gradients, 0.0)
    influence = (sums * gradients[where]).sum(1)
    _, noise, noise_df = _series(*_pair(where, prompts), influence, len(found))
    defined = np.isfinite(values)
    return found[defined], values[defined], None if noise is None else noise[defined], noise_df


def over_clusters(
    sums: np.ndarray, clusters: np.ndarray, effect: Effect, of: str, bounds: tuple[float, float] | None = None
) -> Estimate:
    """Estimate an effect on totals over independent clusters by the jackknife.

    The degrees of freedom are the effective number of clusters minus one. With m the last column of ``sums`` (a count)
    by cluster, that number is ``(sum m)^2 / sum m^2``: a few large clusters are worth less than many equal ones.

    Args:
        sums: Contribution of each row to the totals, ``(rows, values)``.
        clusters: Cluster of each row, ``(rows,)``.
        effect: See ``Effect``.
        of: Name of the units.
        bounds: Lowest and highest possible effect; see ``bounded``. None if unlimited.
    """
    _, where = np.unique(clusters, return_inverse=True)
    num = int(where.max()) + 1 if len(where) else 0
    by_cluster = np.zeros((num, sums.shape[1]))
    np.add.at(by_cluster, where, sums)
    totals = by_cluster.sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(effect(totals))
        without = effect(totals - by_cluster)
    without = without[np.isfinite(without)]
    size = by_cluster[:, -1]
    effective = float(size.sum() ** 2 / max((size**2).sum(), 1e-300))
    if len(without) < max(2, num - 1):
        return Estimate(value, -np.inf, np.inf, 1.0, num, of, np.nan, 0.0)
    left = len(without)
    error = float(np.sqrt((left - 1) / left * ((without - without.mean()) ** 2).sum()))
    if bounds is not None:
        return bounded(value, error, effective - 1, num, of, bounds)
    return Estimate.from_error(value, error, effective - 1, num, of)


def ratio(totals: np.ndarray) -> np.ndarray:
    """Return the first total divided by the second; an ``Effect``."""
    return totals[..., 0] / totals[..., 1]


def _pair(where: np.ndarray, prompts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the step of each distinct (step, prompt) pair, and each row's pair."""
    codes = np.unique(prompts, return_inverse=True)[1]
    width = int(codes.max()) + 1 if len(codes) else 1
    pairs, at = np.unique(where * width + codes, return_inverse=True)
    return pairs // width, at


def _series(
    step: np.ndarray, pair: np.ndarray, influence: np.ndarray, num_steps: int
) -> tuple[np.ndarray, np.ndarray | None, float]:
    """Return influences by step, their variance, and its degrees of freedom.

    The variance comes from the spread of prompts; it is None if every step has a single prompt. ``step`` and ``pair``
    as ``_pair`` returns them.
    """
    by_prompt = np.bincount(pair, influence, minlength=len(step))
    counts = np.bincount(step, minlength=num_steps)
    series = np.bincount(step, by_prompt, minlength=num_steps)
    squares = np.bincount(step, (by_prompt - (series / counts)[step]) ** 2, minlength=num_steps)
    several = counts > 1
    if not several.any():
        return series, None, 0.0
    noise = np.where(several, squares * counts / np.maximum(counts - 1, 1), np.nan)
    return series, np.where(several, noise, np.nanmean(noise)), float((counts - 1)[several].sum())


def _gradient(effect: Effect, totals: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return the gradient of an effect in the totals, by central differences.

    ``scale`` holds the sums of absolute contributions: a total of deviations, which is about 0, needs a step above the
    rounding error of the effect, and a small total of nonnegative values must not become negative.
    """
    size = np.maximum(np.abs(totals), 1e-3 * scale)
    size = np.where(size > 0, size, 1e-6 * np.abs(totals).max() + 1e-300)
    step = 1e-5 * size
    shifted = totals + np.diag(step), totals - np.diag(step)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (effect(shifted[0]) - effect(shifted[1])) / (2 * step)
