"""Summarize mixtures of Student's t distributions.

The summary is an interval, an error, and degrees of freedom. Many mixtures at once cost little more than their
evaluations of Student's t; each gives the same digits alone and among others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from entrace.analysis.statistics.estimates import CONFIDENCE, Estimate, Estimates

# Mixture components of less weight do not affect an interval.
NEGLIGIBLE = 1e-6
# Relative length of a Newton step below which the series of the step is exact.
CLOSE = 3e-4
# Number of steps that may follow the series before plain Newton steps, and of steps after which the search ends.
MAX_SERIES, MAX_ITERATIONS = 10, 100
# Degrees of freedom beyond which the density of Student's t is that of the normal distribution, for a slope.
MAX_DF = 1e9
# Range of the degrees of freedom of a summary, and the relative step at which their search has converged.
MATCHED_DF, PRECISION = (1.0, 1e4), 1e-14
# Upper ends of a 95% interval and of one standard deviation, as levels of quantiles. The search for a quantile starts
# at the mean of the components' quantiles with this power: their root mean square, and about their geometric mean.
UPPER, ONE_SD = (1 + CONFIDENCE) / 2, 0.841345
START_POWER = {UPPER: 2.0, ONE_SD: 1e-3}


@dataclass(frozen=True)
class Mixtures:
    """Hold L mixtures of t distributions centered at 0.

    Attributes:
        weights: Weight of each component, ``(C,)``; those of a mixture are consecutive and add up to 1.
        scale: Scale of each component, ``(C,)``.
        df: Degrees of freedom of each component, ``(C,)``.
        peak: Weighted density of each component at its center, relative to its scale, ``(C,)``.
        sizes: Number of components of each mixture, ``(L,)``.
        starts: First component of each mixture, ``(L,)``.
    """

    weights: np.ndarray
    scale: np.ndarray
    df: np.ndarray
    peak: np.ndarray
    sizes: np.ndarray
    starts: np.ndarray

    def below(self, x: np.ndarray) -> np.ndarray:
        """Return the probability of values below ``x``, both ``(L,)``."""
        from scipy import special

        return np.add.reduceat(
            self.weights * special.stdtr(self.df, np.repeat(x, self.sizes) / self.scale), self.starts
        )

    def select(self, which: np.ndarray) -> Mixtures:
        """Return some of the mixtures; ``which`` has shape ``(L,)``, boolean."""
        own, sizes = np.repeat(which, self.sizes), self.sizes[which]
        columns = self.weights[own], self.scale[own], self.df[own], self.peak[own]
        return Mixtures(*columns, sizes, np.cumsum(sizes) - sizes)

    def steps(self, x: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return steps from ``x`` to quantiles of the levels, relative to ``x``.

        All have shape ``(L,)``. The first is Newton's. The second is the inverse of the Taylor series of the
        distribution to fourth order. The density f of Student's t with ``nu`` degrees of freedom satisfies
        (nu + x^2) f' = -(nu + 1) x f, which gives the terms f^(k) x^(k + 1) / k! by recursion.
        """
        from scipy import special

        df, ratio = np.minimum(self.df, MAX_DF), np.repeat(x, self.sizes) / self.scale
        square = ratio * ratio
        rate = -square / (df + square)
        terms = np.empty((5, len(df)))
        terms[0] = self.weights * special.stdtr(self.df, ratio)
        terms[1] = self.peak * ratio * np.exp((df + 1) / -2 * np.log1p(square / df))
        terms[2] = rate * (df + 1) * terms[1]
        terms[3] = rate * ((df + 3) * terms[2] + (df + 1) * terms[1])
        terms[4] = rate * ((df + 5) * terms[3] / 2 + (df + 2) * terms[2])
        below, slope, *others = np.add.reduceat(terms, self.starts, axis=1)
        newton = (levels - below) / slope
        # Divided by 2, by 2 * 3, and by 3 * 4: factors of the recursion and of the integral.
        a, b, c = others[0] / (2 * slope), others[1] / (6 * slope), others[2] / (12 * slope)
        series = newton * (1 + newton * (-a + newton * (2 * a * a - b + newton * (5 * a * (b - a * a) - c))))
        return newton, series


def summarize_mixture(
    value: float, weights: np.ndarray, scale: np.ndarray, df: float | np.ndarray, n: int, of: str, blocks: float
) -> Estimate:
    """Summarize a mixture of t distributions centered at ``value``.

    Each distribution has its own ``scale`` and weight.
    """
    given = np.array([value]), weights[None], scale[None], np.atleast_1d(df)[None], np.array([n]), np.array([blocks])
    return summarize_mixtures(*given).one(0, of)


