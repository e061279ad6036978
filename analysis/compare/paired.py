"""Estimate the paired difference between two arms, with its interval.

The interval is over prompts and seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from entrace.analysis.statistics.estimates import Estimate
from entrace.analysis.statistics.shares import NO_ERROR, bounded

PROMPTS_ONLY = "prompts only; other seeds not covered"
PROMPTS_AND_SEEDS = "prompts and seeds"
SEEDS_ONLY = "seeds"
ONE_PROMPT = "nothing; one seed and one prompt"
NOTHING = "nothing; one seed, and the metric has no prompts"

Bounds = tuple[float, float]


@dataclass(frozen=True)
class SeedSums:
    """Hold the measurements of the two runs of a pair, by prompt.

    Attributes:
        seed: Seed of both runs.
        prompts: Distinct integers that identify the prompts, also across seeds, (P,).
        sums: Total and count of each prompt in the run and in the baseline run, (P, 2 runs, 2). The value of a run is
            sum of totals / sum of counts.
        is_relative: The difference is run / baseline run - 1 instead of run - baseline run.
    """

    seed: int
    prompts: np.ndarray
    sums: np.ndarray
    is_relative: bool = False

    @cached_property
    def values(self) -> np.ndarray:
        """Return the values of the run and of the baseline run, (2,)."""
        totals = self.sums.sum(0)
        return totals[:, 0] / totals[:, 1]

    @property
    def difference(self) -> float:
        """Return run minus baseline run, or the relative difference."""
        run, baseline = self.values
        return float(run / baseline - 1 if self.is_relative else run - baseline)

    @cached_property
    def residuals(self) -> np.ndarray:
        """Return the influence of each prompt on the difference, (P,), with mean 0.

        If all counts are 1, the influence is the difference of the prompt minus that of the seed.
        """
        deviations = (self.sums[..., 0] - self.values * self.sums[..., 1]) / self.sums[..., 1].mean(0)
        run, baseline = self.values
        if self.is_relative:
            return (deviations[:, 0] - run / baseline * deviations[:, 1]) / baseline
        return deviations[:, 0] - deviations[:, 1]


@dataclass(frozen=True)
class Difference:
    """Hold the estimate of a difference.

    Attributes:
        estimate: Value, interval, p-value, standard error, and degrees of freedom.
        covers: Population of the interval.
        shared_variance: Part of the squared error due to prompts shared between seeds.
        bounds: Range of possible differences; None if unlimited.
    """

    estimate: Estimate
    covers: str
    shared_variance: float = 0.0
    bounds: Bounds | None = None

    def with_error(self, error: float, df: float) -> Difference:
        """Return the difference with another standard error."""
        old = self.estimate
        return replace(self, estimate=_t_interval(old.value, error, df, old.n, old.of, self.bounds))


def over_prompts_and_seeds(pairs: Sequence[SeedSums], bounds: Bounds | None = None) -> Difference:
    """Return the mean difference over seeds, with a 95% interval.

    The interval is clustered by prompt and by seed.

    For seed s with P_s prompts, theta_s = run - baseline run, and r_sp is the influence of prompt p on it. The estimate
    is the mean of theta_s over S seeds, with variance

        var(theta) / S + max(0, C),    C = mean over ordered pairs s != s' of
        sum over prompts p common to s and s' of r_sp r_s'p / sqrt(P_s (P_s - 1) P_s' (P_s' - 1)).

    The first term covers all variation between seeds. If each seed has prompts of its own, this includes the draw of
    prompts, and C is 0. Prompts shared between seeds move all their theta_s together, which the spread between seeds
    does not show; C estimates this covariance of two theta_s. The interval is Student's t with S - 1 degrees of
    freedom, which is conservative where C dominates.

    With one seed, the error is sd(r) / sqrt(P) with P - 1 degrees of freedom, over prompts only.

    Args:
        pairs: One per seed.
        bounds: Range of possible differences. If the differences of all seeds are equal, no error can be estimated. The
            interval is then that of ``shares.bounded``: over the prompts if all of them agree, otherwise over the
            seeds. Without bounds it is undefined.
    """
    differences = np.array([pair.difference for pair in pairs])
    prompts = len(np.unique(np.concatenate([pair.prompts for pair in pairs])))
    if len(pairs) == 1:
        error = float(np.std(pairs[0].residuals, ddof=1) / np.sqrt(prompts)) if prompts > 1 else np.nan
        covers = PROMPTS_ONLY if prompts > 1 else ONE_PROMPT
        return _difference(differences, error, prompts - 1, prompts, "prompts, 1 seed", covers, bounds, prompts)
    shared = max(0.0, _shared_variance(pairs))
    error = float(np.sqrt(np.var(differences, ddof=1) / len(pairs) + shared))
    prompts_agree = all(np.abs(pair.residuals).max() <= NO_ERROR for pair in pairs)
    agreeing = prompts if prompts_agree else len(pairs)
    of = f"prompts, {len(pairs)} seeds"
    found = _difference(differences, error, len(pairs) - 1, prompts, of, PROMPTS_AND_SEEDS, bounds, agreeing)
    return replace(found, shared_variance=shared)


def over_seeds(differences: np.ndarray, bounds: Bounds | None = None) -> Difference:
    """Return the mean of a quantity measured once per run, with its interval.

    The interval is over seeds only.
    """
    seeds = len(differences)
    error = float(np.std(differences, ddof=1) / np.sqrt(seeds)) if seeds > 1 else np.nan
    covers = SEEDS_ONLY if seeds > 1 else NOTHING
    return _difference(differences, error, seeds - 1, seeds, "seeds", covers, bounds, seeds)


def _shared_variance(pairs: Sequence[SeedSums]) -> float:
    """Return C of ``over_prompts_and_seeds``.

    The sum over pairs of seeds is, per prompt, the squared sum over seeds minus the sum of squares.
    """
    scaled = [pair.residuals / np.sqrt(len(pair.prompts) * max(len(pair.prompts) - 1, 1)) for pair in pairs]
    _, codes = np.unique(np.concatenate([pair.prompts for pair in pairs]), return_inverse=True)
    flat = np.concatenate(scaled)
    sums = np.bincount(codes, flat)
    return float((sums @ sums - flat @ flat) / (len(pairs) * (len(pairs) - 1)))


def _difference(
    differences: np.ndarray,
    error: float,
    df: float,
    n: int,
    of: str,
    covers: str,
    bounds: Bounds | None,
    agreeing: int,
) -> Difference:
    """Return the mean of ``differences``, with its interval.

    ``agreeing`` is the number of units if the error is 0.
    """
    value = float(differences.mean())
    if df <= 0 or error > NO_ERROR:
        return Difference(_t_interval(value, error, df, n, of, bounds), covers, bounds=bounds)
    if bounds is None:
        return Difference(Estimate(value, np.nan, np.nan, 1.0, n, of, np.nan, df), covers)
    estimate = bounded(value, 0.0, agreeing - 1, agreeing, of, bounds)
    return Difference(replace(estimate, n=n), covers, bounds=bounds)


def _t_interval(value: float, error: float, df: float, n: int, of: str, bounds: Bounds | None) -> Estimate:
    """Return Student's t interval, cut off at ``bounds``.

    The truth cannot lie beyond the bounds.
    """
    estimate = Estimate.from_error(value, error, df, n, of)
    if bounds is None or not np.isfinite(estimate.low):
        return estimate
    return replace(estimate, low=max(estimate.low, bounds[0]), high=min(estimate.high, bounds[1]))
