"""Test the coverage of intervals under autocorrelation, and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import fft, optimize, stats

from entrace.analysis.statistics.autocorrelation import VARIANCE_RATIOS, cosines, from_cosines
from entrace.analysis.statistics.clusters import level, over_clusters, ratio
from entrace.analysis.statistics.combination import combine, mean_of_parts
from entrace.analysis.statistics.contrasts import contrast, draw_contrasts, draw_errors
from entrace.analysis.statistics.estimates import Estimate
from entrace.analysis.statistics.mixture import summarize_mixture
from entrace.analysis.statistics.shares import bounded


def autoregression(rng: np.random.Generator, size: int, correlation: float) -> np.ndarray:
    """Return a stationary first-order autoregression with variance 1."""
    values = rng.normal(size=size)
    for i in range(1, size):
        values[i] = correlation * values[i - 1] + np.sqrt(1 - correlation**2) * values[i]
    return values


def levels(correlation: float, share: float, steps: int, spacing: int = 1, runs: int = 120) -> list[Estimate]:
    """Return estimates of a level of 10 from runs with 16 prompts per step.

    The state has ``share`` of a step's variance.
    """
    found = []
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        state = autoregression(rng, steps * spacing, correlation)[::spacing]
        noise = rng.normal(size=(steps, 16)) * np.sqrt((1 - share) * 16)
        values = 10 + np.sqrt(share) * state[:, None] + noise
        rows = np.repeat(np.arange(steps) * spacing, 16)
        sums = np.column_stack((values.ravel(), np.ones(values.size)))
        found.append(level(rows, np.arange(values.size), sums, ratio))
    return found


@pytest.mark.parametrize(
    ("correlation", "share", "steps", "spacing"),
    [(0.0, 0.5, 84, 1), (0.5, 0.5, 84, 1), (0.9, 0.5, 84, 1), (0.9, 0.9, 120, 1), (0.9, 0.9, 17, 5), (0.5, 0.5, 5, 20)],
)
def test_level_covers_under_autocorrelation(correlation: float, share: float, steps: int, spacing: int):
    found = levels(correlation, share, steps, spacing)
    # 120 runs at 95%: fewer than 106 hits, or 120, have probability .005 each.
    hits = sum(estimate.low <= 10 <= estimate.high for estimate in found)
    assert hits >= 106


def test_level_is_not_much_wider_than_it_must_be():
    found = levels(0.0, 0.5, 84)
    assert np.median([estimate.error for estimate in found]) == pytest.approx(1 / np.sqrt(84), rel=0.3)
    assert np.median([estimate.blocks for estimate in found]) > 40


def test_a_slow_state_leaves_few_blocks():
    # A share (1 - r) / (1 + r) of the steps is independent: 84 / 39 = 2.2.
    found = levels(0.95, 1.0, 84)
    assert np.mean([estimate.blocks < 3 for estimate in found]) > 0.4
    misses = [not estimate.low <= 10 <= estimate.high for estimate in found]
    assert np.mean([miss and estimate.blocks >= 3 for miss, estimate in zip(misses, found, strict=True)]) <= 0.07


def test_two_runs_are_at_least_as_wide_as_their_errors():
    # A run with few captured steps has no information, and neither has the mean of two runs with it.
    wide = Estimate.from_error(-0.014, 0.05, 3, 4, "steps", blocks=2.0)
    narrow = Estimate.from_error(-0.107, 0.007, 30, 40, "steps", blocks=20.0)
    both = combine([wide, narrow], "steps, 2 runs")
    assert both.value == pytest.approx(-0.0605)
    assert both.error >= np.hypot(0.05, 0.007) / 2
    assert both.blocks == 2.0
    assert combine([wide], "steps, 1 run").error == wide.error


def means_of_runs(scatter: float, num: int, seeds: int = 400) -> list[Estimate]:
    """Return means of runs whose effects scatter and have an error of 1 each.

    The true value is 0.
    """
    found = []
    for seed in range(seeds):
        values = np.random.default_rng(seed).normal(0, np.hypot(1, scatter), num)
        found.append(combine([Estimate.from_error(value, 1.0, 60, 100, "steps") for value in values], "steps"))
    return found


@pytest.mark.parametrize("num", [3, 5])
@pytest.mark.parametrize("scatter", [0.0, 1.0, 3.0, 100.0])
def test_mean_of_runs_covers_however_much_they_differ(scatter: float, num: int):
    hits = np.mean([estimate.low <= 0 <= estimate.high for estimate in means_of_runs(scatter, num)])
    assert hits >= 0.90


@pytest.mark.parametrize("errors", [(0.0, 0.1, 0.1), (0.0, 0.0, 1e-160), (0.0, 0.0, 0.0), (1e-200, 1e-200, 2e-200)])
@pytest.mark.parametrize("values", [(1.0, 1.0, 1.0), (1.0, 1.05, 0.9), (-1e9, 0.0, 1e9)])
def test_mean_of_runs_without_an_error_of_their_own_is_finite(errors: tuple[float, ...], values: tuple[float, ...]):
    runs = [Estimate.from_error(value, error, 1e9, 9, "steps") for value, error in zip(values, errors, strict=True)]
    with np.errstate(all="raise", under="ignore"):
        found = combine(runs, "steps, 3 runs")
    assert np.isfinite([found.low, found.high, found.p_value]).all()
    assert found.low <= np.mean(values) <= found.high


def test_runs_that_agree_are_worth_more_than_their_number():
    # Student's t over three runs would be 4.30 / sqrt(3) to either side.
    found = means_of_runs(0.0, 3)
    assert np.median([estimate.width / 2 for estimate in found]) < 0.75 * stats.t.ppf(0.975, 2) / np.sqrt(3)


def test_mean_of_runs_equals_numerical_integration():
    values, errors = np.array([0.1, 0.5, 1.2]), np.array([0.2, 0.3, 0.25])
    found = combine([Estimate.from_error(*pair, 1e9, 1, "steps") for pair in zip(values, errors, strict=True)], "steps")
    unit = np.mean(errors**2)
    mu = np.linspace(-60, 60, 40001)
    density = 0.0
    for u, prior in [(0.0, 0.2), *((share * unit, 0.8 / len(VARIANCE_RATIOS)) for share in VARIANCE_RATIOS)]:
        spread = np.sqrt(errors**2 + u)
        likelihood = np.prod(stats.norm.pdf(values[:, None], mu, spread[:, None]), axis=0).sum() * (mu[1] - mu[0])
        density = density + prior * likelihood * stats.norm.pdf(mu, values.mean(), np.sqrt((spread**2).sum()) / 3)
    below = np.cumsum(density) / np.sum(density)
    np.testing.assert_allclose((found.low, found.high), np.interp([0.025, 0.975], below, mu), atol=0.01)


def test_contrast_equals_generalized_least_squares_without_a_state():
    # Without a state the interval is that of least squares, except for the posterior weight of a state.
    rng = np.random.default_rng(0)
    x = np.arange(100.0)
    basis = np.column_stack((np.ones(100), x))
    weights = np.linalg.pinv(basis)[1]
    found = [contrast(basis @ [1, 0.1] + rng.normal(size=100), basis, weights, steps=x) for _ in range(50)]
    expected = 1 / np.sqrt(((x - x.mean()) ** 2).sum())
    assert np.mean([estimate.value for estimate in found]) == pytest.approx(0.1, abs=0.002)
    assert np.median([estimate.error for estimate in found]) == pytest.approx(expected, rel=0.6)
    assert np.median([estimate.error for estimate in found]) >= 0.95 * expected


def test_contrast_of_a_drifting_trend_covers():
    x = np.arange(100.0)
    basis = np.column_stack((np.ones(100), x))
    weights = np.linalg.pinv(basis)[1]
    hits = 0
    for seed in range(120):
        y = 0.1 * x + autoregression(np.random.default_rng(seed), 100, 0.9)
        estimate = contrast(y, basis, weights, steps=x)
        hits += estimate.low <= 0.1 <= estimate.high
    assert hits >= 106


def test_draws_agree_with_the_interval():
    rng = np.random.default_rng(0)
    x = np.arange(80.0)
    y = autoregression(rng, 80, 0.7)
    basis, weights = np.ones((80, 1)), np.full(80, 1 / 80)
    estimate = contrast(y, basis, weights, steps=x)
    draws = draw_contrasts(y, basis, weights[None], x, 20_000, np.random.default_rng(1))[:, 0]
    np.testing.assert_allclose(np.percentile(draws, (2.5, 97.5)), (estimate.low, estimate.high), rtol=0.1)


def test_drawn_errors_have_the_spread_and_correlation_of_the_series():
    rng = np.random.default_rng(0)
    first = autoregression(rng, 200, 0.8)
    series = np.column_stack((first, 0.6 * first + 0.8 * autoregression(rng, 200, 0.8)))
    errors = draw_errors(series, np.ones((200, 1)), np.arange(200.0), 200, rng)
    assert errors.shape == (200, 2, 200)
    assert errors[:, 0].std() == pytest.approx(series[:, 0].std(), rel=0.3)
    correlation = np.mean([np.corrcoef(errors[:, :, i].T)[0, 1] for i in range(200)])
    assert correlation == pytest.approx(np.corrcoef(series.T)[0, 1], abs=0.1)
    lagged = np.mean([np.corrcoef(errors[1:, 0, i], errors[:-1, 0, i])[0, 1] for i in range(200)])
    assert lagged == pytest.approx(0.8, abs=0.15)


def test_jackknife_over_clusters_equals_a_loop():
    rng = np.random.default_rng(0)
    clusters = rng.integers(0, 12, 60)
    sums = np.column_stack((rng.normal(size=60), rng.integers(1, 5, 60).astype(float)))
    estimate = over_clusters(sums, clusters, ratio, "prompts")
    left_out = []
    for cluster in np.unique(clusters):
        rest = sums[clusters != cluster].sum(0)
        left_out.append(rest[0] / rest[1])
    n = len(left_out)
    assert estimate.value == pytest.approx(sums[:, 0].sum() / sums[:, 1].sum())
    assert estimate.error == pytest.approx(np.sqrt((n - 1) * np.var(left_out)))
    size = np.bincount(clusters, sums[:, 1])
    assert estimate.df == pytest.approx(size.sum() ** 2 / (size**2).sum() - 1)


def test_seven_prompts_have_students_quantile():
    values = np.random.default_rng(0).normal(size=7)
    estimate = over_clusters(np.column_stack((values, np.ones(7))), np.arange(7), ratio, "prompts")
    expected = stats.t.interval(0.95, 6, values.mean(), values.std(ddof=1) / np.sqrt(7))
    np.testing.assert_allclose((estimate.low, estimate.high), expected)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.5])
def test_agreement_of_a_few_prompts_leaves_uncertainty(value: float):
    estimate = over_clusters(np.column_stack((np.full(5, value), np.ones(5))), np.arange(5), ratio, "prompts", (0, 1))
    assert 0 <= estimate.low <= value <= estimate.high <= 1
    assert estimate.width > 0.3


def test_wilson_by_hand():
    # All of ten: from n / (n + t^2), t the quantile of nine degrees of freedom.
    estimate = bounded(1.0, 0.0, 9, 10, "prompts")
    t = stats.t.ppf(0.975, 9)
    assert (estimate.low, estimate.high) == (pytest.approx(10 / (10 + t**2)), 1.0)


@pytest.mark.parametrize("value", [0.02, 0.5, 0.97])
def test_intervals_of_shares_stay_within_bounds(value: float):
    estimate = bounded(value, 0.05, 20, 30, "prompts")
    assert 0 < estimate.low < value < estimate.high < 1


def test_a_difference_on_which_all_prompts_agree_has_a_width():
    estimate = bounded(0.0, 0.0, 9, 10, "prompts", bounds=(-1, 1))
    assert estimate.low < 0 < estimate.high
    assert estimate.p_value == 1


def test_the_mean_of_parts_by_hand():
    parts = [Estimate.from_error(0.2, 0.03, 10, 11, "prompts"), Estimate.from_error(0.6, 0.04, 40, 41, "prompts")]
    mean = mean_of_parts(parts, "prompts in 2 benchmarks", (0, 1))
    # sqrt(.03^2 + .04^2) / 2, and (9 + 16)^2 / (81 / 10 + 256 / 40) degrees of freedom.
    assert (mean.value, mean.error, mean.df) == (pytest.approx(0.4), pytest.approx(0.025), pytest.approx(625 / 14.5))
    expected = bounded(0.4, 0.025, 625 / 14.5, 52, "prompts in 2 benchmarks")
    assert (mean.low, mean.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert (mean.n, mean.of) == (52, "prompts in 2 benchmarks")
    # Differences between parts do not widen the interval, and parts have equal weights regardless of size.
    assert mean.high - mean.low < 0.11
    assert mean_of_parts(parts[:1], "prompts", (0, 1)) == parts[0]


def test_a_part_without_an_error_leaves_the_mean_of_parts_unbounded():
    parts = [bounded(0.5, np.nan, 0, 1, "prompts"), bounded(0.5, 0.05, 20, 21, "prompts")]
    mean = mean_of_parts(parts, "prompts", (0, 1))
    assert (mean.value, mean.low, mean.high) == (0.5, 0, 1)


def test_the_mean_of_parts_covers_parts_of_unlike_sizes():
    hits = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        drawn = [rng.binomial(8, rng.beta(2 * p, 2 * (1 - p), n)) / 8 for p, n in ((0.2, 30), (0.7, 200))]
        parts = [
            over_clusters(np.column_stack((x, np.ones(len(x)))), np.arange(len(x)), ratio, "prompts", (0, 1))
            for x in drawn
        ]
        mean = mean_of_parts(parts, "prompts", (0, 1))
        hits += mean.low <= 0.45 <= mean.high
    # 200 draws at 95%: fewer than 181 hits have probability .003.
    assert hits >= 181


def test_a_recurring_prompt_counts_once():
    # Eight prompts of constant difficulty recur at all 60 steps: eight units, not 480.
    hits = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        values = rng.normal(size=8) + rng.normal(size=(60, 8))
        rows, prompts = np.repeat(np.arange(60), 8), np.tile(np.arange(8), 60)
        estimate = level(rows, prompts, np.column_stack((values.ravel(), np.ones(480))), ratio)
        hits += estimate.low <= 0 <= estimate.high
    assert hits >= 88


def test_long_series_are_shortened_and_keep_their_value():
    rng = np.random.default_rng(0)
    values = 3 + autoregression(rng, 5000, 0.9)
    estimate = level(np.arange(5000), np.arange(5000), np.column_stack((values, np.ones(5000))), ratio)
    assert estimate.value == pytest.approx(values.mean())
    # The variance of the mean is that of the noise times (1 + r) / (1 - r) / n.
    assert estimate.error == pytest.approx(np.sqrt(19 / 5000), rel=0.4)


@pytest.mark.parametrize("df", [0.3, 4.0, 60.0, 1e9, np.inf])
@pytest.mark.parametrize("widest", [1.0, 3.0, 1e4])
def test_the_interval_of_a_mixture_is_where_its_tails_hold_the_rest(df: float, widest: float):
    rng = np.random.default_rng(0)
    weights, scale = rng.dirichlet(np.ones(100)), np.geomspace(1e-3, 1e-3 * widest, 100)
    found = summarize_mixture(2.0, weights, scale, df, 9, "steps", 5.0)

    def miss(x: float) -> float:
        return float(weights @ stats.t.cdf(x / scale, df) - 0.975)

    half = optimize.bisect(miss, 0, 1e9, xtol=1e-300, maxiter=1200)
    assert (found.high - 2.0, 2.0 - found.low) == pytest.approx((half, half), rel=1e-11)


def test_totals_of_unlike_size_have_a_gradient():
    # Predictions can be far smaller than the changes that they are correlated with.
    rng = np.random.default_rng(0)
    steps, prompts = np.repeat(np.arange(20), 6), np.tile(np.arange(6), 20)
    x, y = rng.normal(size=(2, 120))

    def correlation(totals: np.ndarray) -> np.ndarray:
        return totals[..., 0] / np.sqrt(totals[..., 1] * totals[..., 2])

    found = [
        level(steps, prompts, np.column_stack((unit * x * y, unit**2 * x * x, y * y)), correlation)
        for unit in (1, 1e-9)
    ]
    assert np.isfinite(found[0].error)
    assert found[1].low == pytest.approx(found[0].low, rel=1e-6)
    assert found[1].high == pytest.approx(found[0].high, rel=1e-6)


@pytest.mark.parametrize("shape", [(1,), (2, 1), (37, 2), (600, 2, 5)])
def test_cosines_are_those_of_scipy(shape):
    values = np.random.default_rng(1).normal(size=shape)
    np.testing.assert_allclose(cosines(values), fft.dct(values, type=2, norm="ortho", axis=0), atol=1e-12)
    np.testing.assert_allclose(from_cosines(cosines(values)), values, atol=1e-12)
