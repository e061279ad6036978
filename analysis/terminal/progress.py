"""Show the progress of a command on stderr.

A terminal shows a live bar; any other output gets a line every 15 s.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from entrace.analysis.trace.plain import plain

PLAIN_LINE_EVERY_S = 15.0
# Longest name of a run, model, or figure beside the bar, in characters.
NAME_LENGTH = 80


class Display:
    """Show something on stderr while the block of a ``with`` statement runs."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start to show something; by default, the first update does."""

    def stop(self) -> None:
        """Leave the terminal as it was."""
        raise NotImplementedError


class Progress(Display):
    """Show finished steps, time left, and a few metrics; use it as a context manager.

    Usage::

        with Progress("train", total=120) as progress:
            progress.update(7, accuracy=0.41, entropy=0.22)
    """

    def __init__(self, title: str, total: int, *, final_line: bool = True) -> None:
        """Prepare a bar for ``total`` steps.

        If ``final_line``, the last step is printed without a terminal as well.
        """
        self.title, self.total = plain(title, NAME_LENGTH), total
        self._done = 0
        self._final_line = final_line
        self._first: tuple[float, int] | None = None
        self._last_line = time.monotonic()
        self._bar = _make_bar(self.title, total) if sys.stderr.isatty() else None

    def start(self) -> None:
        """Show the bar."""
        if self._bar:
            self._bar.start()

    def stop(self) -> None:
        """Leave the bar as it is, and continue below it."""
        if self._bar:
            self._bar.stop()

    def update(self, done: int, note: str = "", **metrics: float) -> None:
        """Report that ``done`` steps are complete.

        ``note`` and ``metrics`` appear beside the bar.
        """
        now = time.monotonic()
        if self._first is None:
            self._first = (now, done)
        words = [plain(note, NAME_LENGTH)] if note else []
        text = " ".join(words + [f"{name} {_short(value)}" for name, value in metrics.items()])
        self._done = done
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=done, metrics=text)
        elif now - self._last_line >= PLAIN_LINE_EVERY_S or (self._final_line and done >= self.total):
            self._last_line = now
            print(f"{self.title}: {done}/{self.total} {text} left {self._time_left(now)}", file=sys.stderr, flush=True)

    def _time_left(self, now: float) -> str:
        start, first = self._first or (now, 0)
        if self._done <= first:
            return "?"
        seconds = (now - start) / (self._done - first) * (self.total - self._done)
        return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


@contextmanager
def reading(name: str) -> Iterator[Callable[[float, int], None]]:
    """Show how much of a dump has been read, in percent.

    Yield a function of the share read, in [0, 1], and the number of rows.
    """
    with Progress(f"reading {name}, %", 100, final_line=False) as progress:
        yield lambda share, rows: progress.update(int(100 * share), f"{rows:,} rows")


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"


def _make_bar(title: str, total: int):
    # Importing rich takes time that only a terminal needs to spend.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=12),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
        # The last column may wrap, so a narrow terminal still shows the time left.
        TextColumn("{task.fields[metrics]}", markup=False, table_column=Column()),
        console=Console(stderr=True),
    )
    bar.add_task(title, total=total, metrics="")
    return bar