def summarize_mixtures(
    values: np.ndarray,
    weights: np.ndarray,
    scale: np.ndarray,
    df: np.ndarray,
    n: np.ndarray,
    blocks: np.ndarray,
    *,
    with_errors: bool = True,
    with_p_values: bool = True,
) -> Estimates:
    """Summarize L mixtures of t distributions; see ``summarize_mixture``.

    Args:
        values: Centers, ``(L,)``.
        weights: Weights, ``(L, K)``; those of a mixture add up to 1.
        scale: Scales, ``(L, K)``.
        df: Degrees of freedom, ``(L, K)``, or ``(L, 1)`` if equal within each mixture.
        n: Number of units behind each estimate, ``(L,)``.
        blocks: Effective number of independent steps, ``(L,)``.
        with_errors: False to leave errors and degrees of freedom as nan, which takes less time.
        with_p_values: False to leave p-values as nan, which takes less time.
    """
    from scipy import special

    kept = weights > NEGLIGIBLE
    sizes = kept.sum(1)

    def flat(rows: np.ndarray) -> np.ndarray:
        return np.repeat(rows[:, 0], sizes) if rows.shape[1] == 1 else rows[kept]

    own = weights[kept] / np.repeat((weights * kept).sum(1), sizes)
    slope_df = np.minimum(df, MAX_DF)
    peak = own * flat(special.poch(slope_df / 2, 0.5) / np.sqrt(np.pi * slope_df))
    mixtures = Mixtures(own, scale[kept], flat(df), peak, sizes, np.cumsum(sizes) - sizes)
    levels = (UPPER, ONE_SD) if with_errors else (UPPER,)
    half, *others = _quantiles(mixtures, levels, [flat(special.stdtrit(df, level)) for level in levels])
    error = matched = p_value = np.full(half.shape, np.nan)
    if with_errors:
        tails = np.round(half / np.maximum(others[0], 1e-300), 3)
        matched = np.array([_match_df(tail) for tail in tails.tolist()])
        error = half / special.stdtrit(matched, UPPER)
    if with_p_values:
        p_value = np.minimum(np.maximum(2 * (1 - mixtures.below(np.abs(values))), 0.0), 1.0)
    return Estimates(values, values - half, values + half, p_value, n, error, matched, blocks)


def _quantiles(mixtures: Mixtures, levels: tuple[float, ...], unit: Sequence[np.ndarray]) -> np.ndarray:
    """Return quantiles of L mixtures, ``(levels, L)``.

    A symmetric mixture is concave above its center, so a Newton step from any point ends below the solution.

    Args:
        mixtures: The mixtures.
        levels: Keys of ``START_POWER``.
        unit: Quantile by level of each component of scale 1, ``(C,)``.
    """
    num = len(mixtures.sizes)
    # All levels at once, as mixtures of their own.
    weights, scale, df, peak, sizes = (
        np.concatenate([column] * len(levels))
        for column in (mixtures.weights, mixtures.scale, mixtures.df, mixtures.peak, mixtures.sizes)
    )
    mixtures = Mixtures(weights, scale, df, peak, sizes, np.cumsum(sizes) - sizes)
    level, power = np.repeat(levels, num), np.repeat([START_POWER[level] for level in levels], num)
    found = np.concatenate(unit) * mixtures.scale
    low, high = np.minimum.reduceat(found, mixtures.starts), np.maximum.reduceat(found, mixtures.starts)
    powers = (found / np.repeat(high, mixtures.sizes)) ** np.repeat(power, mixtures.sizes)
    x = high * np.add.reduceat(mixtures.weights * powers, mixtures.starts) ** (1 / power)
    x = np.minimum(np.maximum(x, low), high)
    searched = np.arange(len(x))
    for i in range(MAX_ITERATIONS):
        at = x[searched]
        newton, series = mixtures.steps(at, level[searched])
        is_close, moved = np.abs(newton) <= CLOSE, at * (1 + series)
        if is_close.all():
            x[searched] = moved
            break
        lower = np.maximum(low[searched], at * (1 + newton))
        upper = np.where(newton < 0, at, high[searched])
        is_within = (moved >= lower) & (moved <= upper) & (i < MAX_SERIES)
        x[searched] = np.where(is_close | is_within, moved, lower)
        low[searched], high[searched] = lower, upper
        if is_close.any():
            searched, mixtures = searched[~is_close], mixtures.select(~is_close)
    return x.reshape(-1, num)


@lru_cache(maxsize=4096)
def _match_df(tail: float) -> float:
    """Return the degrees of freedom of the t distribution with this tail ratio.

    The ratio is that of the 97.5% and 84.1345% quantiles.
    """
    from scipy import special

    def excess(inverse: float) -> float:
        return float(special.stdtrit(1 / inverse, UPPER) / special.stdtrit(1 / inverse, ONE_SD)) - tail

    # The ratio is nearly linear in one over the degrees of freedom, so that the secants of regula falsi are close. An
    # end that stays has its excess halved (the Illinois rule), so that both ends approach the solution.
    (low, high), former = 1 / np.array(MATCHED_DF[::-1]), np.inf
    below, above = excess(low), excess(high)
    if below >= 0 or above <= 0:
        return float(1 / (low if below >= 0 else high))
    inverse, is_above = low, None
    for _ in range(MAX_ITERATIONS):
        if abs(inverse - former) <= PRECISION * inverse:
            break
        former, inverse = inverse, (low * above - high * below) / (above - below)
        found = excess(inverse)
        was_above, is_above = is_above, found > 0
        if is_above:
            high, above, below = inverse, found, below / 2 if was_above is True else below
        else:
            low, below, above = inverse, found, above / 2 if was_above is False else above
    return float(1 / inverse)
