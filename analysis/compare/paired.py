"""The paired difference between two arms, with an interval over prompts and over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from analysis.stats import Estimate

PROMPTS_ONLY = "prompts only; other seeds not covered"
PROMPTS_AND_SEEDS = "prompts and seeds"
SEEDS_ONLY = "seeds"
NOTHING = "nothing; one seed, and no prompts to stand for others"
# Below it a standard error is rounding, in units of accuracy, tokens or steps alike.
NO_ERROR = 1e-12


@dataclass(frozen=True)
class SeedSums:
    """What the two runs of a pair measured, by prompt.

    Attributes:
        seed: Of both runs.
        prompts: Integers that name the prompts, each once; equal ones are the same prompt in other seeds too, (P,).
        sums: Total and count of each prompt in the run and in the baseline run, (P, 2 runs, 2). The value of a run is
            sum of totals / sum of counts.
    """

    seed: int
    prompts: np.ndarray
    sums: np.ndarray

    @cached_property
    def values(self) -> np.ndarray:
        """Value of the run and of the baseline run, (2,)."""
        totals = self.sums.sum(0)
        return totals[:, 0] / totals[:, 1]

    @property
    def difference(self) -> float:
        """Run minus baseline run."""
        return float(self.values[0] - self.values[1])

    @cached_property
    def residuals(self) -> np.ndarray:
        """Influence of each prompt on the difference, (P,), mean 0.

        Where every prompt counts once it is the prompt's own difference minus that of the seed.
        """
        deviations = (self.sums[..., 0] - self.values * self.sums[..., 1]) / self.sums[..., 1].mean(0)
        return deviations[:, 0] - deviations[:, 1]


@dataclass(frozen=True)
class Difference:
    """An estimate with what its interval was made from.

    Attributes:
        estimate: Value, interval and p-value.
        error: Standard error.
        df: Its degrees of freedom.
        covers: What the interval stands for.
        shared_variance: Part of the squared error that prompts shared between seeds add.
    """

    estimate: Estimate
    error: float
    df: float
    covers: str
    shared_variance: float = 0.0


def over_prompts_and_seeds(pairs: Sequence[SeedSums]) -> Difference:
    """Mean difference over seeds, 95 % interval clustered by prompt and by seed.

    Per seed s: theta_s = run - baseline run, r_sp = influence of prompt p on it, P_s prompts. The estimate is the mean
    of theta_s over S seeds, and its variance

        var(theta) / S + max(0, C),    C = mean over ordered pairs s != s' of
        sum over prompts p common to s and s' of r_sp r_s'p / sqrt(P_s (P_s - 1) P_s' (P_s' - 1)).

    The first term holds all that differs from seed to seed, the draw of prompts included where each seed has its own:
    then C is 0. Prompts that several seeds share move all their theta_s together, which no spread between seeds shows;
    C estimates that part, the covariance of two theta_s. Interval: Student's t with S - 1 degrees of freedom, which
    errs on the wide side where C dominates.

    One seed: sd(r) / sqrt(P) with P - 1 degrees of freedom, over prompts only.
    """
    differences = np.array([pair.difference for pair in pairs])
    if len(pairs) == 1:
        prompts = len(pairs[0].prompts)
        error = float(np.std(pairs[0].residuals, ddof=1) / np.sqrt(prompts)) if prompts > 1 else np.nan
        return _difference(differences, error, prompts - 1, prompts, "prompts, 1 seed", PROMPTS_ONLY)
    shared = max(0.0, _shared_variance(pairs))
    error = float(np.sqrt(np.var(differences, ddof=1) / len(pairs) + shared))
    prompts = len(np.unique(np.concatenate([pair.prompts for pair in pairs])))
    of = f"prompts, {len(pairs)} seeds"
    found = _difference(differences, error, len(pairs) - 1, prompts, of, PROMPTS_AND_SEEDS)
    return replace(found, shared_variance=shared)


def over_seeds(differences: np.ndarray) -> Difference:
    """The same for what is measured once a run, from the spread between seeds alone."""
    seeds = len(differences)
    error = float(np.std(differences, ddof=1) / np.sqrt(seeds)) if seeds > 1 else np.nan
    return _difference(differences, error, seeds - 1, seeds, "seeds", SEEDS_ONLY if seeds > 1 else NOTHING)


def _shared_variance(pairs: Sequence[SeedSums]) -> float:
    """C of ``over_prompts_and_seeds``: by prompt, the square of the sum over seeds minus the sum of squares."""
    scaled = [pair.residuals / np.sqrt(len(pair.prompts) * max(len(pair.prompts) - 1, 1)) for pair in pairs]
    _, codes = np.unique(np.concatenate([pair.prompts for pair in pairs]), return_inverse=True)
    flat = np.concatenate(scaled)
    sums = np.bincount(codes, flat)
    return float((sums @ sums - flat @ flat) / (len(pairs) * (len(pairs) - 1)))


def _difference(differences: np.ndarray, error: float, df: float, n: int, of: str, covers: str) -> Difference:
    value = float(differences.mean())
    if df > 0 and error <= NO_ERROR:
        if abs(value) > NO_ERROR:
            # Equal throughout, as on few prompts that are always solved: no error can be estimated, and none is not it.
            return Difference(Estimate(value, np.nan, np.nan, 1.0, n, of), np.nan, df, covers)
        value, error = 0.0, 0.0
    return Difference(Estimate.from_error(value, error, df, n, of), error, df, covers)
