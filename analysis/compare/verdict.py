"""Define the metrics, their smallest differences that matter, and verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from entrace.analysis.statistics.estimates import holm
from entrace.analysis.verdict_rules import INCONCLUSIVE, MIN_RUNS, Outcome, Size, decide

if TYPE_CHECKING:
    from entrace.analysis.compare.paired import Bounds
    from entrace.analysis.compare.rows import Row

NO_DIFFERENCE = "no difference that matters"


@dataclass(frozen=True)
class Metric:
    """Describe a metric that arms are compared in.

    Attributes:
        unit: Unit of its differences.
        smallest: Smallest difference that matters.
        words: Verdicts on a positive and on a negative difference.
        bounds: Range of possible differences; None if unlimited.
        is_relative: True if differences are relative to the baseline.
    """

    unit: str
    smallest: float
    words: tuple[str, str] = ("higher", "lower")
    bounds: Bounds | None = None
    is_relative: bool = False


BETTER_HIGH, BETTER_LOW = ("better", "worse"), ("worse", "better")
OF_SHARES = (-1.0, 1.0)
PRIMARY = "avg_at_k"
STEPS = "steps_to_accuracy"
LENGTH = "response_length"
FORMAL = "formal_share"
# One percentage point of accuracy or of token share, one training step, .01 nats, 5% of the length.
METRICS = {
    PRIMARY: Metric("accuracy", 0.01, BETTER_HIGH, OF_SHARES),
    "maj_at_k": Metric("accuracy", 0.01, BETTER_HIGH, OF_SHARES),
    "pass_at_k": Metric("accuracy", 0.01, BETTER_HIGH, OF_SHARES),
    "accuracy_auc": Metric("accuracy, mean over training", 0.01, BETTER_HIGH, OF_SHARES),
    STEPS: Metric("steps", 1, BETTER_LOW),
    "entropy": Metric("nats per token", 0.01),
    LENGTH: Metric("of the baseline", 0.05, is_relative=True),
    FORMAL: Metric("share of tokens", 0.01, bounds=OF_SHARES),
}


@dataclass(frozen=True)
class Judged:
    """Hold a row with its verdict.

    Attributes:
        row: The difference, or the reason why there is none.
        verdict: One of ``Metric.words``, ``NO_DIFFERENCE``, or ``INCONCLUSIVE``.
        why: Reason, in words.
        p_adjusted: Holm-adjusted p-value within the family; None for a row that cannot earn a verdict.
        outcome: Outcome of ``decide`` regardless of the number of seeds; None without a difference.
    """

    row: Row
    verdict: str
    why: str
    p_adjusted: float | None = None
    outcome: Outcome | None = None

    @property
    def established(self) -> int:
        """Return the sign of a difference that earned a verdict, 0 otherwise."""
        earned = self.outcome and self.verdict in metric_of(self.row.metric).words
        return self.outcome.direction if self.outcome and earned else 0


def metric_of(name: str) -> Metric:
    """Return the metric of a name; ``pass_at_4`` and others give ``pass_at_k``."""
    return METRICS["pass_at_k" if name.startswith("pass_at_") else name]


def judge_rows(rows: Sequence[Row]) -> list[Judged]:
    """Judge all rows together, in their order.

    Holm's correction has two families: the primary metric, and all other metrics. A family contains the rows that can
    earn a verdict, those with at least ``MIN_RUNS`` seeds and a finite interval.
    """
    adjusted: dict[int, float] = {}
    num_tests = {}
    for is_primary in (True, False):
        family = [row for row in rows if (row.metric == PRIMARY) == is_primary and _may_earn_verdict(row)]
        p_values = [row.difference.estimate.p_value for row in family if row.difference]
        adjusted |= zip(map(id, family), map(float, holm(p_values)), strict=True)
        num_tests[is_primary] = max(len(family), 1)
    return [_judge(row, adjusted.get(id(row)), num_tests[row.metric == PRIMARY]) for row in rows]


def _may_earn_verdict(row: Row) -> bool:
    if row.difference is None or len(row.seeds) < MIN_RUNS:
        return False
    return row.difference.estimate.is_finite


def _judge(row: Row, p_adjusted: float | None, num_tests: int) -> Judged:
    """Judge one row.

    With fewer than ``MIN_RUNS`` seeds the verdict is inconclusive, and the reason states the result.

    - better or worse, higher or lower: the difference is established;
    - no difference that matters: the difference is negligible;
    - inconclusive: anything else.
    """
    if row.difference is None:
        return Judged(row, INCONCLUSIVE, row.note)
    estimate, metric, num_seeds = row.difference.estimate, metric_of(row.metric), len(row.seeds)
    outcome = decide(
        estimate,
        estimate.p_value if p_adjusted is None else p_adjusted,
        metric.smallest,
        num_tests=num_tests,
        size=Size(num_seeds, "seeds", "this comparison"),
        noun="difference",
    )
    why = outcome.why
    if not estimate.is_finite:
        equal = "the difference is equal in all seeds, so its error cannot be estimated"
        second = "seed" if row.num_prompts is None else "seed or prompt"
        why = equal if estimate.df > 0 else f"there is no interval, which needs a second {second}"
    word = INCONCLUSIVE
    if num_seeds < MIN_RUNS:
        seeds = "one seed" if num_seeds == 1 else f"{num_seeds} seeds"
        why = f"only {seeds}; a verdict needs {MIN_RUNS}. For these runs alone: {why}"
    elif outcome.direction:
        word = metric.words[outcome.direction < 0]
    elif outcome.is_negligible:
        word = NO_DIFFERENCE
    return Judged(row, word, f"{why} ({row.note})" if row.note else why, p_adjusted, outcome)
