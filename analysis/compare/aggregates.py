"""Aggregate the scores of each arm and of its baseline over runs and benchmarks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from entrace.analysis.compare.measure import Evaluations
from entrace.analysis.compare.pairs import Pair
from entrace.analysis.statistics.aggregates import improvement_interval, iqm_interval

if TYPE_CHECKING:
    import polars as pl

# avg@k of each run, by benchmark and run_id.
Scores = dict[str, dict[str, float]]


def last_scores(
    pairs: Sequence[Pair], evaluations: Evaluations, benchmark: str, outcomes: Mapping[str, pl.DataFrame]
) -> dict[str, float]:
    """Return avg@k of each run at the last common evaluation.

    The step of this evaluation is the last that all runs of a baseline and its arms evaluated.
    """
    families: dict[str, set[str]] = {}
    for pair in pairs:
        families.setdefault(pair.baseline, set()).update(run for run in pair.run_ids if run in outcomes)
    scores = {}
    for family in filter(None, families.values()):
        last = evaluations.last_common_step(sorted(family), benchmark)
        if last > 0:
            scores |= {run: float(np.mean(outcomes[run].filter(step=last)["avg_at_k"].to_numpy())) for run in family}
    return scores


def aggregate_arms(
    arms: Mapping[tuple[str, str], Sequence[Pair]], scores: Scores, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Return one record per arm; see ``tables.AGGREGATES``.

    Each baseline is followed by its arms.
    """
    records = []
    for baseline in dict.fromkeys(baseline for _, baseline in arms):
        own = {arm: pairs for (arm, name), pairs in arms.items() if name == baseline}
        others = [pair.baseline_run for pairs in own.values() for pair in pairs]
        records.append(_aggregate(baseline, others, scores, rng))
        for arm, pairs in own.items():
            record = _aggregate(arm, [pair.run for pair in pairs], scores, rng)
            records.append(record | _improvement([pair.run for pair in pairs], others, scores, rng))
    return records


def _aggregate(arm: str, run_ids: Iterable[str], scores: Scores, rng: np.random.Generator) -> dict[str, Any]:
    runs = list(dict.fromkeys(run_ids))
    record: dict[str, Any] = {"arm": arm, "num_seeds": len(runs)}
    by_benchmark = [own for own in (_of(runs, scored) for scored in scores.values()) if own.size]
    if not by_benchmark:
        return record
    names = ("iqm", "iqm_low", "iqm_high")
    mean = float(np.mean([own.mean() for own in by_benchmark]))
    return record | dict(zip(names, iqm_interval(by_benchmark, rng), strict=True)) | {"mean": mean}


def _improvement(
    run_ids: Sequence[str], others: Iterable[str], scores: Scores, rng: np.random.Generator
) -> dict[str, float]:
    """Return the probability of improvement with its interval.

    It is empty if no benchmark has scores of both, or if each has one run of both: a single pair of runs gives 0 or 1.
    """
    beside = list(dict.fromkeys(others))
    both = [(_of(run_ids, scored), _of(beside, scored)) for scored in scores.values()]
    both = [(own, other) for own, other in both if own.size and other.size]
    if all(own.size == other.size == 1 for own, other in both):
        return {}
    names = ("improvement", "improvement_low", "improvement_high")
    found = improvement_interval([own for own, _ in both], [other for _, other in both], rng)
    return dict(zip(names, found, strict=True))


def _of(run_ids: Sequence[str], scored: Mapping[str, float]) -> np.ndarray:
    return np.array([scored[run] for run in run_ids if run in scored])
