"""What each metric is, what difference of it matters, and which word a difference earns."""

from __future__ import annotations

import math
from dataclasses import dataclass

from analysis.claims import INCONCLUSIVE, MAX_P_VALUE
from analysis.compare.paired import Difference
from analysis.effects.estimate import MIN_RUNS

NO_DIFFERENCE = "no difference that matters"


@dataclass(frozen=True)
class Metric:
    """A quantity that arms are compared by.

    Attributes:
        unit: Of its values and differences.
        smallest: Smallest difference that matters.
        words: What a positive and a negative difference are called.
    """

    unit: str
    smallest: float
    words: tuple[str, str] = ("higher", "lower")


BETTER_HIGH, BETTER_LOW = ("better", "worse"), ("worse", "better")
PRIMARY = "avg_at_k"
STEPS = "steps_to_accuracy"
FORMAL = "formal_share"
# A point of accuracy or of token share, one training step, a hundredth of a nat, one token.
METRICS = {
    PRIMARY: Metric("accuracy", 0.01, BETTER_HIGH),
    "maj_at_k": Metric("accuracy", 0.01, BETTER_HIGH),
    "pass_at_k": Metric("accuracy", 0.01, BETTER_HIGH),
    "accuracy_auc": Metric("accuracy, mean over training", 0.01, BETTER_HIGH),
    STEPS: Metric("steps", 1, BETTER_LOW),
    "entropy": Metric("nats per token", 0.01),
    "response_length": Metric("tokens", 1),
    FORMAL: Metric("share of tokens", 0.01),
}


def metric_of(name: str) -> Metric:
    """The metric of a name; ``pass_at_4`` and its like are all ``pass_at_k``."""
    return METRICS["pass_at_k" if name.startswith("pass_at_") else name]


def decide(
    difference: Difference, p_adjusted: float, num_tests: int, num_seeds: int, metric: Metric
) -> tuple[str, str]:
    """Verdict and reason; the rule of ``claims.decide``, with words of its own.

    - better or worse, higher or lower: the interval excludes zero, p, adjusted for all differences of the family
      (Holm), is at most .05, and the difference is at least the smallest that matters;
    - no difference that matters: the whole interval lies below the smallest that matters, either way;
    - inconclusive: anything else, and whatever rests on fewer than ``MIN_RUNS`` seeds.
    """
    word, why = _decide(difference, p_adjusted, num_tests, metric)
    if num_seeds >= MIN_RUNS:
        return word, why
    seeds = "one seed" if num_seeds == 1 else f"{num_seeds} seeds"
    return INCONCLUSIVE, f"{seeds} only, a verdict needs {MIN_RUNS}. For these runs alone: {word}, {why}"


def _decide(difference: Difference, p_adjusted: float, num_tests: int, metric: Metric) -> tuple[str, str]:
    value, low, high = (getattr(difference.estimate, name) for name in ("value", "low", "high"))
    if not (math.isfinite(low) and math.isfinite(high)):
        if difference.df > 0:
            return INCONCLUSIVE, "the difference is equal throughout, so that its error cannot be estimated"
        return INCONCLUSIVE, "there is no interval"
    if max(-low, high) < metric.smallest:
        return NO_DIFFERENCE, f"the whole interval lies within ±{metric.smallest:g}"
    if low <= 0 <= high:
        return INCONCLUSIVE, "the interval holds zero as well as differences that matter"
    way = "higher" if value > 0 else "lower"
    if abs(value) < metric.smallest:
        return INCONCLUSIVE, f"{way}, but by less than {metric.smallest:g}, the smallest difference that matters"
    if p_adjusted > MAX_P_VALUE:
        among = f"among the {num_tests} differences judged together (p = {p_adjusted:.2g})"
        return INCONCLUSIVE, f"{way}, but not beyond chance {among}"
    return metric.words[value < 0], f"{way}, beyond chance, and by at least {metric.smallest:g}"
