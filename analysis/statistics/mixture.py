"""Summarize a mixture of Student's t distributions.

The summary is an interval, an error, and degrees of freedom.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from entrace.analysis.statistics.estimates import CONFIDENCE, Estimate

# Mixture components of less weight do not affect an interval.
NEGLIGIBLE = 1e-6
# Relative step at which Newton's method has converged, and the number of steps after which it ends regardless.
PRECISION, MAX_ITERATIONS = 1e-14, 100
# Degrees of freedom beyond which the density of Student's t is that of the normal distribution, for a slope.
MAX_DF = 1e6


def summarize_mixture(
    value: float, weights: np.ndarray, scale: np.ndarray, df: float | np.ndarray, n: int, of: str, blocks: float
) -> Estimate:
    """Summarize a mixture of t distributions centered at ``value``.

    Each distribution has its own ``scale`` and weight.
    """
    from scipy import special

    kept = weights > NEGLIGIBLE
    weights, scale = weights[kept] / weights[kept].sum(), scale[kept]
    df = np.broadcast_to(df, kept.shape)[kept]

    # Of the density of Student's t.
    slope_df = np.minimum(df, MAX_DF)
    constant = np.exp(special.gammaln((slope_df + 1) / 2) - special.gammaln(slope_df / 2)) / np.sqrt(np.pi * slope_df)

    def below(x: float) -> float:
        return float(weights @ special.stdtr(df, x / scale))

    def density(x: float) -> float:
        logs = -(slope_df + 1) / 2 * np.log1p((x / scale) ** 2 / slope_df)
        return float(weights @ (constant / scale * np.exp(logs)))

    def quantile(level: float) -> float:
        """Solve ``below(x) = level`` for a level above 1/2."""
        quantiles = special.stdtrit(df, level) * scale
        smallest, x = float(quantiles.min()), float(weights @ quantiles)
        # A symmetric mixture is concave above its center, so Newton's method from below never passes the solution.
        for _ in range(MAX_ITERATIONS):
            former, x = x, max(x + (level - below(x)) / density(x), smallest)
            if abs(x - former) <= PRECISION * x:
                break
        return x

    half = quantile((1 + CONFIDENCE) / 2)
    one_sd = quantile(0.841345)
    matched = _match_df(half / max(one_sd, 1e-300))
    error = half / float(special.stdtrit(matched, (1 + CONFIDENCE) / 2))
    p_value = 2 * (1 - below(abs(value)))
    p_value = float(min(max(p_value, 0.0), 1.0))
    return Estimate(value, value - half, value + half, p_value, n, of, error, matched, blocks)


def _match_df(tail: float) -> float:
    """Return the degrees of freedom of the t distribution with this tail ratio.

    The ratio is that of the 97.5% and 84.1345% quantiles.
    """
    return _match_df_rounded(round(tail, 3))


@lru_cache(maxsize=4096)
def _match_df_rounded(tail: float) -> float:
    from scipy import special

    low, high = 0.0, 4.0
    for _ in range(50):
        middle = (low + high) / 2
        df = 10**middle
        found = special.stdtrit(df, (1 + CONFIDENCE) / 2) / special.stdtrit(df, 0.841345)
        low, high = (middle, high) if found > tail else (low, middle)
    return float(10 ** ((low + high) / 2))
