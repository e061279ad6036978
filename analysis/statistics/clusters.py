"""Estimate functions of totals over prompts and steps.

Tokens of a response, and responses to a prompt, are drawn together, so prompts are the clusters. ``over_clusters``
treats prompts as independent. ``level`` also accounts for the steps, which share a drifting policy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from entrace.analysis.statistics.autocorrelation import MAX_STEPS, MEASURED, shorten, spacing_of
from entrace.analysis.statistics.contrasts import Errors, posterior_errors
from entrace.analysis.statistics.estimates import Estimate, Estimates
from entrace.analysis.statistics.shares import bounded

# From totals, shape (..., values), to an effect, shape (...).
Effect = Callable[[np.ndarray], np.ndarray]
# Lists whose mixtures of distributions are in memory at once: about 20 MB with 600 steps.
LISTS_AT_ONCE = 256


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
    order = np.lexsort((prompts, steps))
    steps, prompts, sums = steps[order], prompts[order], sums[order]
    found = levels(np.zeros(len(steps), dtype=int), 1, steps, prompts, sums, effect, persistence).one(
        0, of or "prompts"
    )
    if of or not np.isfinite(found.value):
        return found
    return replace(found, of=f"prompts in {int(_is_new(steps).sum())} steps")


def levels(
    lists: np.ndarray,
    num: int,
    steps: np.ndarray,
    prompts: np.ndarray,
    sums: np.ndarray,
    effect: Effect,
    persistence: tuple[float, ...] = MEASURED,
    *,
    with_errors: bool = True,
    with_p_values: bool = True,
) -> Estimates:
    """Return ``level`` of several lists of rows, all at once.

    Each list gives the same digits alone and among others.

    Args:
        lists: List of each row, ``(rows,)``, from 0; ascending.
        num: Number of lists L.
        steps: Step of each row, ascending within a list.
        prompts: Prompt of each row, ascending within a step of a list.
        sums: As in ``level``.
        effect: See ``Effect``.
        persistence: See ``contrasts.contrast``.
        with_errors: False to leave errors and degrees of freedom of lists of several steps as nan, which takes less
            time.
        with_p_values: False to leave the p-values of these lists as nan.
    """
    totals = _add(lists, sums, num)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.asarray(effect(totals), dtype=float)
    is_step = _is_new(lists, steps)
    is_pair = is_step | _is_new(prompts)
    list_of_step, list_of_pair = lists[is_step], lists[is_pair]
    num_steps, num_pairs = np.bincount(list_of_step, minlength=num), np.bincount(list_of_pair, minlength=num)
    # Pairs of step and prompt in the order of prompts show which prompts recur.
    by_prompt = np.lexsort((prompts[is_pair], list_of_pair))
    is_cluster = _is_new(list_of_pair[by_prompt], prompts[is_pair][by_prompt])
    list_of_cluster = list_of_pair[by_prompt][is_cluster]
    num_clusters = np.bincount(list_of_cluster, minlength=num)

    is_defined = np.isfinite(value)
    low, high, error = np.full((3, num), np.nan)
    n = np.where(is_defined, num_clusters, np.bincount(lists, minlength=num))
    found = Estimates(value, low, high, np.ones(num), n, error, np.zeros(num), np.zeros(num))
    pair, step = np.cumsum(is_pair) - 1, np.cumsum(is_step) - 1
    several = np.flatnonzero(is_defined & (num_steps > 1))
    if len(several):
        with np.errstate(invalid="ignore"):
            influence = (sums * _gradients(effect, totals, _add(lists, np.abs(sums), num))[lists]).sum(1)
        series = _series(step[is_pair], np.bincount(pair, influence), len(list_of_step))
        kept = {"with_errors": with_errors, "with_p_values": with_p_values}
        over_time = _over_steps(several, num, value, n, list_of_step, steps[is_step], *series, persistence, **kept)
        found.put(several, over_time)
    over = np.flatnonzero(is_defined & ((num_steps == 1) | (num_clusters < num_pairs)))
    if len(over):
        cluster = np.empty(len(by_prompt), dtype=int)
        cluster[by_prompt] = np.cumsum(is_cluster) - 1
        by_cluster = _add(cluster[pair], sums, len(list_of_cluster))
        place = np.full(num, -1)
        place[over] = np.arange(len(over))
        own = place[list_of_cluster] >= 0
        jackknife = _jackknives(place[list_of_cluster[own]], by_cluster[own], effect, len(over))
        blocks = np.where(num_steps[over] == 1, 1.0, found.blocks[over])
        over_prompts = Estimates.from_errors(*jackknife, blocks)
        is_wider = (num_steps[over] == 1) | ~(over_prompts.width <= found.width[over])
        found.put(over[is_wider], over_prompts.select(is_wider))
    return found


def step_values(
    steps: np.ndarray, prompts: np.ndarray, sums: np.ndarray, effect: Effect
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, float]:
    """Return an effect on the totals of each step as a series for ``contrast``.

    Arguments as for ``level``. Steps with an undefined effect are dropped.

    Returns:
        Steps, values, sampling variances of the values (None if unknown), and degrees of freedom of these variances.
    """
    order = np.lexsort((prompts, steps))
    steps, prompts, sums = steps[order], prompts[order], sums[order]
    is_step = _is_new(steps)
    is_pair, where = is_step | _is_new(prompts), np.cumsum(is_step) - 1
    num = int(is_step.sum())
    totals, scales = _add(where, sums, num), _add(where, np.abs(sums), num)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.asarray(effect(totals), dtype=float)
    gradients = _gradients(effect, totals, scales)
    influence = (sums * np.where(np.isfinite(gradients), gradients, 0.0)[where]).sum(1)
    pair = np.cumsum(is_pair) - 1
    _, noise, noise_df = _series(where[is_pair], np.bincount(pair, influence), num)
    is_defined = np.isfinite(values)
    noise = _filled(np.zeros(num, dtype=int), noise, 1)[is_defined] if noise_df.any() else None
    return steps[is_step][is_defined], values[is_defined], noise, float(noise_df.sum())


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
    by_cluster = _add(where, sums, int(where.max()) + 1 if len(where) else 0)
    value, error, df, n = _jackknives(np.zeros(len(by_cluster), dtype=int), by_cluster, effect, 1)
    if bounds is not None and np.isfinite(error[0]):
        return bounded(float(value[0]), float(error[0]), float(df[0]), int(n[0]), of, bounds)
    return Estimates.from_errors(value, error, df, n, np.full(1, np.inf)).one(0, of)


def ratio(totals: np.ndarray) -> np.ndarray:
    """Return the first total divided by the second; an ``Effect``."""
    return totals[..., 0] / totals[..., 1]


def _over_steps(
    lists: np.ndarray,
    num: int,
    value: np.ndarray,
    n: np.ndarray,
    list_of_step: np.ndarray,
    steps: np.ndarray,
    series: np.ndarray,
    noise: np.ndarray,
    noise_df: np.ndarray,
    persistence: tuple[float, ...],
    *,
    with_errors: bool,
    with_p_values: bool,
) -> Estimates:
    """Return ``contrasts.contrast`` of some of L lists, each of several steps.

    Args:
        lists: The lists.
        num: Number of lists L.
        value: Value of each list, ``(L,)``.
        n: Number of prompts of each list, ``(L,)``.
        list_of_step: List of each step, ``(S,)``, ascending.
        steps: Training steps, ``(S,)``.
        series: Sums of influences, ``(S,)``.
        noise: As ``_series`` returns it, ``(S,)``.
        noise_df: As ``_series`` returns it, ``(S,)``.
        persistence: See ``contrasts.contrast``.
        with_errors: See ``levels``.
        with_p_values: See ``levels``.
    """
    size = np.bincount(list_of_step, minlength=num)
    first = np.cumsum(size) - size
    y = series * size[list_of_step] + value[list_of_step]
    noise = _filled(list_of_step, noise, num) * size[list_of_step] ** 2
    noise_df = np.bincount(list_of_step, noise_df, num)

    def rows(some: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return values, basis, weights, noise, and steps of lists, shortened.

        The lists have equally many steps. Rows are contiguous: numpy adds up other rows in an order that depends on
        their number.
        """
        length = int(size[some[0]])
        at = first[some] + np.arange(length)[:, None]
        given = y[at], np.ones((length, 1)), np.full(length, 1 / length), noise[at], steps[at]
        values, basis, weights, variances, of_values = shorten(*given)
        assert variances is not None
        return np.ascontiguousarray(values.T), basis, weights, np.ascontiguousarray(variances.T), of_values.T

    # Lists of equally many steps at equal distances share their grid.
    spacing = np.empty(num)
    for length in np.unique(size[lists]):
        some = lists[size[lists] == length]
        spacing[some] = spacing_of(rows(some)[-1])
    order = np.lexsort((spacing[lists], size[lists]))
    found = Estimates(*np.full((8, len(lists)), np.nan))
    for start in range(0, len(lists), LISTS_AT_ONCE):
        places = order[start : start + LISTS_AT_ONCE]
        block = lists[places]
        errors = []
        for some in np.split(block, np.flatnonzero(_is_new(size[block], spacing[block]))[1:]):
            values, basis, weights, variances, _ = rows(some)
            given = values, basis, weights, float(spacing[some[0]]), variances, noise_df[some]
            errors.append(posterior_errors(*given, persistence))
        parts = np.minimum(size[block], MAX_STEPS).astype(float)
        found.put(places, Errors.joined(errors).estimates(value[block], n[block], parts, with_errors, with_p_values))
    return found


