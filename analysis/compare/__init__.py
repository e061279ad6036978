"""Arms against their baseline: paired differences with intervals, verdicts, aggregates over seeds, what is left out.

Usage::

    comparison = compare(open_runs("data/runs/grid"))
    comparison.differences.filter(is_primary=True)

Runs are paired by seed, prompts by their text. ``paired.over_prompts_and_seeds`` is the interval of one arm, which
``moderate`` strengthens by what the other arms say; ``verdict.decide`` is the verdict, and ``rows`` says what each
metric is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.compare.aggregates import Scores, aggregate_arms, last_scores
from analysis.compare.measure import (
    TRAINING,
    Curve,
    Evaluations,
    Measured,
    measure,
    measure_training,
    name_prompts,
    read_prompts,
)
from analysis.compare.moderate import moderate
from analysis.compare.pairs import Pair, pair_runs
from analysis.compare.rows import Row, evaluation_rows, half_way, training_row
from analysis.compare.tables import aggregate_table, difference_table, seed_table, unpaired_table
from analysis.compare.verdict import PRIMARY
from analysis.runs import Runs
from analysis.trace.errors import InputError

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found, as polars frames; a number that is not finite is null.

    Attributes:
        differences: One row per arm, benchmark and metric: arm minus baseline with interval and verdict.
            ``is_primary`` marks avg@k, the metric that was fixed beforehand. ``error`` is the standard error, with
            ``df`` degrees of freedom. ``detectable`` is the smallest true difference that the design finds with 80 %
            power, ``covers`` says what the interval stands for.
        by_seed: One row per arm, benchmark, metric and paired seed.
        aggregates: One row per arm, the baseline included, on avg@k of the last evaluation, all benchmarks together:
            interquartile mean, mean, and the probability that a run scores higher than one of the baseline.
        unpaired: One row per run that takes no part, with the reason.
    """

    differences: pl.DataFrame
    by_seed: pl.DataFrame
    aggregates: pl.DataFrame
    unpaired: pl.DataFrame


def compare(runs: Runs, accuracy: float | None = None, seed: int = 0) -> Comparison:
    """Compares every arm with its baseline.

    Args:
        runs: The runs; complete ones take part.
        accuracy: Held-out accuracy that steps_to_accuracy counts the steps to; None is half way between the baseline's
            mean first and mean last, to .01.
        seed: Of the bootstraps of the aggregates.

    Raises:
        InputError: no run is of a baseline arm, or every run is, or ``accuracy`` is none.
    """
    if accuracy is not None and not 0 <= accuracy <= 1:
        raise InputError(f"accuracy: expected a number between 0 and 1, found {accuracy:g}")
    pairs, reasons = pair_runs(runs)
    rows, aggregates = _measure_all(runs, pairs, accuracy, seed) if pairs else ([], [])
    return Comparison(
        difference_table(rows), seed_table(rows), aggregate_table(aggregates), unpaired_table(runs.manifests, reasons)
    )


def _measure_all(
    runs: Runs, pairs: Sequence[Pair], accuracy: float | None, seed: int
) -> tuple[list[Row], list[dict[str, Any]]]:
    """Rows and aggregates, arms in the order of their gain in the primary metric, the largest first."""
    arms: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        arms.setdefault((pair.arm, pair.baseline), []).append(pair)
    run_ids = sorted({run for pair in pairs for run in pair.run_ids})
    prompts = read_prompts(runs, run_ids)
    evaluations = Evaluations(runs, run_ids)
    rows: list[Row] = []
    scores: Scores = {}
    for benchmark in evaluations.num_samples:
        outcomes = evaluations.outcomes(benchmark, prompts)
        scores[benchmark] = last_scores(pairs, evaluations, benchmark, outcomes)
        measured = {names: measure(own, evaluations, benchmark, outcomes) for names, own in arms.items()}
        for (arm, baseline), own in measured.items():
            level = half_way(_curves_beside(measured, baseline)) if accuracy is None else accuracy
            rows += evaluation_rows(arm, baseline, benchmark, own, len(arms[arm, baseline]), level)
    formal = name_prompts(runs.query("formal_sums", runs=run_ids), prompts)
    for (arm, baseline), own in arms.items():
        rows.append(training_row(arm, baseline, TRAINING, measure_training(own, formal), len(own)))
    order = sorted(arms, key=lambda names: (-_gain(rows, names), names))
    rows.sort(key=lambda row: order.index((row.arm, row.baseline)))
    return moderate(rows), aggregate_arms({names: arms[names] for names in order}, scores, np.random.default_rng(seed))


def _curves_beside(measured: dict[tuple[str, str], Measured], baseline: str) -> list[Curve]:
    """Curves of all pairs of a baseline, so that its arms are held against one accuracy."""
    return [curve for (_, name), own in measured.items() if name == baseline for curve in own.curves]


def _gain(rows: Sequence[Row], names: tuple[str, str]) -> float:
    """Mean difference in the primary metric over benchmarks; -inf for an arm without one."""
    gains = [
        row.difference.estimate.value
        for row in rows
        if (row.arm, row.baseline) == names and row.metric == PRIMARY and row.difference
    ]
    return float(np.mean(gains)) if gains else -np.inf
