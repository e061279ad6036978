"""SQL functions that give a mean over prompts and steps its interval, with the code that judges claims.

Each takes one list per output row, ``list(step_prompt(step, prompt_id, total, count))``, and returns
``struct(value, low, high)``: the ratio of all totals to all counts with its 95 % interval. Where all rows are of one
step, the interval is over prompts; otherwise it is ``intervals.level`` over the steps. Rows with a null are left out,
and an empty list gives null. Low and high are null where nothing bounds the mean, as with a single prompt.

- ``estimate``: a mean of any real quantity.
- ``estimate_positive``: a mean of what cannot be negative, such as entropy.
- ``estimate_share``: a share in [0, 1].
- ``estimate_difference``: a difference of shares, in [-1, 1].

``random_top_share(list({'bin': potential_bin(p), 'tokens': n}), top)`` is the share of movement that the tokens
that move most carry under random logit changes; see ``effects.potential``.
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from entrace.analysis.statistics import intervals
from entrace.analysis.statistics.estimates import Estimate

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

# DuckDB complains of leaks when a connection with a Python function outlives the interpreter.
_connections: weakref.WeakSet[duckdb.DuckDBPyConnection] = weakref.WeakSet()


def register(con: duckdb.DuckDBPyConnection) -> None:
    """Add the functions to a connection."""
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
    """Return ``sum(totals) / sum(counts)`` and the ends of its interval, None where they are not finite.

    Arguments as for ``estimate_mean``.
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
    """Estimate ``sum(totals) / sum(counts)`` over prompts of one step, or over several steps.

    Args:
        steps: Step of each row, ``(rows,)``.
        prompts: Prompt of each row, integers; a prompt may return at several steps.
        totals: Sum of the quantity over the row.
        counts: Number of units in the row, or whatever else divides ``totals``; their sum must not be 0.
        bounds: Lowest and highest possible mean.
    """
    mean = float(totals.sum() / counts.sum())
    # Deviations add up to exactly 0 where all rows agree, so that no rounding passes for a spread.
    sums = np.column_stack((totals - mean * counts, counts))
    found = intervals.level(steps, prompts, sums, lambda added: mean + intervals.ratio(added))
    if np.isfinite(bounds).all():
        found = intervals.bounded(found.value, found.error, found.df, found.n, found.of, bounds)
    return found


def _random_top_share(bins: Sequence[Mapping[str, int]], top: float) -> float:
    from entrace.analysis.effects.potential import NUM_BINS, random_top_share

    tokens = np.zeros(NUM_BINS)
    np.add.at(tokens, [entry["bin"] for entry in bins], [entry["tokens"] for entry in bins])
    return float(random_top_share(tokens, top))


def _on_lists(bounds: Bounds) -> Callable[[pa.ListArray], pa.StructArray]:
    # DuckDB counts the parameters and evaluates annotations; a lambda has one and none.
    return lambda lists: _estimates(lists, bounds)


def _estimates(lists: pa.ListArray, bounds: Bounds) -> pa.StructArray:
    import pyarrow as pa

    lists = lists.combine_chunks() if isinstance(lists, pa.ChunkedArray) else lists
    lengths = lists.value_lengths().fill_null(0).to_numpy()
    columns = [column.to_numpy(zero_copy_only=False) for column in lists.flatten().flatten()]
    steps, prompts, totals, counts = columns
    # A row without units says nothing.
    is_used = np.all([np.isfinite(column) for column in columns], axis=0) & ((totals != 0) | (counts != 0))
    ends = np.cumsum(lengths)
    found = []
    for start, end in zip(ends - lengths, ends, strict=True):
        used = np.flatnonzero(is_used[start:end]) + start
        # Threads fill a list in any order, which would show in the last digits.
        used = used[np.lexsort((prompts[used], steps[used]))]
        dense = np.unique(prompts[used], return_inverse=True)[1]
        found.append(mean_with_interval(steps[used], dense, totals[used], counts[used], bounds))
    fields = [pa.array([row[i] for row in found], pa.float64()) for i in range(3)]
    return pa.StructArray.from_arrays(fields, ["value", "low", "high"])
