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


def test_interval_from_an_error_is_that_of_students_t():
    # t(0.975, 2) = 4.3027. Seeds 1, 2, 3 have a standard error of 1 / sqrt(3), so their mean 2 has t = 3.46.
    estimate = Estimate.from_error(2.0, 1 / 3**0.5, 2, 3, "seeds")
    assert (estimate.low, estimate.high) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-3)
    assert estimate.p_value == pytest.approx(0.0742, abs=1e-4)
    assert Estimate.from_error(2.0, 1.0, 0, 1, "seeds").width == math.inf
    assert Estimate.from_error(2.0, 0.0, 5, 6, "seeds").p_value == 0
    assert Estimate.from_error(0.0, 0.0, 5, 6, "seeds").p_value == 1


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
