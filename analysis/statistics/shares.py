"""Compute intervals of bounded quantities, such as shares."""

from __future__ import annotations

import numpy as np

from entrace.analysis.statistics.estimates import Estimate, t_p_value, t_quantile

# A smaller standard error is rounding.
NO_ERROR = 1e-9


def bounded(
    value: float, error: float, df: float, n: int, of: str, bounds: tuple[float, float] = (0.0, 1.0)
) -> Estimate:
    """Return an estimate whose interval stays within bounds.

    The interval has a width even if all clusters agree. The interval is Student's t on the logit scale, mapped back. If
    the value is at a bound, or all clusters agree so that no error can be estimated, it is Wilson's score interval over
    the ``n`` clusters (J. Am. Stat. Assoc. 22, 1927) with Student's t in place of the normal quantile.

    Args:
        value: The estimate, within the bounds.
        error: Standard error; 0 if all clusters agree.
        df: Degrees of freedom of the error.
        n: Number of clusters.
        of: Name of the clusters.
        bounds: Lowest and highest possible value.
    """
    low, high = bounds
    span = high - low
    if df <= 0 or not np.isfinite(error):
        return Estimate(value, low, high, 1.0, n, of, np.nan, 0.0)
    given = np.array(value), np.array(error), np.array(df), np.array(n)
    lower, upper = (float(end) for end in ends_within(*given, bounds))
    share = min(max((value - low) / span, 0.0), 1.0)
    p_value = float(t_p_value(value / error, df)) if error > 0 else 1.0
    if error / span <= NO_ERROR or share in (0.0, 1.0):
        # The p-value is that of the score test of 0, consistent with the interval.
        zero = -low / span
        spread = np.sqrt(max(zero * (1 - zero), 0.0) / n)
        p_value = float(t_p_value((share - zero) / spread, df)) if spread > 0 else float(share == zero)
        error = max(error, float(_score_half(share, df, n)) * span / float(t_quantile(df)))
    return Estimate(value, lower, upper, p_value, n, of, float(error), df)


def ends_within(
    value: np.ndarray, error: np.ndarray, df: np.ndarray, n: np.ndarray, bounds: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of the intervals of ``bounded``, from arrays of its arguments."""
    from scipy import special

    low, high = bounds
    share = np.clip((value - low) / (high - low), 0, 1)
    relative, t = error / (high - low), t_quantile(df)
    with np.errstate(divide="ignore", invalid="ignore"):
        half = t * relative / (share * (1 - share))
        logit = special.logit(share)
        center = (share + t**2 / (2 * n)) / (1 + t**2 / n)
        score = _score_half(share, df, n)
    is_score = (relative <= NO_ERROR) | (share == 0) | (share == 1)
    ends = (np.where(is_score, center + side * score, special.expit(logit + side * half)) for side in (-1, 1))
    is_known = (df > 0) & np.isfinite(error)
    lower, upper = (low + (high - low) * np.clip(np.where(is_known, end, i), 0, 1) for i, end in enumerate(ends))
    return np.where(is_known, np.minimum(lower, value), low), np.where(is_known, np.maximum(upper, value), high)


def _score_half(share: np.ndarray | float, df: np.ndarray | float, n: np.ndarray | int) -> np.ndarray:
    """Return half the width of Wilson's score interval."""
    t = t_quantile(df)
    return t / (1 + t**2 / n) * np.sqrt(share * (1 - share) / n + t**2 / (4 * n**2))
