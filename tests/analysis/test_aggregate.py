"""Compare aggregates over runs with rliable 1.2.0 and naive loops."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import trim_mean

from entrace.analysis.statistics.aggregates import improvement_interval, iqm, iqm_interval

# Five runs, three benchmarks, two algorithms.
X = np.array([[0.62, 0.43, 0.78], [0.55, 0.37, 0.72], [0.62, 0.52, 0.76], [0.57, 0.45, 0.83], [0.63, 0.34, 0.8]])
Y = np.array([[0.63, 0.52, 0.68], [0.42, 0.3, 0.57], [0.55, 0.3, 0.74], [0.58, 0.39, 0.52], [0.53, 0.4, 0.73]])


# What rliable.library.get_interval_estimates gives for rliable.metrics.aggregate_iqm with 50,000 draws.
@pytest.mark.parametrize(
    ("scores", "value", "low", "high"),
    [(X, 0.60444444, 0.58, 0.62666667), (Y, 0.52444444, 0.47777778, 0.57555556)],
)
def test_iqm_agrees_with_rliable(scores: np.ndarray, value: float, low: float, high: float):
    found = iqm_interval(scores.T, np.random.default_rng(0), draws=20_000)
    assert found[0] == pytest.approx(value, abs=1e-8)
    assert found[1:] == pytest.approx((low, high), abs=0.002)


def test_probability_of_improvement_agrees_with_rliable():
    # rliable.metrics.probability_of_improvement, 50,000 draws: 23 of 30 halves.
    found = improvement_interval(X.T, Y.T, np.random.default_rng(0), draws=20_000)
    assert found[0] == pytest.approx(0.7666666666666666, abs=1e-12)
    assert found[1:] == pytest.approx((0.58, 0.92666667), abs=0.015)
    reverse = improvement_interval(Y.T, X.T, np.random.default_rng(0), draws=20_000)
    assert reverse[0] == pytest.approx(1 - found[0])


def test_ties_count_half():
    found = improvement_interval([np.array([0.5, 0.7])], [np.array([0.5, 0.6, 0.8])], np.random.default_rng(0))
    # .5 ties once and loses twice; .7 wins twice and loses once.
    assert found[0] == pytest.approx(2.5 / 6)


@pytest.mark.parametrize("num", range(1, 12))
def test_iqm_is_the_trimmed_mean(num: int):
    scores = np.random.default_rng(num).normal(size=num)
    assert iqm(scores) == pytest.approx(trim_mean(scores, 0.25))


def test_runs_are_drawn_within_their_benchmark():
    # Benchmarks that do not vary leave no width, however far apart and however many runs each has.
    found = iqm_interval([np.full(3, 0.2), np.full(5, 0.9)], np.random.default_rng(0))
    # 8 scores less two at either end: one of .2 and three of .9.
    assert found == pytest.approx((0.725, 0.725, 0.725))


def test_a_single_run_has_no_interval():
    rng = np.random.default_rng(0)
    assert iqm_interval([np.array([0.6])], rng) == pytest.approx((0.6, np.nan, np.nan), nan_ok=True)
    alone = improvement_interval([np.array([0.6])], [np.array([0.5])], rng)
    assert alone == pytest.approx((1.0, np.nan, np.nan), nan_ok=True)
