"""The stage fit finds planted boundaries and no others; the decomposition is exact."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.stages import (
    decompose_fall,
    fit_exchange,
    fit_stages,
    fitted_ends,
    num_rising_blocks,
    relative_speed,
)

STEPS = np.arange(1, 101)


def two_stages(boundary: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    done = np.minimum(STEPS / boundary, 1)
    return 0.9 - 0.6 * done + rng.normal(0, noise, 100), 0.3 + 0.5 * done + rng.normal(0, noise, 100)


@pytest.mark.parametrize("boundary", [20, 40, 70])
def test_planted_boundary_is_found(boundary: int):
    fit = fit_stages(STEPS, *two_stages(boundary, 0.02, boundary))
    assert fit.boundary is not None
    assert fit.low is not None
    assert fit.high is not None
    assert fit.boundary == pytest.approx(boundary, abs=3)
    assert fit.low <= fit.boundary <= fit.high
    assert fit.high - fit.low < 10
    np.testing.assert_allclose(fit.slopes[0], [-0.6 / boundary, 0.5 / boundary], rtol=0.15)
    np.testing.assert_allclose(fit.slopes[1], [0, 0], atol=0.0015)


def test_segments_have_slopes_with_intervals():
    rising, plateau = fit_stages(STEPS, *two_stages(40, 0.02, 3)).segments()
    assert (rising["stage"], rising["last_step"] + 1) == ("rising", plateau["first_step"])
    assert rising["entropy_slope_low"] < -0.6 / 40 < rising["entropy_slope_high"] < 0
    assert 0 < rising["accuracy_slope_low"] < 0.5 / 40 < rising["accuracy_slope_high"]
    assert plateau["entropy_slope_low"] < 0 < plateau["entropy_slope_high"]


def test_interval_covers_the_boundary():
    fits = [fit_stages(STEPS, *two_stages(35, 0.05, seed)) for seed in range(20)]
    covered = [fit.low <= 35 <= fit.high for fit in fits if fit.low is not None and fit.high is not None]
    assert len(covered) == 20
    assert sum(covered) >= 17


def test_exact_fit_by_a_naive_search():
    entropy, accuracy = two_stages(30, 0.05, 1)
    series = [(values - values.mean()) / values.std() for values in (entropy, accuracy)]
    errors = {}
    for knot in range(5, 96):
        basis = np.column_stack((np.ones(100), STEPS, np.maximum(STEPS - knot, 0)))
        errors[knot] = sum(float(np.linalg.lstsq(basis, values)[1][0]) for values in series)
    assert fit_stages(STEPS, entropy, accuracy).boundary == min(errors, key=lambda knot: errors[knot])


def test_a_straight_line_with_noise_has_no_boundary():
    found = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        line = 1 - STEPS / 150
        fit = fit_stages(STEPS, line + rng.normal(0, 0.05, 100), 1 - line + rng.normal(0, 0.05, 100))
        found += fit.boundary is not None
    assert found <= 3


@pytest.mark.parametrize(
    ("entropy", "steps", "reason"),
    [
        (lambda x: 1 - x / 20, 15, "15 steps"),
        (lambda x: 1 - np.maximum(x - 50, 0) / 60, 100, "faster after step 50"),
    ],
)
def test_no_boundary_is_explained(entropy, steps: int, reason: str):
    x = STEPS[:steps]
    fit = fit_stages(x, entropy(x), 1 - entropy(x))
    assert fit.boundary is None
    assert reason in fit.reason
    assert [segment["stage"] for segment in fit.segments()] == ["rising"]


def test_constant_series_do_not_divide_by_zero():
    fit = fit_stages(STEPS, np.ones(100), np.zeros(100))
    assert fit.boundary is None
    assert np.isfinite(fit.slopes).all()


@pytest.mark.parametrize(
    ("rising", "plateau", "expected"),
    [
        ((-0.1, 0.2), (0, 0.1), (0, 0.5)),
        ((-0.1, 0.2), (0.1, -0.2), (-1, -1)),
        ((0.1, -0.2), (0, 0), (np.nan, np.nan)),
    ],
)
def test_relative_speed(rising, plateau, expected):
    np.testing.assert_allclose(relative_speed(np.array([rising, plateau])), expected)


def test_ends_of_the_rising_stage_equal_a_plain_least_squares_fit():
    entropy, accuracy = two_stages(40, 0.03, 5)
    fit = fit_stages(STEPS, entropy, accuracy)
    other = np.random.default_rng(6).normal(size=100) - np.minimum(STEPS, 40) / 10
    ends, draws = fitted_ends(fit, STEPS, np.column_stack((other, accuracy)), np.random.default_rng(0), draws=400)
    assert fit.boundary is not None
    basis = np.column_stack((np.ones(100), STEPS, np.maximum(STEPS - fit.boundary, 0)))
    for i, series in enumerate((other, accuracy)):
        fitted = basis @ np.linalg.lstsq(basis, series, rcond=None)[0]
        np.testing.assert_allclose(ends[:, i], fitted[[0, int(fit.boundary) - 1]])
    assert draws.shape == (400, 2, 2)
    np.testing.assert_allclose(draws.mean(0), ends, atol=0.05)


def test_error_of_the_ends_is_that_of_least_squares_where_steps_are_independent():
    found, spread = [], []
    fit = fit_stages(STEPS, *two_stages(40, 0.001, 7))
    for seed in range(200):
        noise = np.random.default_rng(seed).normal(size=(100, 1))
        ends, draws = fitted_ends(fit, STEPS, noise, np.random.default_rng(seed), draws=100)
        found.append(ends[1, 0] - ends[0, 0])
        spread.append((draws[:, 1, 0] - draws[:, 0, 0]).std())
    assert np.mean(spread) == pytest.approx(np.std(found), rel=0.15)


def test_exchange_law_equals_a_plain_fit_and_its_error_that_of_repeated_runs():
    exp_entropy = np.exp(two_stages(40, 0.0, 0)[0])
    found, spread = [], []
    for seed in range(200):
        accuracy = 1 - 0.4 * exp_entropy + np.random.default_rng(seed).normal(0, 0.02, 100)
        fit, draws = fit_exchange(exp_entropy, accuracy, 40, np.random.default_rng(seed))
        found.append(fit)
        spread.append(draws.std(0))
    slope, intercept = np.polyfit(exp_entropy, accuracy, 1)
    np.testing.assert_allclose(found[-1], [-slope, intercept])
    np.testing.assert_allclose(np.mean(found, axis=0), [0.4, 1], rtol=0.01)
    np.testing.assert_allclose(np.mean(spread, axis=0), np.std(found, axis=0), rtol=0.15)


def test_without_a_boundary_the_ends_are_those_of_one_line():
    fit = fit_stages(STEPS, np.ones(100), np.zeros(100))
    ends, _ = fitted_ends(fit, STEPS, STEPS[:, None] * 2.0, np.random.default_rng(0))
    np.testing.assert_allclose(ends[:, 0], [2, 200])


def test_decomposition_is_exact():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 100, (50, 2, 3)).astype(float)
    sums = rng.random((50, 2, 3)) * tokens
    within, between = decompose_fall(tokens, sums)
    mean = sums.sum(-1) / tokens.sum(-1)
    np.testing.assert_allclose((within + between).sum(-1), mean[:, 0] - mean[:, 1], atol=1e-12)


def test_decomposition_by_hand():
    # Shares 1/2, 1/2 -> 1/4, 3/4; means 4, 2 -> 2, 2.
    within, between = decompose_fall(np.array([[2.0, 2], [1, 3]]), np.array([[8.0, 4], [2, 6]]))
    np.testing.assert_allclose(within, [0.375 * 2, 0])
    np.testing.assert_allclose(between, [0.25 * 3, -0.25 * 2])


def test_decomposition_when_a_sign_disappears():
    tokens = np.array([[2.0, 2], [0, 4]])
    within, between = decompose_fall(tokens, np.array([[8.0, 4], [0, 8]]))
    np.testing.assert_allclose(within, [0, 0])
    assert between.sum() == pytest.approx(3 - 2)


def test_steps_that_were_kept_count_and_not_those_between_them():
    every, tenth = (fit_stages(STEPS * spacing, *two_stages(40, 0.02, 0)) for spacing in (1, 10))
    assert (every.num_steps, every.num_rising) == (tenth.num_steps, tenth.num_rising)
    assert every.num_rising == every.boundary
    assert num_rising_blocks(every) == num_rising_blocks(tenth)
    few = fit_stages(np.array([1, 100, 200]), np.ones(3), np.ones(3))
    assert "the run has 3 steps" in few.reason
    assert few.num_rising == 3
