"""Show the progress of a query on stderr once it has taken a while."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from entrace.analysis.terminal.progress import Display, Progress

if TYPE_CHECKING:
    import polars as pl

SILENT_S = 2.0


class QueryProgress(Display):
    """Show the percentage done and the number of rows; use it as a context manager."""

    def __init__(self) -> None:
        """Start the clock; nothing is shown in the first two seconds."""
        self.num_rows = 0
        self._percent = 0.0
        self._started = time.monotonic()
        self._bar: Progress | None = None

    def stop(self) -> None:
        """Leave the bar as it is, if there is one."""
        if self._bar:
            self._bar.stop()

    def update(self, percent: float) -> None:
        """Note the percentage that DuckDB estimates."""
        self._percent = max(percent, self._percent)
        self._show()

    def counted(self, parts: Iterable[pl.DataFrame]) -> Iterator[pl.DataFrame]:
        """Yield the parts of a result, and count their rows."""
        for part in parts:
            self.num_rows += part.height
            self._show()
            yield part

    def _show(self) -> None:
        if time.monotonic() - self._started < SILENT_S:
            return
        if self._bar is None:
            self._bar = Progress("sql", 100)
            self._bar.start()
        # The last line belongs to the end of the query, which a percentage of 100 is not.
        self._bar.update(min(int(self._percent), 99), rows=self.num_rows)
