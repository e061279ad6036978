"""Define SQL functions that compute intervals of means.

The means are over prompts and steps. The code that judges claims computes the intervals.

Each function takes one list per output row, ``list(step_prompt(step, prompt_id, total, count))``, and returns
``struct(value, low, high)``: the ratio of all totals to all counts with its 95% interval. If all rows belong to one
step, the interval is over prompts; otherwise it is ``clusters.level`` over the steps. Rows with a null are dropped, and
an empty list gives null. Low and high are null if the interval is unbounded, as with a single prompt.

- ``estimate``: a mean of any real quantity.
- ``estimate_positive``: a mean of a nonnegative quantity, such as entropy.
- ``estimate_share``: a share in [0, 1].
- ``estimate_difference``: a difference of shares, in [-1, 1].

``random_top_share(list({'bin': potential_bin(p), 'tokens': n}), top)`` returns the share of movement in the top share
of tokens under random logit changes; see ``random_movement``.
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from entrace.analysis.statistics.clusters import level, levels, ratio
from entrace.analysis.statistics.estimates import Estimate
from entrace.analysis.statistics.random_movement import NUM_BINS, random_top_share
from entrace.analysis.statistics.shares import bounded, ends_within

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

Bounds = tuple[float, float]

BOUNDS: dict[str, Bounds] = {
    "estimate": (-np.inf, np.inf),
    "estimate_positive": (0.0, np.inf),
    "estimate_share": (0.0, 1.0),
    "estimate_difference": (-1.0, 1.0),
}
ROWS = "struct(step bigint, prompt ubigint, total double, count double)[]"
BINS = "struct(bin integer, tokens bigint)[]"
RESULT = "struct(value double, low double, high double)"

# DuckDB reports leaks if a connection with a Python function outlives the interpreter.
_connections: weakref.WeakSet[duckdb.DuckDBPyConnection] = weakref.WeakSet()


def register(con: duckdb.DuckDBPyConnection) -> None:
    """Register the functions on a connection."""
    for name, bounds in BOUNDS.items():
        options = {"type": "arrow", "null_handling": "special"}
        con.create_function(name, _on_lists(bounds), [ROWS], RESULT, **options)  # pyright: ignore
    con.create_function("random_top_share", lambda bins, top: _random_top_share(bins, top), [BINS, "double"], "double")
    _connections.add(con)


@atexit.register
def _close() -> None:
    for con in list(_connections):
        con.close()


def mean_with_interval(
    steps: np.ndarray, prompts: np.ndarray, totals: np.ndarray, counts: np.ndarray, bounds: Bounds
) -> tuple[float | None, float | None, float | None]:
    """Return ``sum(totals) / sum(counts)`` and the ends of its interval.

    This is the reference of ``means_with_intervals``, which the SQL functions call. Values that are not finite are
    None; one such value makes both ends None. Arguments as for ``estimate_mean``.
    """
    if not counts.sum():
        return None, None, None
    found = estimate_mean(steps, prompts, totals, counts, bounds)
    if not np.isfinite([found.value, found.low, found.high]).all():
        return (float(found.value) if np.isfinite(found.value) else None), None, None
    return found.value, max(found.low, bounds[0]), min(found.high, bounds[1])


def estimate_mean(
    steps: np.ndarray, prompts: np.ndarray, totals: np.ndarray, counts: np.ndarray, bounds: Bounds
) -> Estimate:
    """Estimate ``sum(totals) / sum(counts)`` over prompts or over several steps.

    The interval is over prompts if all rows belong to one step.

    Args:
        steps: Step of each row, ``(rows,)``.
        prompts: Prompt of each row, integers; a prompt may return at several steps.
        totals: Sum of the quantity over the row.
        counts: Number of units in the row, or another divisor of ``totals``; the sum must not be 0.
        bounds: Lowest and highest possible mean.
    """
    mean = float(totals.sum() / counts.sum())
    # Deviations add up to exactly 0 if all rows agree: rounding must not count as spread.
    sums = np.column_stack((totals - mean * counts, counts))
    found = level(steps, prompts, sums, ratio)
    found = found.moved_to(mean + found.value)
    if np.isfinite(bounds).all():
        found = bounded(found.value, found.error, found.df, found.n, found.of, bounds)
    return found


def _random_top_share(bins: Sequence[Mapping[str, int]], top: float) -> float:
    tokens = np.zeros(NUM_BINS)
    np.add.at(tokens, [entry["bin"] for entry in bins], [entry["tokens"] for entry in bins])
    return float(random_top_share(tokens, top))


def _on_lists(bounds: Bounds) -> Callable[[pa.ListArray], pa.StructArray]:
    # DuckDB counts the parameters of a function and evaluates its annotations; a lambda has no annotations.
    return lambda lists: estimates(lists, bounds)


def random_top_shares(bins: pa.ListArray, tops: pa.Array) -> pa.Array:
    """Return ``random_top_share`` of each list, for engines that pass columns."""
    import pyarrow as pa

    shares = [_random_top_share(*row) for row in zip(bins.to_pylist(), tops.to_pylist(), strict=True)]
    return pa.array(shares, pa.float64())


def estimates_of_prompts(lists: pa.ListArray, bounds: Bounds) -> pa.StructArray:
    """Return ``estimates`` of lists of prompts, for engines without DuckDB's hash."""
    import duckdb
    import pyarrow as pa

    step, prompt, total, count = lists.flatten().flatten()
    with duckdb.connect() as con:
        hashed = con.from_arrow(pa.table({"prompt": prompt})).project("hash(prompt) as prompt").to_arrow_table()
    rows = pa.StructArray.from_arrays(
        [step, hashed["prompt"].combine_chunks(), total, count], ["step", "prompt", "total", "count"]
    )
    ends = np.cumsum([0, *lists.value_lengths().fill_null(0).to_pylist()])
    return estimates(pa.ListArray.from_arrays(pa.array(ends, pa.int32()), rows), bounds)


