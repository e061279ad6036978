"""Test statistics against naive loops and closed forms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from entrace.analysis.statistics.estimates import (
    Estimate,
    avg_at_k,
    detectable,
    detectable_difference,
    holm,
    maj_at_k,
    pass_at_k,
    resample_blocks,
    resample_clusters,
)


@pytest.mark.parametrize(("n", "c", "k"), [(8, 0, 8), (8, 8, 1), (8, 3, 1), (8, 3, 4), (6, 1, 6), (5, 4, 2)])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n: int, c: int, k: int):
    samples = [True] * c + [False] * (n - c)
    subsets = list(itertools.combinations(samples, k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_needs_k_samples():
    assert math.isnan(pass_at_k(4, 2, 5))


@pytest.mark.parametrize(
    ("answers", "is_correct", "k", "expected"),
    [
        (["7", "7", "8"], [True, True, False], 3, 1.0),
        (["7", "8", "8"], [True, False, False], 3, 0.0),
        (["7", "8"], [True, False], 2, 0.5),
        (["7", "8", "9"], [True, False, False], 3, 1 / 3),
        ([None, None, "8"], [False, False, True], 3, 1.0),
        ([None, None], [False, False], 2, 0.0),
        (["8", "7", "7"], [False, True, True], 1, 0.0),
    ],
)
def test_majority_vote(answers: list[str | None], is_correct: list[bool], k: int, expected: float):
    assert maj_at_k(answers, is_correct, k) == pytest.approx(expected)


def test_avg_at_k_takes_the_first_k():
    assert avg_at_k([True, False, False, True], 2) == 0.5


def test_cluster_bootstrap_equals_drawing_prompts_one_by_one():
    sums = np.random.default_rng(1).normal(size=(6, 2, 3))
    totals = resample_clusters(sums, np.random.default_rng(2), draws=250)
    rng = np.random.default_rng(2)
    for draw, prompts in enumerate(rng.integers(0, 6, (250, 6))):
        np.testing.assert_allclose(totals[draw], sum(sums[prompt] for prompt in prompts))


def test_cluster_interval_has_the_width_of_the_mean_s_standard_error():
    values = np.random.default_rng(3).normal(size=400)
    sums = np.stack((values, np.ones(400)), axis=1)
    draws = resample_clusters(sums, np.random.default_rng(4), draws=4000)
    estimate = Estimate.from_draws(values.mean(), draws[:, 0] / draws[:, 1], 399, 400, "prompts")
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.06)
    assert estimate.low < estimate.value < estimate.high


def test_interval_follows_prompts_not_tokens():
    # Ten prompts of 100 equal tokens each: ten independent values.
    values = np.arange(10.0)
    sums = np.stack((values * 100, np.full(10, 100.0)), axis=1)
    draws = resample_clusters(sums, np.random.default_rng(5), draws=4000)
    assert (draws[:, 0] / draws[:, 1]).std() == pytest.approx(values.std() / np.sqrt(10), rel=0.05)


def test_blocks_consist_of_consecutive_steps():
    indices = resample_blocks(64, np.random.default_rng(0), draws=50)
    assert indices.shape == (64, 50)
    assert indices.min() >= 0
    assert indices.max() <= 63
    block = round(1.5 * 64 ** (1 / 3))
    steps = np.diff(indices, axis=0)
    inside = np.arange(1, 64) % block != 0
    assert (steps[inside] == 1).all()
    assert (steps[~inside] != 1).any()


def test_interval_from_an_error_is_that_of_students_t():
    # t(0.975, 2) = 4.3027. Seeds 1, 2, 3 have a standard error of 1 / sqrt(3), so their mean 2 has t = 3.46.
    estimate = Estimate.from_error(2.0, 1 / 3**0.5, 2, 3, "seeds")
    assert (estimate.low, estimate.high) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-3)
    assert estimate.p_value == pytest.approx(0.0742, abs=1e-4)
    assert Estimate.from_error(2.0, 1.0, 0, 1, "seeds").width == math.inf
    assert Estimate.from_error(2.0, 0.0, 5, 6, "seeds").p_value == 0
    assert Estimate.from_error(0.0, 0.0, 5, 6, "seeds").p_value == 1


def test_few_clusters_widen_the_interval():
    # Five clusters: t(0.975, 4) = 2.7764 instead of 1.96, times sqrt(5 / 4).
    draws = np.random.default_rng(6).normal(size=100_000)
    estimate = Estimate.from_draws(0.0, draws, 4, 5, "prompts")
    assert estimate.width / 2 == pytest.approx(2.7764 * (5 / 4) ** 0.5, rel=0.02)


def test_interval_is_robust_to_outlying_draws():
    draws = np.random.default_rng(7).normal(size=1000)
    calm = Estimate.from_draws(0.0, draws, 99, 100, "prompts")
    draws[:5] = 1e9
    assert Estimate.from_draws(0.0, draws, 99, 100, "prompts").width == pytest.approx(calm.width, rel=0.02)


def test_statistic_that_is_often_undefined_has_no_interval():
    draws = np.r_[np.full(6, np.nan), np.ones(94)]
    assert math.isnan(Estimate.from_draws(1.0, draws, 8, 9, "prompts").low)
    assert Estimate.from_draws(1.0, draws, 8, 9, "prompts").p_value == 1
    assert Estimate.from_draws(1.0, draws[2:], 8, 9, "prompts").low == 1


def test_holm_by_hand():
    # Sorted: .01 x 4, .02 x 3, .03 x 2 (kept at .06), .5 x 1.
    np.testing.assert_allclose(holm([0.03, 0.01, 0.5, 0.02]), [0.06, 0.04, 0.5, 0.06])
    np.testing.assert_allclose(holm([0.9, 0.8]), [1, 1])
    assert holm([]).size == 0


def test_holm_controls_the_probability_of_any_false_rejection():
    rng = np.random.default_rng(8)
    false = [(holm(rng.random(20)) <= 0.05).any() for _ in range(2000)]
    assert np.mean(false) <= 0.06


@pytest.mark.parametrize(("num_seeds", "num_tests"), [(3, 1), (3, 20), (5, 4), (30, 1)])
def test_detectable_difference_is_found_four_times_in_five(num_seeds: int, num_tests: int):
    truth = detectable_difference(0.02, num_seeds, num_tests)
    rng = np.random.default_rng(num_seeds)
    draws = rng.normal([[truth]] + [[0]] * (num_tests - 1), 0.02, (20_000, num_tests, num_seeds))
    df = num_tests * (num_seeds - 1)
    error = np.sqrt(draws.var(2, ddof=1).mean(1) / num_seeds)
    p_values = 2 * stats.t.sf(abs(draws[:, 0].mean(1)) / error, df)
    assert (p_values <= 0.05 / num_tests).mean() == pytest.approx(0.8, abs=0.01)


def test_detectable_difference_of_many_seeds_is_that_of_the_normal():
    # z(.975) + z(.8) = 1.959964 + .841621; z(.995) = 2.575829.
    assert detectable_difference(1.0, 10_000) == pytest.approx(2.801585 / 100, rel=1e-3)
    assert detectable(0.01, 10_000, num_tests=5) == pytest.approx(0.01 * (2.575829 + 0.841621), rel=1e-3)
    assert detectable_difference(1.0, 10_000, level=0.01, power=0.5) == pytest.approx(2.575829 / 100, rel=1e-3)


def test_one_seed_detects_nothing():
    assert detectable_difference(0.02, 1, 3) == math.inf
    assert detectable(0.02, 0) == math.inf
