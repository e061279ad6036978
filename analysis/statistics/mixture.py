"""Summarize a mixture of Student's t distributions by an interval, an error, and degrees of freedom."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from entrace.analysis.statistics.estimates import CONFIDENCE, Estimate

# Mixture components of less weight do not affect an interval.
NEGLIGIBLE = 1e-6


def summarize_mixture(
    value: float, weights: np.ndarray, scale: np.ndarray, df: float | np.ndarray, n: int, of: str, blocks: float
) -> Estimate:
    """Summarize a mixture of t distributions that are centered at ``value`` and have the given ``scale``."""
    from scipy import special

    kept = weights > NEGLIGIBLE
    weights, scale = weights[kept] / weights[kept].sum(), scale[kept]
    df = np.broadcast_to(df, kept.shape)[kept]

    def below(x: float) -> float:
        return float(weights @ special.stdtr(df, x / scale))

    half = _solve(below, (1 + CONFIDENCE) / 2, float(scale.max()) * 40)
    one_sd = _solve(below, 0.841345, half)
    matched = _match_df(half / max(one_sd, 1e-300))
    error = half / float(special.stdtrit(matched, (1 + CONFIDENCE) / 2))
    p_value = 2 * (1 - below(abs(value)))
    p_value = float(min(max(p_value, 0.0), 1.0))
    return Estimate(value, value - half, value + half, p_value, n, of, error, matched, blocks)


def _solve(below: Callable[[float], float], level: float, high: float) -> float:
    """Return where a distribution function reaches ``level``, between 0 and ``high``."""
    from scipy import optimize

    if not below(high) > level:
        return high
    # Far fewer evaluations than bisection.
    found = optimize.root_scalar(lambda x: below(x) - level, bracket=(0.0, high), method="brentq", xtol=1e-300)
    return float(found.root)


def _match_df(tail: float) -> float:
    """Return the degrees of freedom of the t distribution with this ratio of its 97.5 % and 84.1345 % quantiles."""
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
