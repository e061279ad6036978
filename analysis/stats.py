"""Estimates with their intervals: what SQL cannot say.

Tokens are nested in responses, prompts and runs, so every bootstrap here resamples prompts, runs or blocks of steps,
never tokens, and takes its random generator from the caller.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 1000
CHUNK = 100
LEVEL = (2.5, 97.5)
MIN_DEFINED = 0.95


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, and how many of what stand behind it."""

    value: float
    low: float
    high: float
    n: int
    of: str

    @classmethod
    def from_draws(cls, value: float, draws: np.ndarray, n: int, of: str) -> Estimate:
        """Percentile interval of the bootstrap ``draws``; nan where the statistic is undefined on over 5 % of them."""
        finite = draws[np.isfinite(draws)]
        low, high = np.percentile(finite, LEVEL) if finite.size >= MIN_DEFINED * draws.size else (np.nan, np.nan)
        return cls(float(value), float(low), float(high), n, of)


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
    totals = [
        rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=min(CHUNK, draws - done)) @ flat
        for done in range(0, draws, CHUNK)
    ]
    return np.concatenate(totals).reshape(draws, *sums.shape[1:])


def resample_blocks(length: int, rng: np.random.Generator, draws: int = DRAWS) -> np.ndarray:
    """Indices of a moving-block bootstrap of a series, blocks of 1.5 n^(1/3).

    Returns:
        Integers in ``[0, length)``, shape ``(length, draws)``.
    """
    block = max(1, min(length, round(1.5 * length ** (1 / 3))))
    starts = rng.integers(0, length - block + 1, size=(-(-length // block), draws))
    return (starts[:, None, :] + np.arange(block)[None, :, None]).reshape(-1, draws)[:length]


def interval_over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Student's t interval of the mean of one value a seed; unbounded for fewer than two."""
    from scipy import stats

    if len(values) < 2:
        return -np.inf, np.inf
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    mean = float(np.mean(values))
    return mean - float(half), mean + float(half)


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


def maj_at_k(answers: Sequence[str | None] | np.ndarray, is_correct: Sequence[bool] | np.ndarray, k: int) -> float:
    """Correctness of the most frequent answer among the first ``k`` samples of one prompt.

    A missing answer has no vote. Among tied answers the expected correctness of a fair draw. 0 without any answer.
    """
    votes: dict[str, list[bool]] = defaultdict(list)
    for answer, correct in zip(answers[:k], is_correct[:k], strict=True):
        if answer is not None:
            votes[answer].append(correct)
    most = max(map(len, votes.values()), default=0)
    tied = [np.mean(correct) for correct in votes.values() if len(correct) == most]
    return float(np.mean(tied)) if tied else 0.0
