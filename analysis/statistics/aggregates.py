"""Compute the interquartile mean and the probability of improvement.

Both are computed as in rliable. Source: Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical
Precipice", NeurIPS 2021, arXiv 2108.13264. Scores are one array of runs per benchmark; benchmarks may have different
numbers of runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from entrace.analysis.statistics.estimates import LEVEL

DRAWS = 2000
TRIMMED = 0.25

Scores = Sequence[np.ndarray]


def iqm(scores: np.ndarray) -> np.ndarray:
    """Return the interquartile mean over the last axis.

    The lowest and the highest quarter, rounded down, are left out.
    """
    cut = int(TRIMMED * scores.shape[-1])
    return np.sort(scores, axis=-1)[..., cut : scores.shape[-1] - cut].mean(-1)


def iqm_interval(scores: Scores, rng: np.random.Generator, draws: int = DRAWS) -> tuple[float, float, float]:
    """Return the interquartile mean over runs x benchmarks with its 95% interval.

    The interval is the percentile interval of a stratified bootstrap, which draws runs with replacement within each
    benchmark. Its ends are nan if every benchmark has a single run.
    """
    resampled = np.concatenate([_resample(runs, rng, draws) for runs in scores], axis=1)
    return float(iqm(np.concatenate(scores))), *_ends(iqm(resampled), scores)


def improvement_interval(
    scores: Scores, others: Scores, rng: np.random.Generator, draws: int = DRAWS
) -> tuple[float, float, float]:
    """Return the probability that a run outscores another, with its 95% interval.

    This is P(X > Y) + P(X = Y) / 2 over all pairs of runs of a benchmark, averaged over benchmarks. The bootstrap draws
    the runs of both sides independently within each benchmark. The ends are nan as for ``iqm_interval``.

    Args:
        scores: Scores by benchmark.
        others: Scores of the other runs on the same benchmarks, in the same order.
        rng: Source of randomness.
        draws: Number of bootstrap samples.
    """
    value = _over_benchmarks(_improvement, scores, others)
    drawn = _over_benchmarks(
        lambda x, y: _improvement(_resample(x, rng, draws), _resample(y, rng, draws)), scores, others
    )
    return float(value), *_ends(drawn, [*scores, *others])


def _ends(drawn: np.ndarray, scores: Scores) -> tuple[float, float]:
    """Return the ends of the percentile interval of the draws."""
    if all(len(runs) < 2 for runs in scores):
        return float("nan"), float("nan")
    low, high = np.percentile(drawn, LEVEL)
    return float(low), float(high)


def _improvement(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the probability of improvement over the last axes of ``x`` and ``y``."""
    first, second = x[..., :, None], y[..., None, :]
    return ((first > second) + 0.5 * (first == second)).mean((-2, -1))


def _over_benchmarks(compare: Callable[..., np.ndarray], scores: Scores, others: Scores) -> np.ndarray:
    return np.mean([compare(x, y) for x, y in zip(scores, others, strict=True)], axis=0)


def _resample(runs: np.ndarray, rng: np.random.Generator, draws: int) -> np.ndarray:
    """Draw runs with replacement, shape ``(draws, runs)``."""
    return runs[rng.integers(0, len(runs), (draws, len(runs)))]
