"""Hold the runs that the pages show, and open them again when a run in training has recorded more."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from entrace.analysis.runs import Runs, find_run_folders, open_runs
from entrace.analysis.trace.errors import InputError
from entrace.analysis.trace.manifest import MANIFEST
from entrace.analysis.trace.places import to_place


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
        self._computing = threading.Lock()
        self._open(self._paths)

    def _open(self, paths: Sequence[str | Path]) -> None:
        runs = open_runs(paths, questions=self._questions)
        self.runs: Runs = runs
        self._cache: dict[Any, Any] = {}
        self._stamps = self._find_stamps()
        self.generation += 1

    def _find_stamps(self) -> dict[str, int | None]:
        """Return when each run.json was last written; None if it is gone."""
        found: dict[str, int | None] = {}
        for manifest in self.runs.manifests.values():
            path = to_place(manifest["path"]) / MANIFEST
            try:
                found[str(path)] = path.stat().st_mtime_ns
            except (OSError, AttributeError):
                found[str(path)] = None
        return found

    def refresh(self) -> None:
        """Open the runs again if one of them has changed; those that are gone are named and left out."""
        with self._opening:
            stamps = self._find_stamps()
            if stamps == self._stamps:
                return
            lost = [path for path in self._paths if not _is_there(path)]
            try:
                self._open([path for path in self._paths if path not in lost])
                self.problem = f"no longer there: {', '.join(map(str, lost))}" if lost else None
            except InputError as error:
                self._stamps = stamps
                self.problem = str(error)
                self.generation += 1

    def once(self, key: Any, compute: Callable[[Runs], Any]) -> Any:
        """Return what ``compute`` returned for these runs and this key the first time.

        Only one thread computes at a time: matplotlib and the connection of a ``Runs`` object allow no more.
        """
        with self._computing:
            return self.cached(key, compute)

    def cached(self, key: Any, compute: Callable[[Runs], Any]) -> Any:
        """Return the same as ``once``, for what several threads may compute, such as queries in other processes."""
        runs, cache = self.runs, self._cache
        if key not in cache:
            cache[key] = compute(runs)
        return cache[key]


def _is_there(path: str | Path) -> bool:
    try:
        return bool(find_run_folders([path]))
    except InputError:
        return False
