"""The frames of a comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.claims import INCONCLUSIVE
from analysis.compare.pairs import arm_of
from analysis.compare.rows import Row
from analysis.compare.verdict import PRIMARY, decide, metric_of
from analysis.stats import detectable, holm

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


def difference_table(rows: Sequence[Row]) -> pl.DataFrame:
    """Judges all rows together: the primary metric is one family of Holm's correction, all others are the second."""
    import polars as pl

    families = {
        is_primary: [row for row in rows if row.difference and (row.metric == PRIMARY) == is_primary]
        for is_primary in (True, False)
    }
    adjusted: dict[int, float] = {}
    for family in families.values():
        p_values = [row.difference.estimate.p_value for row in family if row.difference]
        adjusted |= zip(map(id, family), map(float, holm(p_values)), strict=True)
    records = [_judged(row, adjusted.get(id(row), 1.0), len(families[row.metric == PRIMARY])) for row in rows]
    return pl.DataFrame(records, schema=DIFFERENCES, orient="row")


def seed_table(rows: Sequence[Row]) -> pl.DataFrame:
    """One row per row and paired seed."""
    import polars as pl

    records = [
        (row.arm, row.baseline, row.benchmark, row.metric, seed.seed, seed.value, seed.baseline_value, seed.difference)
        for row in rows
        for seed in sorted(row.seeds, key=lambda seed: seed.seed)
    ]
    return pl.DataFrame(records, schema=BY_SEED, orient="row")


def aggregate_table(records: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """One row per arm; what a record leaves out is null."""
    import polars as pl

    return pl.DataFrame([[record.get(name) for name in AGGREGATES] for record in records], AGGREGATES, orient="row")


def unpaired_table(manifests: Mapping[str, Mapping[str, Any]], reasons: Mapping[str, str]) -> pl.DataFrame:
    """One row per run that takes no part, in the order of the runs."""
    import polars as pl

    records = [
        (run, arm_of(manifest), manifest.get("seed"), manifest.get("status"), reasons[run])
        for run, manifest in manifests.items()
        if run in reasons
    ]
    return pl.DataFrame(records, schema=UNPAIRED, orient="row")


def _judged(row: Row, p_adjusted: float, num_tests: int) -> tuple[Any, ...]:
    """One row of the table; what is not finite is null."""
    names = (row.arm, row.baseline, row.benchmark, row.metric, row.unit)
    num_seeds, is_primary = len(row.seeds), row.metric == PRIMARY
    if row.difference is None:
        numbers = (row.value, row.baseline_value, *[None] * 8)
        return (*names, *numbers, INCONCLUSIVE, row.note, num_seeds, row.num_prompts, None, is_primary)
    estimate = row.difference.estimate
    word, why = decide(row.difference, p_adjusted, num_tests, num_seeds, metric_of(row.metric))
    # An error of zero, as where both arms solve everything, says nothing about the design.
    found = detectable(row.difference.error or np.nan, row.difference.df, num_tests)
    error, df = row.difference.error, row.difference.df
    measured = (estimate.value, estimate.low, estimate.high, error, df, estimate.p_value, p_adjusted, found)
    return (
        *names,
        row.value,
        row.baseline_value,
        *(number if math.isfinite(number) else None for number in measured),
        word,
        f"{why} ({row.note})" if row.note else why,
        num_seeds,
        row.num_prompts,
        row.difference.covers,
        is_primary,
    )