def estimates(lists: pa.ListArray, bounds: Bounds) -> pa.StructArray:
    """Return the estimate of each list of ``step_prompt``: value, low, and high."""
    import pyarrow as pa

    lists = lists.combine_chunks() if isinstance(lists, pa.ChunkedArray) else lists
    lengths = lists.value_lengths().fill_null(0).to_numpy()
    step, prompt, total, count = lists.flatten().flatten()
    steps, totals, counts = (column.to_numpy(zero_copy_only=False) for column in (step, total, count))
    # A row without units carries no information.
    is_used = np.isfinite(steps) & np.isfinite(totals) & np.isfinite(counts) & ((totals != 0) | (counts != 0))
    used = np.flatnonzero(is_used & prompt.is_valid().to_numpy(zero_copy_only=False))
    row, prompts = np.repeat(np.arange(len(lengths)), lengths)[used], _ranks(prompt)[used]
    steps, totals, counts = steps[used], totals[used], counts[used]
    # Threads fill a list in any order, which would change the last digits.
    order = np.lexsort((prompts, _shortened(steps), _shortened(row)))
    row, steps, prompts, totals, counts = (column[order] for column in (row, steps, prompts, totals, counts))
    found = means_with_intervals(row, len(lengths), steps, prompts, totals, counts, bounds)
    fields = [pa.array(column, from_pandas=True) for column in found.T]
    return pa.StructArray.from_arrays(fields, ["value", "low", "high"])


def _ranks(prompts: pa.Array) -> np.ndarray:
    """Return the rank of each prompt among the distinct ones; any number for null."""
    encoded = prompts.dictionary_encode()
    distinct = encoded.dictionary.to_numpy(zero_copy_only=False)
    ranks = np.zeros(len(distinct) + 1, dtype=np.min_scalar_type(len(distinct)))
    ranks[np.argsort(distinct)] = np.arange(len(distinct))
    return ranks[encoded.indices.fill_null(len(distinct)).to_numpy(zero_copy_only=False)]


def _shortened(values: np.ndarray) -> np.ndarray:
    """Return integers minus their minimum in as few bits as possible.

    numpy sorts integers of 16 bits by their digits, in a tenth of the time.
    """
    values = values - values.min(initial=0)
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))


def means_with_intervals(
    lists: np.ndarray,
    num: int,
    steps: np.ndarray,
    prompts: np.ndarray,
    totals: np.ndarray,
    counts: np.ndarray,
    bounds: Bounds,
) -> np.ndarray:
    """Return ``mean_with_interval`` of several lists of rows, all at once.

    Args:
        lists: As in ``clusters.levels``.
        num: As in ``clusters.levels``.
        steps: As in ``clusters.levels``.
        prompts: As in ``clusters.levels``.
        totals: As in ``estimate_mean``.
        counts: As in ``estimate_mean``.
        bounds: As in ``estimate_mean``.

    Returns:
        Means with the ends of their intervals, ``(L, 3)``; nan where they are undefined.
    """
    is_bounded = bool(np.isfinite(bounds).all())
    starts = np.flatnonzero(np.diff(lists, prepend=-1))
    mean = np.full(num, np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean[lists[starts]] = np.add.reduceat(totals, starts) / np.add.reduceat(counts, starts)
        sums = np.column_stack((totals - mean[lists] * counts, counts))
    found = levels(lists, num, steps, prompts, sums, ratio, with_errors=is_bounded, with_p_values=False)
    with np.errstate(invalid="ignore"):
        value = mean + found.value
        if is_bounded:
            low, high = ends_within(value, found.error, found.df, found.n, bounds)
        else:
            shift = value - found.value
            low, high = np.maximum(found.low + shift, bounds[0]), np.minimum(found.high + shift, bounds[1])
    ends = np.column_stack((value, low, high))
    is_finite = np.isfinite(ends)
    ends[~is_finite.all(1), 1:] = np.nan
    ends[~is_finite[:, 0]] = np.nan
    return ends
