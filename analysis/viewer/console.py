"""Run the queries of the SQL console within limits, and stop them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from entrace.analysis.runs import Runs
from entrace.analysis.trace.errors import InputError
from entrace.analysis.viewer.cells import columns_of

if TYPE_CHECKING:
    import polars as pl

DEFAULT_ROWS, MOST_ROWS = 1000, 100_000
MEMORY, TIMEOUT_S = "1GiB", 300.0


class Console:
    """Queries that run now, by the name that their page gave them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # The end of a pipe to read from: a query ends when nobody reads its rows any more.
        self._running: dict[str, int] = {}

    def run(self, runs: Runs, name: str, text: str, limit: int) -> dict[str, Any]:
        """Run a query, and return its first rows.

        Returns:
            ``sql``, ``names``, ``columns``, ``types``, ``num_rows`` shown, ``has_more``, and ``seconds``.

        Raises:
            InputError: DuckDB rejects the query, a limit is reached, or the query was stopped.
        """
        import polars as pl

        if not 1 <= limit <= MOST_ROWS:
            raise InputError(f"row limit: {limit} is not between 1 and {MOST_ROWS:,}")
        started = time.monotonic()
        frames, height = [], 0
        for frame in self._stream(runs, name, text):
            frames.append(frame.head(limit - height))
            height += frame.height
            if height > limit:
                break
        found = pl.concat(frames)
        return {
            "sql": text,
            # An object of JavaScript would put names that are numbers first.
            "names": found.columns,
            "columns": columns_of(found),
            "types": {name: str(kind) for name, kind in found.schema.items()},
            "num_rows": found.height,
            "has_more": height > limit,
            "seconds": round(time.monotonic() - started, 3),
        }

    def _stream(self, runs: Runs, name: str, text: str) -> Iterator[pl.DataFrame]:
        reading, writing = os.pipe()
        with self._lock:
            if name in self._running:
                os.close(reading)
                os.close(writing)
                raise InputError(f'a query named "{name}" is running')
            self._running[name] = reading
        parts = runs.stream(text, {}, memory=MEMORY, timeout=TIMEOUT_S, reader=writing)
        try:
            yield from parts
        except BrokenPipeError:
            raise InputError("sql: stopped") from None
        finally:
            self.stop(name)
            os.close(writing)

    def stop(self, name: str) -> bool:
        """End a query; return whether it was running."""
        with self._lock:
            reading = self._running.pop(name, None)
        if reading is not None:
            os.close(reading)
        return reading is not None
