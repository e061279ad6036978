"""Hold the runs that pages show, and reopen them when a run has recorded more."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from entrace.analysis.runs import Runs, find_run_folders, open_runs
from entrace.analysis.trace.errors import InputError
from entrace.analysis.trace.manifest import MANIFEST

# Longest wait for a figure that is being drawn.
CLOSING_S = 10.0
# Bytes for DuckDB in this process; questions that need more spill to disk.
BUFFERS = 450 << 20


class Session:
    """Hold the opened runs and what was computed from them.

    Attributes:
        generation: Number of times that the runs were opened; a page that has seen a smaller one is out of date.
        problem: Why the runs could not be opened again; None if they could.
    """

    def __init__(self, paths: Sequence[str | Path], questions: str | Path | None = None) -> None:
        """Open the runs.

        Raises:
            InputError: as for ``open_runs``.
        """
        self._paths = list(paths)
        self._questions = questions
        self.generation = 0
        self.problem: str | None = None
        self._opening = threading.Lock()
        self._is_closed = False
        self._open(self._paths, self._find_stamps())

    def _open(self, paths: Sequence[str | Path], stamps: dict[str, int]) -> None:
        """Open runs, and keep ``stamps`` that were found before.

        A file that is written meanwhile then has a newer stamp.
        """
        opened: tuple[Runs, dict[Any, _Kept]] = (open_runs(paths, questions=self._questions, buffers=BUFFERS), {})
        # One assignment: what is computed from these runs is never kept for others.
        self._opened = opened
        self._stamps = stamps
        self.generation += 1

    @property
    def runs(self) -> Runs:
        """Return the runs that are open now."""
        return self._opened[0]

    def _find_stamps(self) -> dict[str, int]:
        """Return the time of the last write to ``run.json``, in ns, by folder.

        Runs that are gone are left out.
        """
        found: dict[str, int] = {}
        for path in self._paths:
            with suppress(InputError, OSError, AttributeError):
                for folder in find_run_folders([path]):
                    found[str(folder)] = (folder / MANIFEST).stat().st_mtime_ns
        return found

    def refresh(self) -> None:
        """Open the runs again if one of them has changed, is new, or is gone.

        ``problem`` then names the runs that are gone.
        """
        with self._opening:
            stamps = self._find_stamps()
            if stamps == self._stamps:
                return
            gone = [run for run, manifest in self.runs.manifests.items() if manifest["path"] not in stamps]
            try:
                self._open(list(stamps), stamps)
                self.problem = f"no longer there: {', '.join(gone)}" if gone else None
            except InputError as error:
                self._stamps = stamps
                self.problem = str(error) if stamps else "none of the runs exists any longer"
                self.generation += 1

    def once(self, key: Any, compute: Callable[[Runs], Any]) -> Any:
        """Return what ``compute`` returned for these runs and this key the first time.

        Threads that ask for one key compute it once; other keys do not wait for it.

        Raises:
            InputError: as for ``compute``, or the session is closed.
        """
        runs, cache = self._opened
        kept = cache.setdefault(key, _Kept())
        with kept.lock:
            if not kept.is_known:
                if self._is_closed:
                    raise InputError("the server is stopping")
                kept.value = compute(runs)
                kept.is_known = True
        return kept.value

    def close(self) -> None:
        """Stop what is being computed, and wait until it has ended."""
        self._is_closed = True
        self.runs.stop()
        deadline = time.monotonic() + CLOSING_S
        for kept in list(self._opened[1].values()):
            if kept.lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
                kept.lock.release()


class _Kept:
    """A computed value, and the lock of the thread that computes it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.is_known = False
        self.value: Any = None
