"""Expected rows per query on the trace of conftest.

``stem -> (params, columns, rows)``.
"""

from math import exp, inf, isfinite, log, sqrt

from scipy import stats

# A mean with the ends of its interval.
Interval = tuple[float, float | None, float | None]


def over_prompts(*prompts: tuple[float, float], low: float = -inf, high: float = inf) -> Interval:
    """Return the mean over prompts, given as (total, count), with its interval.

    There are two or more prompts. The computation is written out step by step. The error is that of the jackknife,
    which for two prompts is half the distance between their means. Student's t with the effective number of prompts, on
    the logit scale if both ends are bounded, and Wilson's score interval where the prompts agree.
    """
    total, count = sum(total for total, _ in prompts), sum(count for _, count in prompts)
    n, value = len(prompts), total / count
    without = [(total - own_total) / (count - own_count) for own_total, own_count in prompts]
    error = sqrt((n - 1) / n * sum((mean - sum(without) / n) ** 2 for mean in without))
    t = float(stats.t.ppf(0.975, count**2 / sum(own**2 for _, own in prompts) - 1))
    if not isfinite(high):
        return value, max(value - t * error, low), value + t * error
    share, span = (value - low) / (high - low), high - low
    if error < 1e-12:
        center, half = share + t**2 / 2 / n, t * sqrt(share * (1 - share) / n + (t / 2 / n) ** 2)
        ends = [low + span * end / (1 + t**2 / n) for end in (center - half, center + half)]
        return value, ends[0], ends[1]
    logit, half = log(share / (1 - share)), t * error / span / (share * (1 - share))
    ends = [low + span / (1 + exp(-end)) for end in (logit - half, logit + half)]
    return value, ends[0], ends[1]


def positive(*prompts: tuple[float, float]) -> Interval:
    """Return ``over_prompts`` for what cannot be negative."""
    return over_prompts(*prompts, low=0)


def share(*prompts: tuple[float, float]) -> Interval:
    """Return ``over_prompts`` for a share, of which a single prompt says nothing."""
    if len(prompts) > 1:
        return over_prompts(*prompts, low=0, high=1)
    return sum(total for total, _ in prompts) / sum(count for _, count in prompts), 0, 1


def alone(value: float) -> Interval:
    """Return a mean of a single prompt, which has no interval."""
    return value, None, None