def _jackknives(
    lists: np.ndarray, by_cluster: np.ndarray, effect: Effect, num: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the jackknife of ``over_clusters`` of several lists.

    The results are values, errors, degrees of freedom, and numbers of clusters, ``(L,)`` each. Errors are nan and
    degrees of freedom 0 where clusters are too few.

    Args:
        lists: List of each cluster, ``(C,)``.
        by_cluster: Sums of each cluster, ``(C, values)``.
        effect: See ``Effect``.
        num: Number of lists L.
    """
    totals, size = _add(lists, by_cluster, num), by_cluster[:, -1]
    n = np.bincount(lists, minlength=num)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.asarray(effect(totals), dtype=float)
        without = np.asarray(effect(totals[lists] - by_cluster), dtype=float)
        is_left = np.isfinite(without)
        left = np.bincount(lists, is_left, num)
        # Differences from the value are exactly equal, and their errors exactly 0, where all clusters agree.
        change = np.where(is_left, without - np.where(np.isfinite(value), value, 0.0)[lists], 0.0)
        center = np.bincount(lists, change, num) / left
        squares = np.bincount(lists, np.where(is_left, change - center[lists], 0.0) ** 2, num)
        error = np.sqrt((left - 1) / left * squares)
    effective = np.bincount(lists, size, num) ** 2 / np.maximum(np.bincount(lists, size**2, num), 1e-300)
    is_known = left >= np.maximum(2, n - 1)
    return value, np.where(is_known, error, np.nan), np.where(is_known, effective - 1, 0.0), n


def _series(step: np.ndarray, by_prompt: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return influences by step, their variance, and its degrees of freedom.

    Each has shape ``(num,)``. The variance comes from the spread of prompts; it is nan for a single prompt.

    Args:
        step: Step of each pair of step and prompt.
        by_prompt: Influence of each pair.
        num: Number of steps.
    """
    counts = np.bincount(step, minlength=num)
    series = np.bincount(step, by_prompt, num)
    squares = np.bincount(step, (by_prompt - (series / counts)[step]) ** 2, num)
    return series, np.where(counts > 1, squares * counts / np.maximum(counts - 1, 1), np.nan), counts - 1.0


def _filled(lists: np.ndarray, noise: np.ndarray, num: int) -> np.ndarray:
    """Return noise with unknown values replaced by the mean of their list.

    The noise is nan if that of all steps of a list is unknown.
    """
    is_known = np.isfinite(noise)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(lists, np.where(is_known, noise, 0.0), num) / np.bincount(lists, is_known, num)
    return np.where(is_known, noise, mean[lists])


def _gradients(effect: Effect, totals: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return the gradients of an effect by central differences, ``(L, values)``.

    ``scales`` holds the sums of absolute contributions: a total of deviations, which is about 0, needs a step above the
    rounding error of the effect, and a small total of nonnegative values must not become negative.
    """
    size = np.maximum(np.abs(totals), 1e-3 * scales)
    size = np.where(size > 0, size, 1e-6 * np.abs(totals).max(1, keepdims=True) + 1e-300)
    step = 1e-5 * size
    shift = step[:, :, None] * np.eye(totals.shape[1])
    with np.errstate(divide="ignore", invalid="ignore"):
        return (effect(totals[:, None] + shift) - effect(totals[:, None] - shift)) / (2 * step)


def _add(where: np.ndarray, sums: np.ndarray, num: int) -> np.ndarray:
    """Return the sums of rows, ``(rows, values)``, by place, ``(num, values)``."""
    return np.column_stack([np.bincount(where, column, num) for column in sums.T])


def _is_new(*columns: np.ndarray) -> np.ndarray:
    """Return whether any column differs from the row before; true for the first row."""
    found = np.zeros(len(columns[0]), dtype=bool)
    found[:1] = True
    for column in columns:
        found[1:] |= column[1:] != column[:-1]
    return found
