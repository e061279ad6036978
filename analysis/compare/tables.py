"""Build the frames of a comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from entrace.analysis.compare.pairs import arm_of
from entrace.analysis.compare.rows import Row
from entrace.analysis.compare.verdict import PRIMARY, Judged

if TYPE_CHECKING:
    import polars as pl

DIFFERENCES = {
    **dict.fromkeys(("arm", "baseline", "benchmark", "metric", "unit"), str),
    **dict.fromkeys(
        ("value", "baseline_value", "difference", "low", "high", "error", "df", "p_value", "p_adjusted", "detectable"),
        float,
    ),
    **dict.fromkeys(("verdict", "why"), str),
    **dict.fromkeys(("num_seeds", "num_prompts"), int),
    "covers": str,
    "is_primary": bool,
}
BY_SEED = {
    **dict.fromkeys(("arm", "baseline", "benchmark", "metric"), str),
    "seed": int,
    **dict.fromkeys(("value", "baseline_value", "difference"), float),
}
AGGREGATES = {
    "arm": str,
    **dict.fromkeys(
        ("iqm", "iqm_low", "iqm_high", "mean", "improvement", "improvement_low", "improvement_high"), float
    ),
    "num_seeds": int,
}
UNPAIRED = {"run_id": str, "arm": str, "seed": int, "status": str, "why": str}


def difference_table(judged: Sequence[Judged]) -> pl.DataFrame:
    """Return one row per difference; numbers that are not finite are null."""
    import polars as pl

    return pl.DataFrame([_record(found) for found in judged], schema=DIFFERENCES, orient="row")


def seed_table(rows: Sequence[Row]) -> pl.DataFrame:
    """Return one row per difference and paired seed."""
    import polars as pl

    records = [
        (row.arm, row.baseline, row.benchmark, row.metric, seed.seed, seed.value, seed.baseline_value, seed.difference)
        for row in rows
        for seed in sorted(row.seeds, key=lambda seed: seed.seed)
    ]
    return pl.DataFrame(records, schema=BY_SEED, orient="row")


def aggregate_table(records: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """Return one row per arm; missing and non-finite values are null."""
    import polars as pl

    rows = [[_finite(record.get(name)) for name in AGGREGATES] for record in records]
    return pl.DataFrame(rows, AGGREGATES, orient="row")


def unpaired_table(manifests: Mapping[str, Mapping[str, Any]], reasons: Mapping[str, str]) -> pl.DataFrame:
    """Return one row per excluded run, in the order of the runs."""
    import polars as pl

    records = [
        (run, arm_of(manifest), manifest.get("seed"), manifest.get("status"), reasons[run])
        for run, manifest in manifests.items()
        if run in reasons
    ]
    return pl.DataFrame(records, schema=UNPAIRED, orient="row")


def _record(found: Judged) -> tuple[Any, ...]:
    row = found.row
    names = (row.arm, row.baseline, row.benchmark, row.metric, row.unit)
    measured: list[float | None] = [None] * 8
    if row.difference and found.outcome:
        estimate = row.difference.estimate
        numbers = (estimate.value, estimate.low, estimate.high, estimate.error, estimate.df, estimate.p_value)
        measured = [_finite(number) for number in (*numbers, found.p_adjusted, found.outcome.detectable)]
    verdict = (found.verdict, found.why, len(row.seeds), row.num_prompts)
    covers = row.difference.covers if row.difference else None
    return (*names, row.value, row.baseline_value, *measured, *verdict, covers, row.metric == PRIMARY)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
