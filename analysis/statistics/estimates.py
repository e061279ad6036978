"""Estimates with their intervals: what SQL cannot say.

Tokens are nested in responses, prompts and runs, so every bootstrap here resamples prompts, runs or blocks of steps,
never tokens, and takes its random generator from the caller.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

DRAWS = 1000
# Numbers drawn at a time.
CHUNK = 1 << 20
CONFIDENCE = 0.95
LEVEL = (2.5, 97.5)
# Percentiles that lie one standard deviation from the middle of a normal distribution.
ONE_SD = (15.866, 84.134)
MIN_DEFINED = 0.95
# Beyond it a prior is as good as certain.
MAX_PRIOR_DF = 1e6


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, the p-value of zero, and how many of what stand behind it.

    Attributes:
        value: The estimate.
        low: Lower end of the interval.
        high: Upper end.
        p_value: Two-sided, of the hypothesis that the truth is 0, before any correction for multiple claims.
        n: Number of units behind the estimate.
        of: What these are.
        error: Standard error; nan where unknown.
        df: Its degrees of freedom.
        blocks: Effective number of independent steps, infinite where steps play no part.
    """

    value: float
    low: float
    high: float
    p_value: float
    n: int
    of: str
    error: float = np.nan
    df: float = np.nan
    blocks: float = np.inf

    @classmethod
    def from_error(cls, value: float, error: float, df: float, n: int, of: str, blocks: float = np.inf) -> Estimate:
        """Return Student's t interval and p-value from a standard error with ``df`` degrees of freedom.

        An error of 0 gives an interval without width, and p = 0 unless the value is 0 as well.
        """
        from scipy import stats

        if df <= 0:
            return cls(float(value), -np.inf, np.inf, 1.0, n, of, np.nan, 0.0, blocks)
        half = stats.t.ppf((1 + CONFIDENCE) / 2, df) * error
        p_value = 2 * stats.t.sf(abs(value) / error, df) if error > 0 else value == 0
        ends = float(value - half), float(value + half)
        return cls(float(value), *ends, float(p_value), n, of, float(error), float(df), blocks)

    def moved_to(self, value: float) -> Estimate:
        """Return the estimate with its interval around another value."""
        shift = value - self.value
        return replace(self, value=value, low=self.low + shift, high=self.high + shift)

    @classmethod
    def from_draws(cls, value: float, draws: np.ndarray, df: float, n: int, of: str) -> Estimate:
        """Interval and p-value from a bootstrap of ``df`` + 1 independent units.

        The standard error is half the distance between the percentiles one standard deviation from the middle, which
        a few wild draws of a ratio cannot spoil, times sqrt((df + 1) / df), since a bootstrap spreads as the
        population of its sample does. Undefined (nan, p = 1) where the statistic is undefined on over 5 % of draws.
        """
        finite = draws[np.isfinite(draws)]
        if finite.size < MIN_DEFINED * draws.size:
            return cls(float(value), np.nan, np.nan, 1.0, n, of)
        low, high = np.percentile(finite, ONE_SD)
        inflation = np.sqrt((df + 1) / df) if df > 0 else 1.0
        return cls.from_error(value, (high - low) / 2 * inflation, df, n, of)

    @property
    def width(self) -> float:
        """Width of the interval, infinite where it is undefined."""
        return np.inf if np.isnan(self.low) else self.high - self.low


def holm(p_values: Sequence[float]) -> np.ndarray:
    """P-values adjusted for being looked at together: the chance of any false rejection stays below the level.

    Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6 (1979). No assumption about
    how the tests depend on each other.

    Returns:
        Array of the same length and order, in [0, 1].
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return adjusted


def moderated_variances(variances: np.ndarray, df: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Variances drawn towards each other as far as they agree (Smyth, Stat. Appl. Genet. Mol. Biol. 3:3, 2004).

    True variances are taken to scatter as v_0 d_0 / chi^2_{d_0}. With e = ln v - psi(d / 2) + ln(d / 2), d_0 solves
    psi'(d_0 / 2) = var(e) - mean psi'(d / 2), and ln v_0 = mean(e) + psi(d_0 / 2) - ln(d_0 / 2). Where the v scatter no
    more than chance has them, d_0 is infinite and all become the pooled variance.

    Args:
        variances: Estimates, (A,), positive.
        df: Their degrees of freedom, (A,).

    Returns:
        (d_0 v_0 + d v) / (d_0 + d), and their degrees of freedom d_0 + d, at most the sum of all d.
    """
    from scipy import optimize
    from scipy.special import digamma, polygamma

    logs = np.log(variances) - digamma(df / 2) + np.log(df / 2)
    excess = np.var(logs, ddof=1) - polygamma(1, df / 2).mean() if len(logs) > 1 else 0.0
    if excess <= polygamma(1, MAX_PRIOR_DF / 2):
        pooled = float(variances @ df / df.sum())
        return np.full(len(variances), pooled), np.full(len(variances), df.sum())
    solution = optimize.root_scalar(lambda half: polygamma(1, half) - excess, bracket=(1e-8, MAX_PRIOR_DF))
    prior_df = 2 * float(solution.root)
    prior = np.exp(logs.mean() + digamma(prior_df / 2) - np.log(prior_df / 2))
    moderated = (prior_df * prior + df * variances) / (prior_df + df)
    return moderated, np.minimum(prior_df + df, df.sum())


