"""Test the paired difference and its interval.

References are naive loops, and the coverage of a known truth.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from entrace.analysis.compare.paired import SeedSums, over_prompts_and_seeds, over_seeds


def seed_sums(seed: int, prompts: Sequence[int] | np.ndarray, differences: np.ndarray) -> SeedSums:
    sums = np.ones((len(differences), 2, 2))
    sums[:, 0, 0] = 0.5 + differences
    sums[:, 1, 0] = 0.5
    return SeedSums(seed, np.array(prompts, dtype=np.uint64), sums)


def test_variance_against_a_naive_double_loop():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=12)
    prompts = [[0, 1, 2, 3, 4, 5], [3, 4, 5, 6, 7], [0, 5, 7, 8, 9, 10, 11]]
    pairs = [seed_sums(s, ids, 0.3 + shared[ids] + 0.1 * rng.normal(size=len(ids))) for s, ids in enumerate(prompts)]
    thetas = [pair.sums[:, 0, 0].mean() - 0.5 for pair in pairs]
    covariances = []
    for s, one in enumerate(pairs):
        for t, two in enumerate(pairs):
            if s == t:
                continue
            total = 0.0
            for i, p in enumerate(prompts[s]):
                for j, q in enumerate(prompts[t]):
                    if p == q:
                        r, r_other = one.sums[i, 0, 0] - 0.5 - thetas[s], two.sums[j, 0, 0] - 0.5 - thetas[t]
                        sizes = len(prompts[s]) * (len(prompts[s]) - 1) * len(prompts[t]) * (len(prompts[t]) - 1)
                        total += r * r_other / sizes**0.5
            covariances.append(total)
    assert np.mean(covariances) > 0
    found = over_prompts_and_seeds(pairs)
    estimate = found.estimate
    assert estimate.error**2 == pytest.approx(np.var(thetas, ddof=1) / 3 + np.mean(covariances))
    assert (estimate.df, estimate.value, estimate.n) == (2, pytest.approx(np.mean(thetas)), 12)


@pytest.mark.parametrize("is_relative", [False, True])
def test_influence_equals_the_jackknife_of_a_ratio(is_relative: bool):
    sums = np.random.default_rng(1).integers(1, 50, (200, 2, 2)).astype(float)
    pair = SeedSums(0, np.arange(200, dtype=np.uint64), sums, is_relative)
    without = [SeedSums(0, pair.prompts[1:], np.delete(sums, i, 0), is_relative).difference for i in range(200)]
    jackknife = 199 * (pair.difference - np.array(without))
    assert pair.residuals.mean() == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(pair.residuals, jackknife, rtol=0.05, atol=0.02)


def coverage(num_seeds: int, is_crossed: bool, of_prompts: float, of_seeds: float, noise: float) -> float:
    """Return the coverage of a mean difference of .03 with 50 prompts per seed.

    ``of_prompts``, ``of_seeds``, and ``noise`` are standard deviations.
    """
    rng = np.random.default_rng(num_seeds)
    hits = 0
    for _ in range(2500):
        by_prompt = rng.normal(0, of_prompts, (1 if is_crossed else num_seeds, 50))
        by_seed = rng.normal(0, of_seeds, (num_seeds, 1))
        differences = 0.03 + by_prompt + by_seed + rng.normal(0, noise, (num_seeds, 50))
        names = [np.arange(50) + (0 if is_crossed else 50 * s) for s in range(num_seeds)]
        pairs = [seed_sums(s, names[s], differences[s]) for s in range(num_seeds)]
        estimate = over_prompts_and_seeds(pairs).estimate
        hits += estimate.low <= 0.03 <= estimate.high
    return hits / 2500


@pytest.mark.parametrize("num_seeds", [3, 5])
@pytest.mark.parametrize("is_crossed", [False, True])
def test_interval_covers_the_truth(num_seeds: int, is_crossed: bool):
    assert 0.93 <= coverage(num_seeds, is_crossed, of_prompts=0.04, of_seeds=0.02, noise=0.3) <= 0.97


@pytest.mark.parametrize("num_seeds", [3, 5])
def test_interval_is_conservative_if_shared_prompts_dominate(num_seeds: int):
    assert coverage(num_seeds, True, of_prompts=0.2, of_seeds=0.02, noise=0.2) >= 0.95


def test_relative_difference():
    # 30 tokens in 2 responses vs. 36 in 3.
    sums = np.array([[[10.0, 1], [12, 2]], [[20, 1], [24, 1]]])
    assert SeedSums(0, np.arange(2, dtype=np.uint64), sums, is_relative=True).difference == pytest.approx(15 / 12 - 1)


def test_equal_differences_have_an_interval_with_a_width():
    # Both arms solve all 20 prompts in every seed: Wilson's interval of a share of one half, t(.975, 19) = 2.0930.
    pairs = [seed_sums(s, range(20), np.zeros(20)) for s in range(3)]
    found = over_prompts_and_seeds(pairs, (-1, 1)).estimate
    half = 2 * 2.093024 / (1 + 2.093024**2 / 20) * (0.25 / 20 + 2.093024**2 / 1600) ** 0.5
    assert (found.value, found.low, found.high) == pytest.approx((0, -half, half), abs=1e-5)
    assert (found.n, found.p_value) == (20, 1)


def test_seeds_that_agree_while_prompts_differ_count_as_three():
    pairs = [seed_sums(s, range(20 * s, 20 * s + 20), np.tile([0.1, -0.1], 10)) for s in range(3)]
    # t(.975, 2) = 4.3027 and three units.
    found = over_prompts_and_seeds(pairs, (-1, 1)).estimate
    half = 2 * 4.302653 / (1 + 4.302653**2 / 3) * (0.25 / 3 + 4.302653**2 / 36) ** 0.5
    assert (found.value, found.low, found.high) == pytest.approx((0, -half, half), abs=1e-5)
    assert found.n == 60


def test_equal_differences_without_bounds_have_no_interval():
    found = over_seeds(np.array([0.1, 0.1, 0.1])).estimate
    assert (found.value, found.p_value) == (pytest.approx(0.1), 1)
    assert np.isnan([found.low, found.high]).all()
    # The same holds for differences due to rounding.
    assert np.isnan(over_seeds(np.array([1e-17, -1e-17, 3e-17])).estimate.low)


def test_interval_of_a_difference_of_shares_ends_at_one():
    found = over_prompts_and_seeds([seed_sums(0, [0, 1], np.array([0.5, 0.25]))], (-1, 1)).estimate
    # 12.7062 standard errors of .125 would extend far beyond both ends.
    assert (found.value, found.low, found.high) == (0.375, -1, 1)
