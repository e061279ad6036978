"""Test the verdict rule that the scorecard and the comparison of arms share."""

from __future__ import annotations

import math

import pytest

from entrace.analysis.statistics.estimates import Estimate, detectable
from entrace.analysis.verdict_rules import Outcome, Size, decide

SEEDS = Size(3, "seeds")


def judge(value: float, low: float, high: float, p: float, error: float = 0.001, df: float = 10) -> Outcome:
    return decide(Estimate(value, low, high, p, 10, "prompts", error, df), p, 0.1, num_tests=4, size=SEEDS)


@pytest.mark.parametrize(
    ("value", "low", "high", "p", "direction", "is_negligible", "why"),
    [
        (0.3, 0.2, 0.4, 0.01, 1, False, "higher, significant, and at least 0.1"),
        (0.1, 0.01, 0.2, 0.05, 1, False, "higher, significant"),
        (0.3, 0.2, 0.4, 0.06, 0, False, "higher, but not significant after Holm's correction for 4 tests (p = 0.06)"),
        (0.3, -0.1, 0.7, 0.2, 0, False, "includes zero as well as effects that matter"),
        (0.05, 0.01, 0.12, 0.01, 0, False, "higher, but smaller than 0.1"),
        (0.05, 0.01, 0.09, 0.01, 0, True, "no effect that matters: the whole interval lies within ±0.1"),
        (0.0, -0.05, 0.05, 1.0, 0, True, "no effect that matters"),
        (math.nan, math.nan, math.nan, 1.0, 0, False, "not finite"),
        (0.3, 0.2, math.inf, 0.01, 0, False, "not finite"),
    ],
)
def test_an_established_effect_needs_interval_size_and_adjusted_p_value(
    value: float, low: float, high: float, p: float, direction: int, is_negligible: bool, why: str
):
    found = judge(value, low, high, p)
    assert (found.direction, found.is_negligible) == (direction, is_negligible)
    assert why in found.why
    mirrored = judge(-value, -high, -low, p)
    assert (mirrored.direction, mirrored.is_negligible) == (-direction, is_negligible)
    assert mirrored.why == found.why.replace("higher", "lower")


def test_the_caller_names_the_directions():
    estimate = Estimate(-0.3, -0.5, -0.2, 0.01, 10, "prompts", 0.05, 10)
    found = decide(
        estimate, 0.2, 0.1, num_tests=2, size=SEEDS, ways=("in the expected direction", "in the opposite direction")
    )
    assert found.why.startswith("in the opposite direction, but not significant after Holm's correction for 2 tests")


def test_a_design_that_is_too_small_says_which_size_would_suffice():
    found = judge(0.05, -0.2, 0.3, 0.7, error=0.1, df=10)
    effect = detectable(0.1, 10, 4)
    assert found.detectable == pytest.approx(effect)
    # Errors fall with the square root of the number: 3 x (.397 / .1)^2 = 47.4.
    assert 3 * (effect / 0.1) ** 2 == pytest.approx(47.4, abs=0.1)
    assert found.why.endswith("; this run was too small: its detectable effect is 0.4; about 48 seeds would suffice")


@pytest.mark.parametrize(
    ("value", "low", "high", "error"),
    [
        # A design with detectable effect .12, below 1.5 times the smallest effect that matters.
        (0.05, -0.02, 0.12, 0.032),
        # An established effect, and a negligible one.
        (0.9, 0.5, 1.3, 0.1),
        (0.0, -0.05, 0.05, 0.1),
        # Without an error, nothing is known about the design.
        (0.05, -0.2, 0.3, math.nan),
        (0.05, -0.2, 0.3, 0.0),
    ],
)
def test_other_outcomes_do_not_ask_for_a_larger_design(value: float, low: float, high: float, error: float):
    assert "too small" not in judge(value, low, high, 0.01, error).why