def detectable(error: float, df: float, num_tests: int = 1, level: float = 0.05, power: float = 0.8) -> float:
    """Smallest true effect that a t test finds with probability ``power``, at the level ``level`` / ``num_tests``.

    That level is the first step of Holm's procedure, the strictest that an effect can meet. The effect is the
    noncentrality at which a noncentral t exceeds the critical value with that probability, times ``error``. With many
    degrees of freedom it is (t_{1 - a/2, df} + t_{power, df}) ``error``, which is too small for few seeds: by 5 % for
    three and one test, by 17 % for three and twenty tests.

    Args:
        error: Standard error of the estimate.
        df: Its degrees of freedom.
        num_tests: Tests judged together.
        level: Chance of any false rejection among them.
        power: Chance of finding the effect.

    Returns:
        In the unit of ``error``; infinite without a degree of freedom.
    """
    if df <= 0:
        return np.inf
    return _noncentrality(df, level / max(num_tests, 1), power) * error


@cache
def _noncentrality(df: float, level: float, power: float) -> float:
    """Mean, in standard errors, at which a two-sided t test rejects with probability ``power``."""
    from scipy import optimize, stats

    critical = stats.t.ppf(1 - level / 2, df)
    start = critical + stats.t.ppf(power, df)
    solution = optimize.root_scalar(
        lambda mean: stats.nct.sf(critical, df, mean) - power, bracket=(start / 2, 2 * start), method="brentq"
    )
    return float(solution.root)


def detectable_difference(
    sd: float, num_seeds: int, num_tests: int = 1, level: float = 0.05, power: float = 0.8
) -> float:
    """``detectable`` for a mean over seeds, before it is measured; infinite for one seed.

    Arms are taken to vary alike over seeds, so that they lend each other their ``num_seeds`` - 1 degrees of freedom
    each (``moderated_variances``).

    Args:
        sd: Standard deviation over seeds of the paired difference between two arms.
        num_seeds: Seeds of the design.
        num_tests: Differences judged together, such as the arms beside the baseline.
        level: Chance of any false rejection among them.
        power: Chance of finding the difference.

    Returns:
        In the unit of ``sd``.
    """
    df = max(num_tests, 1) * (num_seeds - 1)
    return detectable(sd / np.sqrt(num_seeds), df, num_tests, level, power)


def resample_clusters(sums: np.ndarray, rng: np.random.Generator, draws: int = DRAWS) -> np.ndarray:
    """Totals over clusters that were drawn with replacement.

    A statistic that is a function of totals is bootstrapped by applying it to what comes back. Runs compared on the
    same prompts stand on a later axis, so that a draw holds the same prompts for each of them: paired.

    Args:
        sums: What each cluster (prompt) contributes, shape ``(P, ...)``.
        rng: Source of randomness.
        draws: Number of bootstrap samples.

    Returns:
        Array of shape ``(draws, ...)``.
    """
    clusters = len(sums)
    flat = sums.reshape(clusters, -1)
    size = max(1, CHUNK // clusters)
    totals = [_draw_counts(clusters, min(size, draws - done), rng) @ flat for done in range(0, draws, size)]
    return np.concatenate(totals).reshape(draws, *sums.shape[1:])


def _draw_counts(clusters: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """How often each cluster is drawn, ``(draws, clusters)``; binning indices is far cheaper than multinomials."""
    drawn = rng.integers(0, clusters, (draws, clusters)) + clusters * np.arange(draws)[:, None]
    return np.bincount(drawn.ravel(), minlength=draws * clusters).reshape(draws, clusters).astype(float)


def block_length(length: int) -> int:
    """Steps in a block of a moving-block bootstrap of ``length`` steps: 1.5 n^(1/3), at most n."""
    return max(1, min(length, round(1.5 * length ** (1 / 3))))


def resample_blocks(length: int, rng: np.random.Generator, draws: int = DRAWS, block: int | None = None) -> np.ndarray:
    """Indices of a moving-block bootstrap of a series, blocks of ``block`` or else ``block_length``.

    Returns:
        Integers in ``[0, length)``, shape ``(length, draws)``.
    """
    block = block or block_length(length)
    starts = rng.integers(0, length - block + 1, size=(-(-length // block), draws))
    return (starts[:, None, :] + np.arange(block)[None, :, None]).reshape(-1, draws)[:length]


def avg_at_k(is_correct: Sequence[bool] | np.ndarray, k: int) -> float:
    """Mean correctness of the first ``k`` samples of one prompt."""
    return float(np.mean(is_correct[:k]))


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased probability that at least one of ``k`` samples is correct: 1 - C(n - c, k) / C(n, k).

    Chen et al. 2021, eq. 1. nan for ``k`` larger than ``num_samples``.
    """
    if k > num_samples:
        return float("nan")
    draws = np.arange(k)
    return float(1 - np.prod(np.maximum(num_samples - num_correct - draws, 0) / (num_samples - draws)))


def maj_at_k(
    answers: Sequence[str | None] | np.ndarray,
    is_correct: Sequence[bool | None] | np.ndarray,
    k: int,
    answer_classes: Sequence[str | None] | np.ndarray | None = None,
) -> float:
    """Return the correctness of the most frequent answer among the first ``k`` samples of one prompt.

    Correct answers share one vote. Wrong answers share a vote where they have the same class, or the same text if they
    have no class. A missing answer or an unknown correctness has no vote. Ties give the expected correctness of a fair
    draw; 0 without any vote.
    """
    classes = [None] * len(answers) if answer_classes is None else answer_classes
    votes: Counter[tuple[bool, str | None, str | None]] = Counter()
    for answer, correct, answer_class in zip(answers[:k], is_correct[:k], classes[:k], strict=True):
        if answer is not None and correct is not None:
            is_text = not correct and answer_class is None
            votes[bool(correct), None if correct else answer_class, answer if is_text else None] += 1
    most = max(votes.values(), default=0)
    tied = [correct for (correct, _, _), count in votes.items() if count == most]
    return float(np.mean(tied)) if tied else 0.0
