"""Compare arms with their baseline.

The result has paired differences with intervals, verdicts, and aggregates over seeds.

Usage::

    comparison = compare(open_runs("data/runs/grid"))
    comparison.differences.filter(is_primary=True)

This is the only place that judges arms: the scorecard (``claims.judge_methods``), the report, and the figure
``paired_differences`` read their numbers from ``compare``. ``pairs`` pairs runs by seed and fingerprint. Prompts are
matched by text. ``rows`` defines the metrics. ``paired`` computes the interval of one arm, ``moderate`` shrinks its
variance toward those of the other arms, and ``verdict.judge_rows`` judges all rows together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from entrace.analysis.compare.aggregates import Scores, aggregate_arms, last_scores
from entrace.analysis.compare.measure import (
    TRAINING,
    Curve,
    Evaluations,
    Measured,
    measure,
    measure_training,
    name_prompts,
    read_prompts,
)
from entrace.analysis.compare.moderate import moderate
from entrace.analysis.compare.pairs import Pair, pair_runs, why_nothing_to_compare
from entrace.analysis.compare.rows import Row, evaluation_rows, half_way, training_row
from entrace.analysis.compare.tables import aggregate_table, difference_table, seed_table, unpaired_table
from entrace.analysis.compare.verdict import PRIMARY, Judged, judge_rows
from entrace.analysis.ledger import Ledger, load_ledger
from entrace.analysis.runs import Runs
from entrace.analysis.trace.arguments import checked
from entrace.analysis.trace.errors import InputError

if TYPE_CHECKING:
    import polars as pl


_kept: WeakKeyDictionary[Runs, dict[tuple[tuple[str, str], ...], Comparison]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Comparison:
    """Hold the result of ``compare`` as polars frames.

    Numbers that are not finite are null.

    Attributes:
        differences: One row per arm, benchmark, and metric: arm minus baseline with interval and verdict.
            ``is_primary`` marks avg@k, the prespecified metric. ``error`` is the standard error, with ``df`` degrees of
            freedom. ``p_adjusted`` is null for a row that cannot earn a verdict. ``detectable`` is the smallest true
            difference that the design detects with 80% power. ``covers`` names the population of the interval.
        by_seed: One row per arm, benchmark, metric, and paired seed.
        aggregates: One row per arm, including the baseline, on avg@k of the last evaluation over all benchmarks:
            interquartile mean, mean, and the probability that a run scores higher than a baseline run.
        unpaired: One row per excluded run, with the reason.
        judged: The rows behind ``differences``.
    """

    differences: pl.DataFrame
    by_seed: pl.DataFrame
    aggregates: pl.DataFrame
    unpaired: pl.DataFrame
    judged: Sequence[Judged] = ()


@checked
def compare(
    runs: Runs, accuracy: float | None = None, seed: int = 0, references: Mapping[str, str] | None = None
) -> Comparison:
    """Compare every arm with its baseline.

    Args:
        runs: The runs; incomplete ones are excluded.
        accuracy: Held-out accuracy that defines steps_to_accuracy; None for the midpoint of the baseline's mean first
            and mean last accuracy, rounded to .01.
        seed: Random seed of the bootstraps of the aggregates.
        references: By arm, a second arm to compare it with in the primary metric, besides its baseline; None for the
            references of the shipped claims.

    Raises:
        InputError: there is no run of a baseline arm, or of any other arm, or ``accuracy`` is not between 0 and 1.
    """
    if accuracy is not None and not 0 <= accuracy <= 1:
        raise InputError(f"accuracy: expected a number between 0 and 1, found {accuracy:g}")
    references = _shipped_references() if references is None else references
    if reason := why_nothing_to_compare(runs, references):
        raise InputError(reason)
    pairs, reasons = pair_runs(runs, references)
    rows, aggregates = _measure_all(runs, pairs, accuracy, seed) if pairs else ([], [])
    judged = judge_rows(rows)
    return Comparison(
        difference_table(judged),
        seed_table(rows),
        aggregate_table(aggregates),
        unpaired_table(runs.manifests, reasons),
        judged,
    )


def compare_once(runs: Runs, references: Mapping[str, str] | None = None) -> Comparison | None:
    """Return the cached ``compare`` of the runs.

    The result is None if the runs have no baseline or no other arm.
    """
    references = _shipped_references() if references is None else references
    if why_nothing_to_compare(runs, references):
        return None
    kept = _kept.setdefault(runs, {})
    key = tuple(sorted(references.items()))
    if key not in kept:
        kept[key] = compare(runs, references=references)
    return kept[key]


def references_of(ledger: Ledger) -> dict[str, str]:
    """Return the reference of each arm that has one.

    Claims of the ledger compare the arm with its reference instead of the baseline.
    """
    entries = [entry for entry in ledger.values() if "reference" in entry]
    return {arm: entry["reference"] for entry in entries for arm in entry["arms"]}


def _shipped_references() -> dict[str, str]:
    return references_of(load_ledger())


def _measure_all(
    runs: Runs, pairs: Sequence[Pair], accuracy: float | None, seed: int
) -> tuple[list[Row], list[dict[str, Any]]]:
    """Return the rows and the aggregates of all arms.

    Arms are in descending order of their gain in the primary metric.
    """
    arms: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        arms.setdefault((pair.arm, pair.baseline), []).append(pair)
    own_pairs = [pair for pair in pairs if not pair.is_extra]
    run_ids = sorted({run for pair in pairs for run in pair.run_ids})
    prompts = read_prompts(runs, run_ids)
    evaluations = Evaluations(runs, run_ids)
    rows: list[Row] = []
    scores: Scores = {}
    for benchmark in evaluations.num_samples:
        outcomes = evaluations.outcomes(benchmark, prompts)
        scores[benchmark] = last_scores(own_pairs, evaluations, benchmark, outcomes)
        measured = {names: measure(own, evaluations, benchmark, outcomes) for names, own in arms.items()}
        for (arm, baseline), own in measured.items():
            level = half_way(_curves_beside(measured, baseline)) if accuracy is None else accuracy
            rows += evaluation_rows(arm, baseline, benchmark, own, len(arms[arm, baseline]), level)
    formal = name_prompts(runs.ask("formal_sums", runs=run_ids), prompts)
    for (arm, baseline), own in arms.items():
        rows.append(training_row(arm, baseline, TRAINING, measure_training(own, formal), len(own)))
    # Claims with a reference other than the baseline are about the primary metric only.
    own_arms = {names: own for names, own in arms.items() if not own[0].is_extra}
    rows = [row for row in rows if row.metric == PRIMARY or (row.arm, row.baseline) in own_arms]
    order = sorted(arms, key=lambda names: (-_gain(rows, names), names))
    rows.sort(key=lambda row: order.index((row.arm, row.baseline)))
    in_order = {names: own_arms[names] for names in order if names in own_arms}
    return moderate(rows), aggregate_arms(in_order, scores, np.random.default_rng(seed))


def _curves_beside(measured: dict[tuple[str, str], Measured], baseline: str) -> list[Curve]:
    """Return the curves of all arms with this baseline.

    These arms share one accuracy to reach.
    """
    return [curve for (_, name), own in measured.items() if name == baseline for curve in own.curves]


def _gain(rows: Sequence[Row], names: tuple[str, str]) -> float:
    """Return the mean difference in the primary metric over benchmarks.

    The result is -inf if the arm has none.
    """
    gains = [
        row.difference.estimate.value
        for row in rows
        if (row.arm, row.baseline) == names and row.metric == PRIMARY and row.difference
    ]
    return float(np.mean(gains)) if gains else -np.inf
