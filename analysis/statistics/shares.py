"""Compute intervals of bounded quantities, such as shares."""

from __future__ import annotations

import numpy as np

from entrace.analysis.statistics.estimates import CONFIDENCE, Estimate

# A smaller standard error is rounding.
NO_ERROR = 1e-9


def bounded(
    value: float, error: float, df: float, n: int, of: str, bounds: tuple[float, float] = (0.0, 1.0)
) -> Estimate:
    """Return an estimate whose interval stays within bounds and has a width even if all clusters agree.

    The interval is Student's t on the logit scale, mapped back. If the value is at a bound, or all clusters agree so
    that no error can be estimated, it is Wilson's score interval over the ``n`` clusters (J. Am. Stat. Assoc. 22, 1927)
    with Student's t in place of the normal quantile.

    Args:
        value: The estimate, within the bounds.
        error: Standard error; 0 if all clusters agree.
        df: Degrees of freedom of the error.
        n: Number of clusters.
        of: Name of the clusters.
        bounds: Lowest and highest possible value.
    """
    from scipy import special

    low, high = bounds
    span = high - low
    share = min(max((value - low) / span, 0.0), 1.0)
    if df <= 0 or not np.isfinite(error):
        return Estimate(value, low, high, 1.0, n, of, np.nan, 0.0)
    t = float(special.stdtrit(df, (1 + CONFIDENCE) / 2))
    relative = error / span
    zero = -low / span
    if relative <= NO_ERROR or share in (0.0, 1.0):
        center = (share + t**2 / (2 * n)) / (1 + t**2 / n)
        half = t / (1 + t**2 / n) * np.sqrt(share * (1 - share) / n + t**2 / (4 * n**2))
        ends = center - half, center + half
        # The p-value is that of the score test of 0, consistent with the interval.
        spread = np.sqrt(max(zero * (1 - zero), 0.0) / n)
        p_value = 2 * special.stdtr(df, -abs(share - zero) / spread) if spread > 0 else float(share == zero)
        error = max(error, span * half / t)
    else:
        half = t * relative / (share * (1 - share))
        ends = special.expit(special.logit(share) - half), special.expit(special.logit(share) + half)
        p_value = 2 * special.stdtr(df, -abs(value) / error)
    lower, upper = (float(low + span * min(max(end, 0.0), 1.0)) for end in ends)
    return Estimate(value, min(lower, value), max(upper, value), float(p_value), n, of, float(error), df)
