"""Test that the stage fit finds planted boundaries and no others.

The decomposition must be exact.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from entrace.analysis.statistics.stages import decompose_fall, fit_stages, movement, slowdown, trend_weights
from tests.analysis.test_intervals import autoregression

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


def noisy(shape: np.ndarray, seed: int, correlation: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Return a falling entropy and a rising accuracy along ``shape``.

    Half of their noise is a drifting state.
    """
    rng = np.random.default_rng(seed)
    drift = np.column_stack([autoregression(rng, len(shape), correlation) for _ in range(2)])
    noise = (drift + rng.normal(size=drift.shape)) / np.sqrt(2)
    return 0.75 - 0.3 * shape + 0.02 * noise[:, 0], 0.35 + 0.3 * shape + 0.02 * noise[:, 1]


SHARE = np.linspace(0, 1, 100)
CURVES = {
    "exponential": 1 - np.exp(-3 * SHARE),
    "logarithm": np.log1p(SHARE / 0.05) / np.log(21),
    "sigmoid": 1 / (1 + np.exp(-(SHARE - 0.3) / 0.08)),
}


@pytest.mark.parametrize("name", CURVES)
def test_a_smooth_curve_slows_down_and_has_no_two_stages(name: str):
    fits = [fit_stages(STEPS, *noisy(CURVES[name], seed)) for seed in range(10)]
    assert sum(fit.two_stages.low > 0 for fit in fits if fit.boundary) <= 1
    slow = [slowdown(fit.movement(0)[0]) for fit in fits]
    assert np.mean(slow) > 0.3


def test_two_lines_are_distinguished_from_a_curve():
    shape = np.minimum(STEPS / 30, 1)
    fits = [fit_stages(STEPS, *noisy(shape, seed, 0.0)) for seed in range(10)]
    assert sum(fit.two_stages.low > 0 for fit in fits) >= 8


@pytest.mark.parametrize(
    ("movements", "expected"),
    [((1, 0), 1), ((1, 1), 0), ((0, 1), -1), ((-1, -1), -1), ((-1, 0), -1), ((1, -1), 0), ((3, 1), 0.5)],
)
def test_slowdown_by_hand(movements: tuple[float, float], expected: float):
    assert slowdown(np.array(movements, dtype=float)) == expected


def test_movement_equals_a_plain_fit():
    rng = np.random.default_rng(0)
    series = rng.normal(size=100).cumsum()
    values, draws, _ = movement(STEPS.astype(float), series)
    x = (STEPS - 1) / 99
    knots = (0.25, 0.5, 0.75)
    basis = np.column_stack((np.ones(100), x, *(np.maximum(x - knot, 0) for knot in knots)))
    coefficients = np.linalg.lstsq(basis, series)[0]
    start, half, end = (coefficients @ [1, at, *(max(at - knot, 0) for knot in knots)] for at in (0, 0.5, 1))
    np.testing.assert_allclose(values, (half - start, end - half))
    np.testing.assert_allclose(draws.mean(0), values, atol=0.5)


def test_change_over_the_rising_stage_equals_a_plain_least_squares_fit():
    fit = fit_stages(STEPS, *two_stages(40, 0.03, 5))
    assert fit.boundary is not None
    other = np.random.default_rng(6).normal(size=100) - np.sqrt(STEPS)
    knots = ((1 + fit.boundary) / 2, fit.boundary, (fit.boundary + 100) / 2)
    basis = np.column_stack((np.ones(100), STEPS, *(np.maximum(STEPS - knot, 0) for knot in knots)))
    fitted = basis @ np.linalg.lstsq(basis, other)[0]
    columns, weights = trend_weights(fit, STEPS)
    assert weights @ other == pytest.approx(fitted[int(fit.boundary) - 1] - fitted[0])
    assert columns.shape == (100, 5)


def test_steps_of_few_prompts_count_less():
    fit = fit_stages(STEPS, *two_stages(40, 0.03, 5))
    noise = np.where(STEPS <= 40, 1.0, 100.0)
    _, weights = trend_weights(fit, STEPS, noise)
    _, alike = trend_weights(fit, STEPS)
    assert np.abs(weights[40:]).sum() < 0.5 * np.abs(alike[40:]).sum()
    assert weights @ (STEPS * 2.0) == pytest.approx(2 * (fit.boundary - 1) if fit.boundary else 0)


def test_without_a_boundary_the_change_is_that_of_the_run():
    fit = fit_stages(STEPS, np.ones(100), np.zeros(100))
    _, weights = trend_weights(fit, STEPS)
    assert weights @ (STEPS * 2.0) == pytest.approx(198)


def test_a_change_depends_little_on_where_the_boundary_lies_within_its_interval():
    entropy, accuracy = noisy(np.minimum(STEPS / 35, 1), 1)
    fit = fit_stages(STEPS, entropy, accuracy)
    assert fit.low is not None
    assert fit.high is not None
    changes = []
    for boundary in np.linspace(fit.low, fit.high, 7).round():
        _, weights = trend_weights(replace(fit, boundary=float(boundary)), STEPS)
        changes.append(weights @ accuracy)
    # The rise is .3.
    assert max(changes) - min(changes) < 0.06


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_interval_of_the_boundary_covers_under_autocorrelation(correlation: float):
    shape = np.minimum(STEPS / 36, 1)
    fits = [fit_stages(STEPS, *noisy(shape, seed, correlation)) for seed in range(40)]
    hits = [fit.low <= 36 <= fit.high for fit in fits if fit.low is not None and fit.high is not None]
    assert len(hits) >= 36
    assert np.mean(hits) >= 0.85


def test_noise_that_drifts_has_no_boundary():
    found = 0
    for seed in range(30):
        entropy, accuracy = noisy(np.zeros(100), seed, 0.9)
        found += fit_stages(STEPS, entropy, accuracy).boundary is not None
    assert found <= 4


def test_rising_entropy_has_no_rising_stage():
    entropy, accuracy = noisy(-np.minimum(STEPS / 30, 1), 0)
    fit = fit_stages(STEPS, entropy, accuracy)
    assert fit.boundary is None
    assert "do not move in the expected direction" in fit.reason
    assert slowdown(fit.movement(0)[0]) == pytest.approx(-1)


def test_long_runs_are_averaged():
    steps = np.arange(1, 2001)
    shape = np.minimum(steps / 700, 1)
    fit = fit_stages(steps, *noisy(shape, 0))
    assert fit.boundary == pytest.approx(700, abs=40)
    assert (fit.num_steps, fit.first_step, fit.last_step) == (2000, 1, 2000)


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
    few = fit_stages(np.array([1, 100, 200]), np.ones(3), np.ones(3))
    assert "the run has 3 steps" in few.reason
    assert few.num_rising == 3
