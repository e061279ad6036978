"""Decide whether an effect is established, negligible, or neither.

The scorecard (``claims``) and the comparison of arms (``compare``) both call ``decide`` and map its neutral outcome to
their own words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from entrace.analysis.statistics.estimates import Estimate, detectable

SUPPORTED, CONTRADICTED, INCONCLUSIVE, NOT_RECORDED = "supported", "contradicted", "inconclusive", "not recorded"
MAX_P_VALUE = 0.05
# Runs per arm that a verdict needs: two runs say next to nothing about the spread between runs.
MIN_RUNS = 3
# A design is too small if its detectable effect exceeds the smallest effect that matters by this factor.
TOO_SMALL = 1.5
# Beyond this factor, the size of a sufficient design is too uncertain to report.
FAR_LARGER = 100


@dataclass(frozen=True)
class Outcome:
    """Hold the result of ``decide``.

    Attributes:
        direction: +1 or -1 if an effect that matters is established, 0 otherwise.
        is_negligible: True if the whole interval lies within ± the smallest effect that matters.
        why: Reason, in words.
        detectable: See ``detectable_effect``.
    """

    direction: int
    is_negligible: bool
    why: str
    detectable: float


@dataclass(frozen=True)
class Size:
    """Describe the units that limit a design, for the advice on a larger one.

    Attributes:
        n: Number of units.
        units: Name of the units, in the plural.
        subject: Name of the design in the advice.
    """

    n: int
    units: str
    subject: str = "this run"


def detectable_effect(estimate: Estimate, num_tests: int) -> float:
    """Return the effect that the design detects with 80% power.

    The effect is tested among ``num_tests`` tests. Returns nan if the error is unknown, or 0 because all prompts agree:
    such an error says nothing about the design.
    """
    if not estimate.error > 0 or math.isnan(estimate.df):
        return math.nan
    return float(detectable(estimate.error, estimate.df, num_tests))


def decide(
    estimate: Estimate,
    p_adjusted: float,
    smallest_effect: float,
    *,
    num_tests: int,
    size: Size,
    noun: str = "effect",
    ways: tuple[str, str] = ("higher", "lower"),
) -> Outcome:
    """Judge an effect by its interval, its adjusted p-value, and its size.

    - Established: the interval excludes zero, ``p_adjusted`` is at most .05, and the absolute effect is at least
      ``smallest_effect``.
    - Negligible: the whole interval lies within ± ``smallest_effect``.
    - Inconclusive: anything else. The reason says if the design was too small.

    Args:
        estimate: Effect with interval, standard error, and degrees of freedom.
        p_adjusted: P-value, adjusted for all tests judged together.
        smallest_effect: Smallest effect that matters.
        num_tests: Number of tests judged together.
        size: Units that limit the design.
        noun: Word for an effect in the reason.
        ways: Words for a positive and a negative effect in the reason.
    """
    found = detectable_effect(estimate, num_tests)
    value, low, high = estimate.value, estimate.low, estimate.high
    if not (math.isfinite(value) and math.isfinite(low) and math.isfinite(high)):
        return Outcome(0, False, f"the {noun} or its interval is not finite", found)
    if max(-low, high) < smallest_effect:
        why = f"no {noun} that matters: the whole interval lies within ±{smallest_effect:g}"
        return Outcome(0, True, why, found)
    way = ways[value < 0]
    if low <= 0 <= high:
        why = f"the interval includes zero as well as {noun}s that matter"
    elif abs(value) < smallest_effect:
        why = f"{way}, but smaller than {smallest_effect:g}, the smallest {noun} that matters"
    elif p_adjusted > MAX_P_VALUE:
        why = f"{way}, but not significant after Holm's correction for {num_tests} tests (p = {p_adjusted:.2g})"
    else:
        return Outcome(1 if value > 0 else -1, False, f"{way}, significant, and at least {smallest_effect:g}", found)
    return Outcome(0, False, "; ".join(filter(None, (why, _too_small(found, smallest_effect, size)))), found)


def _too_small(found: float, smallest_effect: float, size: Size) -> str:
    """Return advice on a sufficient size; empty if the size suffices.

    The size suffices if the design can detect effects near the smallest that matters.
    """
    if not (math.isfinite(found) and found > TOO_SMALL * smallest_effect):
        return ""
    enough = size.n * (found / smallest_effect) ** 2
    small = f"{size.subject} was too small: its detectable effect is {found:.2g}"
    if enough > FAR_LARGER * size.n:
        return f"{small}; more than {FAR_LARGER} times its {size.n:,} {size.units} would be needed"
    # Two significant digits: the error itself is an estimate.
    unit = 10 ** max(math.floor(math.log10(enough)) - 1, 0)
    return f"{small}; about {math.ceil(enough / unit) * unit:,} {size.units} would suffice"
