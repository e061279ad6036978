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

from entrace.analysis.statistics.clusters import level, ratio
from entrace.analysis.statistics.estimates import Estimate, t_quantile
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

    Values that are not finite are None; one such value makes both ends None. Arguments as for ``estimate_mean``.
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
    columns = [column.to_numpy(zero_copy_only=False) for column in lists.flatten().flatten()]
    # A row without units carries no information.
    is_used = np.all([np.isfinite(column) for column in columns], axis=0) & ((columns[2] != 0) | (columns[3] != 0))
    used = np.flatnonzero(is_used)
    row = np.repeat(np.arange(len(lengths)), lengths)
    # Threads fill a list in any order, which would change the last digits.
    used = used[np.lexsort((columns[1][used], columns[0][used], row[used]))]
    row, steps, prompts, totals, counts = (column[used] for column in (row, *columns))
    ends = np.cumsum(np.bincount(row, minlength=len(lengths)))
    starts = np.append(0, ends[:-1])
    found = np.full((len(lengths), 3), np.nan)
    has_one_step = np.zeros(len(lengths), dtype=bool)
    filled = np.flatnonzero(ends > starts)
    has_one_step[filled] = steps[starts[filled]] == steps[ends[filled] - 1]
    of_one_step = has_one_step[row]
    found[has_one_step] = means_over_prompts(
        row[of_one_step], prompts[of_one_step], totals[of_one_step], counts[of_one_step], bounds
    )
    for i in filled[~has_one_step[filled]]:
        own = slice(starts[i], ends[i])
        dense = np.unique(prompts[own], return_inverse=True)[1]
        found[i] = mean_with_interval(steps[own], dense, totals[own], counts[own], bounds)
    fields = [pa.array(column, from_pandas=True) for column in np.where(np.isfinite(found), found, np.nan).T]
    return pa.StructArray.from_arrays(fields, ["value", "low", "high"])


def means_over_prompts(
    rows: np.ndarray, prompts: np.ndarray, totals: np.ndarray, counts: np.ndarray, bounds: Bounds
) -> np.ndarray:
    """Return ``mean_with_interval`` of lists of one step each, all at once.

    Args:
        rows: List of each entry, ascending.
        prompts: Prompt of each entry, ascending within a list.
        totals: As in ``estimate_mean``.
        counts: As in ``estimate_mean``.
        bounds: As in ``estimate_mean``.

    Returns:
        Means with the ends of their intervals, ``(lists, 3)``; nan where they are undefined.
    """
    num = len(np.unique(rows))
    is_new = np.append(True, np.diff(rows) != 0)[: len(rows)]
    at = np.cumsum(is_new) - 1
    cluster = np.cumsum(is_new | np.append(True, prompts[1:] != prompts[:-1])[: len(rows)]) - 1
    of = np.empty(int(cluster[-1]) + 1 if len(cluster) else 0, dtype=int)
    of[cluster] = at
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.bincount(at, totals, num) / np.bincount(at, counts, num)
        deviation, size = np.bincount(cluster, totals - mean[at] * counts), np.bincount(cluster, counts)
        deviations, sizes = np.bincount(of, deviation, num), np.bincount(of, size, num)
        value = mean + deviations / sizes
        # The jackknife of ``over_clusters``.
        without = mean[of] + (deviations[of] - deviation) / (sizes[of] - size)
        is_defined = np.isfinite(without)
        clusters, left = np.bincount(of, minlength=num), np.bincount(of, is_defined, num)
        center = np.bincount(of, np.where(is_defined, without, 0), num) / left
        squares = np.bincount(of, np.where(is_defined, without - center[of], 0) ** 2, num)
        error = np.sqrt((left - 1) / left * squares)
        df = sizes**2 / np.maximum(np.bincount(of, size**2, num), 1e-300) - 1
    has_error = (left >= np.maximum(2, clusters - 1)) & (df > 0)
    error, df = np.where(has_error, error, np.nan), np.where(has_error, df, 0)
    if np.isfinite(bounds).all():
        ends = ends_within(value, error, df, clusters, bounds)
    else:
        half = t_quantile(df) * error
        ends = value - half, value + half
    found = np.column_stack((value, np.maximum(ends[0], bounds[0]), np.minimum(ends[1], bounds[1])))
    found[~np.isfinite(found).all(1), 1:] = np.nan
    return found
