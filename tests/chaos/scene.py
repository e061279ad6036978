"""Prepare runs, reports, and dumps that were never interrupted, for trials."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

import entrace
from entrace.analysis.trace import digests, read_manifest
from entrace.analysis.trace.digests import DIGESTS
from entrace.analysis.trace.parts import check_parts

from .commands import Started, draw_few_figures
from .kills import Harness
from .trial import require
from .victim import Board


class Scene:
    """Hold the folder in which the trials of one process take place.

    The scene also holds the results to compare with.

    Attributes:
        folder: Folder for everything.
        seed: Seed of all trials.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        """Prepare nothing yet: each part is made when a trial first needs it."""
        self.folder, self.seed = folder, seed

    @cached_property
    def harness(self) -> Harness:
        """Return the harness of training runs, with a run that was left alone."""
        return Harness(self.folder / "kills")

    @property
    def trace(self) -> Path:
        """Return a complete run of nine steps."""
        return self.harness.reference.run_dir

    def board(self) -> Board:
        """Return a new board for a command."""
        return Board.of(self.harness.context)

    def start(self, *arguments: Any, log: Path, **options: Any) -> Started:
        """Start a command; ``options`` as for ``Started``."""
        return Started(self.harness.context, *arguments, log=log, **options)

    @cached_property
    def report(self) -> tuple[dict[str, bytes], float]:
        """Return the files of a report that nothing interrupted, and its seconds."""
        with self.place("report/whole") as place:
            words = ["report", self.trace, "--out", place / "out"]
            ended = self.start(*words, log=place / "log.txt", prepare=draw_few_figures).end()
            require(ended.code == 0, ended.last_line)
            return contents(place / "out"), ended.seconds

    @cached_property
    def flip_trace(self) -> Path:
        """Return a run with checkpoints and interventions, whose files are damaged."""
        from .flips import make_trace

        return make_trace(self.folder / "flips")

    @cached_property
    def dump(self) -> Path:
        """Return the responses of the run as another trainer might have dumped them."""
        rows = entrace.open_runs(self.trace).sql(
            "select step, prompt, completion as response, reward from rollouts join prompts using (run_id, prompt_id) "
            "where step <= 4 order by step, rollout_id"
        )
        path = self.folder / "dump.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows.iter_rows(named=True)))
        return path

    @contextmanager
    def place(self, name: str) -> Iterator[Path]:
        """Yield a new folder for a trial, and remove it afterwards."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file except hidden ones and the list of digests.

    An interruption adds to that list.
    """
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.name != DIGESTS)
    return {
        path.as_posix(): (folder / path).read_bytes()
        for path in paths
        if not any(part.startswith(".") for part in path.parts)
    }


def differences(one: dict[str, bytes], other: dict[str, bytes]) -> str:
    """Return the names of files that differ."""
    return ", ".join(name for name in sorted(one | other) if one.get(name) != other.get(name))


def table_of(run_dir: Path, table: str) -> pl.DataFrame:
    """Return the rows of a table in order, without another process."""
    files = check_parts(run_dir, read_manifest(run_dir), digests.read(run_dir))[table]
    return pl.concat([pl.read_parquet(path) for path in files]) if files else pl.DataFrame()
