"""Format a comparison as text or JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from entrace.analysis.compare.rows import metric_names
from entrace.analysis.terminal.export import readable
from entrace.analysis.trace.errors import InputError, nearest

if TYPE_CHECKING:
    import polars as pl

    from entrace.analysis.compare import Comparison

ALL = "all"


def choose_metrics(comparison: Comparison, metrics: Sequence[str]) -> Comparison:
    """Keep the rows of some metrics.

    P-values remain adjusted for all rows judged together.

    Raises:
        InputError: a metric is unknown.
    """
    import polars as pl

    if ALL in metrics:
        return comparison
    known = [*dict.fromkeys(comparison.differences["metric"])] or metric_names(8)
    for name in metrics:
        if name not in known:
            raise InputError(f'unknown metric "{name}"{nearest(name, [*known, ALL])}')
    differences, by_seed = (
        frame.filter(pl.col("metric").is_in(list(metrics))) for frame in (comparison.differences, comparison.by_seed)
    )
    return replace(comparison, differences=differences, by_seed=by_seed)


def to_json(comparison: Comparison) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of all frames by name."""
    names = ("differences", "by_seed", "aggregates", "unpaired")
    return {name: getattr(comparison, name).to_dicts() for name in names}


def to_text(comparison: Comparison) -> str:
    """Format differences with their reasons, aggregates, and excluded runs."""
    lines = list(_difference_lines(readable(comparison.differences)))
    lines += ["", *_aggregate_lines(readable(comparison.aggregates))] if comparison.aggregates.height else []
    lines += ["", *_unpaired_lines(readable(comparison.unpaired))] if comparison.unpaired.height else []
    return "\n".join(lines)


def _difference_lines(frame: pl.DataFrame) -> Iterator[str]:
    if frame.is_empty():
        yield "nothing to compare: no complete run of an arm can be paired with a run of its baseline"
        return
    import polars as pl

    yield "Differences from the baseline, paired by seed and prompt, with 95% intervals; errors moderated across arms"
    is_twice = pl.col("baseline").n_unique().over("arm") > 1
    named = pl.when(is_twice).then(pl.col("arm") + " vs " + pl.col("baseline")).otherwise("arm")
    frame = frame.with_columns(arm=named)
    widths = {name: max(map(len, frame[name])) for name in ("arm", "benchmark", "metric", "verdict")}
    for row in frame.iter_rows(named=True):
        names = "  ".join(f"{row[name]:<{width}}" for name, width in widths.items())
        yield f"{names}  {_interval(row['difference'], row['low'], row['high'], '+')} {row['unit']}".rstrip()
        yield f"    {row['why']}"
        if row["difference"] is not None:
            yield f"    {'; '.join(_details(row))}"


def _details(row: dict[str, Any]) -> Iterator[str]:
    yield f"{_number(row['value'])} vs. {_number(row['baseline_value'])} of {row['baseline']}"
    yield f"n = {_count(row, 'seed')}" + (f", {_count(row, 'prompt')}" if row["num_prompts"] else "")
    if row["low"] is not None:
        yield f"interval covers {row['covers'].replace('; ', ', ')}"
    if row["p_adjusted"] is not None:
        yield f"p = {row['p_value']:.2g}, Holm-adjusted {row['p_adjusted']:.2g}"
    if row["detectable"] is not None:
        yield f"detectable effect {_number(row['detectable'])}"


def _aggregate_lines(frame: pl.DataFrame) -> Iterator[str]:
    yield "avg@k over seeds and benchmarks: interquartile mean, mean, probability of improvement over the baseline"
    width = max(map(len, frame["arm"]))
    for row in frame.iter_rows(named=True):
        if row["iqm"] is None:
            yield f"{row['arm']:<{width}}  no common last evaluation, n = {_count(row, 'seed')}"
            continue
        line = f"{row['arm']:<{width}}  {_interval(row['iqm'], row['iqm_low'], row['iqm_high'])}"
        line += f"  mean {_number(row['mean'])}"
        if row["improvement"] is not None:
            better = _interval(row["improvement"], row["improvement_low"], row["improvement_high"])
            line += f"  improvement {better}"
        yield f"{line}  n = {_count(row, 'seed')}"
    if frame["iqm"].count() > frame["iqm_low"].count():
        yield "An interval and a probability of improvement need a second seed"
    elif frame["improvement"].is_in([0.0, 1.0]).any():
        yield "Bootstrap intervals are too narrow with few seeds; at an improvement of 0 or 1 they have no width"


def _unpaired_lines(frame: pl.DataFrame) -> Iterator[str]:
    yield "Excluded runs"
    width = max(map(len, frame["run_id"]))
    for row in frame.iter_rows(named=True):
        yield f"{row['run_id']:<{width}}  {row['why']}"


def _count(row: dict[str, Any], noun: str) -> str:
    return f"{row[f'num_{noun}s']:,} {noun}{'s' * (row[f'num_{noun}s'] != 1)}"


def _interval(value: float | None, low: float | None, high: float | None, sign: str = "") -> str:
    if value is None:
        return "-"
    ends = f"[{_number(low, sign)}, {_number(high, sign)}]" if low is not None else "[no interval]"
    return f"{_number(value, sign)} {ends}"


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.3g}"
