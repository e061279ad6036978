"""Run the queries of the SQL console within limits, and stop them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from entrace.analysis.runs import Runs
from entrace.analysis.sandbox.process import LimitError
from entrace.analysis.terminal.export import write
from entrace.analysis.trace.errors import InputError
from entrace.analysis.viewer.cells import columns_of

if TYPE_CHECKING:
    import polars as pl

DEFAULT_ROWS, MOST_ROWS = 1000, 100_000
MEMORY, TIMEOUT_S = "1GiB", 300.0


@dataclass
class _Running:
    """A query that runs now.

    Attributes:
        reading: End of the pipe from which rows are read; closing it ends the query.
        percent: How much of it is done, as DuckDB estimates.
        num_rows: Rows received so far.
    """

    reading: int
    percent: float = 0.0
    num_rows: int = 0

    def note(self, percent: float) -> None:
        self.percent = percent


class Console:
    """Queries that run now, by the name that their page gave them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[str, _Running] = {}

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

    def export(self, runs: Runs, name: str, text: str, form: str, out: BinaryIO) -> None:
        """Write all rows of a query to a file, which may be larger than memory.

        Raises:
            InputError: as for ``run``, or the format cannot represent the type of a column.
        """
        write(self._stream(runs, name, text), form, out, is_safe=True)

    def progress(self, name: str) -> dict[str, float] | None:
        """Return ``percent`` and ``num_rows`` of a query so far; None if it does not run."""
        running = self._running.get(name)
        return running and {"percent": round(running.percent, 1), "num_rows": running.num_rows}

    def _stream(self, runs: Runs, name: str, text: str) -> Iterator[pl.DataFrame]:
        reading, writing = os.pipe()
        running = _Running(reading)
        with self._lock:
            if name in self._running:
                os.close(reading)
                os.close(writing)
                raise InputError(f'a query named "{name}" is running')
            self._running[name] = running
        parts = runs.stream(text, {}, memory=MEMORY, timeout=TIMEOUT_S, on_progress=running.note, reader=writing)
        try:
            for part in parts:
                running.num_rows += part.height
                yield part
        except BrokenPipeError:
            raise InputError("sql: stopped") from None
        except LimitError as error:
            raise InputError(f"sql: {error.fact}; filter or aggregate earlier, or add a LIMIT to the query") from None
        finally:
            self.stop(name)
            os.close(writing)

    def stop(self, name: str) -> bool:
        """End a query; return whether it was running."""
        with self._lock:
            running = self._running.pop(name, None)
        if running is not None:
            os.close(running.reading)
        return running is not None
