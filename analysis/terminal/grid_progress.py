"""Show the progress of a grid of runs on stderr.

A terminal shows a live table of arms; any other output gets plain lines.
"""

from __future__ import annotations

import heapq
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from entrace.analysis.terminal.progress import NAME_LENGTH, Display, Progress
from entrace.analysis.trace.plain import plain

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class RunState:
    """Hold the progress of one run.

    ``first`` and ``last`` are (time in s, finished steps) at its first and latest finished step; both are None before.
    """

    arm: str
    steps: int
    status: str = "waiting"
    done: int = 0
    accuracy: float | None = None
    first: tuple[float, int] | None = None
    last: tuple[float, int] | None = None


class GridProgress(Display):
    """Show the progress of the runs of a grid; use it as a context manager.

    Usage::

        with GridProgress("study", {"ppl-seed0": ("ppl", 120), ...}) as progress:
            progress.update("ppl-seed0", 7, accuracy=0.41)
            progress.end("ppl-seed0", error=None)
    """

    def __init__(self, title: str, runs: dict[str, tuple[str, int]]) -> None:
        """Prepare a table of ``runs``.

        ``runs`` maps each run id to the arm and the number of steps, in starting order.
        """
        self.title = plain(title, NAME_LENGTH)
        self.runs = {run_id: RunState(*run) for run_id, run in runs.items()}
        self._live: Any = None
        self._most_running = 1
        self._plain = None if sys.stderr.isatty() else Progress(title, sum(run.steps for run in self.runs.values()))

    def stop(self) -> None:
        """Leave the table as it is, and continue below it."""
        if self._live:
            self._live.stop()

    def update(self, run_id: str, done: int, **metrics: float) -> None:
        """Report that ``done`` steps of a run are complete; 0 means that the run starts."""
        run = self.runs[run_id]
        run.status, run.done = "running", max(done, run.done)
        run.accuracy = metrics.get("accuracy", run.accuracy)
        if done:
            run.last = (time.monotonic(), done)
            run.first = run.first or run.last
        self._most_running = max(self._most_running, sum(run.status == "running" for run in self.runs.values()))
        self._show(f"{run_id} step {done}" if done else "", **metrics)

    def end(self, run_id: str, error: str | None) -> None:
        """Report that a run is complete, or that it failed with ``error``."""
        run = self.runs[run_id]
        run.status, run.done = ("failed", run.done) if error else ("done", run.steps)
        self._show(f"{run_id} failed" if error else "")

    def seconds_left(self) -> float | None:
        """Return the estimated time in s until all unfinished runs end.

        None before any run has finished two steps. The estimate uses the mean time per step seen so far and the largest
        number of runs seen to run at once.
        """
        pace = [
            (run.last[0] - run.first[0], run.last[1] - run.first[1])
            for run in self.runs.values()
            if run.first and run.last
        ]
        steps = sum(part for _, part in pace)
        if not steps:
            return None
        per_step = sum(seconds for seconds, _ in pace) / steps
        open_runs = sorted(
            (run for run in self.runs.values() if run.status in ("running", "waiting")), key=lambda r: r.status
        )
        return makespan([(run.steps - run.done) * per_step for run in open_runs], self._most_running)

    def table(self) -> Table:
        """Return the table: one row per arm, and the time left."""
        from rich.table import Table
        from rich.text import Text

        left = self.seconds_left()
        # rich would interpret a plain string as markup.
        title = Text(self.title, "table.title")
        table = Table(title=title, caption=f"time left {'?' if left is None else clock(left)}", box=None)
        table.add_column("arm", overflow="fold")
        for column in ("done", "running", "failed", "waiting", "step", "accuracy"):
            table.add_column(column, justify="right")
        for arm in dict.fromkeys(run.arm for run in self.runs.values()):
            runs = [run for run in self.runs.values() if run.arm == arm]
            table.add_row(Text(plain(arm, NAME_LENGTH)), *_row(runs))
        return table

    def _show(self, note: str = "", **metrics: float) -> None:
        if self._plain:
            if note:
                self._plain.update(sum(run.done for run in self.runs.values()), note, **metrics)
        elif self._live is None:
            # The table starts with the first update, so an invalid grid prints its error line only.
            from rich.console import Console
            from rich.live import Live

            self._live = Live(get_renderable=self.table, console=Console(stderr=True), refresh_per_second=2)
            self._live.start()


def makespan(seconds: Iterable[float], slots: int) -> float:
    """Return the time until all runs end, with ``slots`` of them at once.

    Runs start in order, each as soon as a slot is free.
    """
    free_at = [0.0] * slots
    for duration in seconds:
        heapq.heappush(free_at, heapq.heappop(free_at) + duration)
    return max(free_at)


def clock(seconds: float) -> str:
    """Return hours, minutes, and seconds, as 1:02:03 or 2:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _row(runs: Sequence[RunState]) -> list[str]:
    counts = [sum(run.status == status for run in runs) for status in ("done", "running", "failed", "waiting")]
    steps = " ".join(f"{run.done}/{run.steps}" for run in runs if run.status == "running")
    seen = [run.accuracy for run in runs if run.accuracy is not None]
    return [*(str(count) if count else "" for count in counts), steps, f"{sum(seen) / len(seen):.3f}" if seen else ""]
