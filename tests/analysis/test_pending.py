"""Test that a file matches its pattern only once run.json lists it.

Nothing is lost in between.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import polars as pl
import pytest

from entrace import open_runs
from entrace.analysis.trace import InputError, TraceWriter, digests, parts, read_manifest
from entrace.analysis.trace.parts import PENDING, check_parts, last_whole_step, move_listed
from entrace.analysis.trace.verify import verify_run
from tests.analysis.conftest import VOCAB, step_row

FIRST, SECOND = "part-000001-000001.parquet", "part-000002-000002.parquet"
# Of the folder of a table; DuckDB and polars match hidden names as well.
PATTERNS: dict[str, Callable[[Path], list[int]]] = {
    "duckdb, every file": lambda folder: [
        row[0] for row in duckdb.sql(f"select step from read_parquet('{folder}/*')").fetchall()
    ],
    "duckdb": lambda folder: [
        row[0] for row in duckdb.sql(f"select step from read_parquet('{folder}/*.parquet')").fetchall()
    ],
    "duckdb, any depth": lambda folder: [
        row[0]
        for row in duckdb.sql(f"select step from read_parquet('{folder.parents[1]}/**/{folder.name}/*')").fetchall()
    ],
    "pandas": lambda folder: pd.read_parquet(folder)["step"].tolist(),
    "polars": lambda folder: pl.read_parquet(folder)["step"].to_list(),
    "polars, every file": lambda folder: pl.read_parquet(f"{folder}/*")["step"].to_list(),
}


class Killed(BaseException):
    """Stand for SIGKILL: later writes do not reach the disk."""


def add_step(writer: TraceWriter, step: int) -> None:
    writer.append("steps", step_row(step, entropy=1.0, accuracy=0.5))
    writer.append("evals", {"step": step, "benchmark": "b", "prompt_id": "p", "sample_index": [0, 1], **EVAL})


EVAL: dict[str, Any] = {"answer": "1", "is_correct": True, "response_length": 1, "entropy_mean": 0.5, "temperature": 1}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Write one durable step."""
    writer = TraceWriter.create(tmp_path / "run", {"run_id": "r", "total_steps": 3}, VOCAB)
    add_step(writer, 1)
    writer.flush(1)
    return tmp_path / "run"


def flush_until(run_dir: Path, event: int) -> bool:
    """Flush a second step in a process that is killed at an event.

    Returns True if the event came about.
    """
    left = event

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left <= 0:
                raise Killed
            return call(*args, **kwargs)

        return wrapped

    writer = TraceWriter.resume(run_dir, 1)
    add_step(writer, 2)
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((Path, "replace"), (Path, "unlink"), (Path, "rmdir"), (os, "fsync"), (os, "open")):
            patch.setattr(owner, name, dying(getattr(owner, name)))
        try:
            writer.flush(2)
        except Killed:
            return True
    return False


def steps_of(run_dir: Path, table: str = "steps") -> list[int]:
    files = check_parts(run_dir, read_manifest(run_dir), digests.read(run_dir))[table]
    return pl.read_parquet(list(files), columns=["step"])["step"].to_list()


def tables_moved(run_dir: Path) -> int:
    return sum((run_dir / table / SECOND).exists() for table in ("steps", "evals"))


def test_a_killed_flush_shows_no_pattern_a_row_that_is_not_durable(run_dir: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(parts, "MOVE_TIMEOUT_S", 0.0)
    states = []
    for event in range(1, 100):
        copy = shutil.copytree(run_dir, tmp_path / str(event) / "run")
        if not flush_until(copy, event):
            break
        durable = read_manifest(copy)["last_durable_step"]
        states.append((durable, tables_moved(copy)))
        assert steps_of(copy) == list(range(1, durable + 1)), event
        assert sorted(steps_of(copy, "evals")) == sorted(2 * list(range(1, durable + 1))), event
        assert not verify_run(copy).findings
        assert last_whole_step(copy, read_manifest(copy)) == (durable, None)
        for name, read in PATTERNS.items():
            assert set(read(copy / "steps")) <= set(range(1, durable + 1)), (event, name)
        writer = TraceWriter.resume(copy, durable)
        assert {path.name for path in (copy / "steps").iterdir()} == {FIRST, SECOND} - (
            {SECOND} if durable < 2 else set()
        )
        assert not (copy / PENDING).exists()
        if durable < 2:
            add_step(writer, 2)
            writer.flush(2)
        assert steps_of(copy) == [1, 2]
        assert not verify_run(copy).findings
    else:
        pytest.fail("the flush never completed")
    assert states == sorted(states)
    assert {(1, 0), (2, 0), (2, 1), (2, 2)} == set(states)
    for name, read in PATTERNS.items():
        assert sorted(read(copy / "steps")) == [1, 2], name


def test_a_listed_file_that_did_not_move_can_be_damaged_or_lost(run_dir: Path, monkeypatch):
    monkeypatch.setattr(parts, "MOVE_TIMEOUT_S", 0.0)
    pending = run_dir / PENDING / f"steps.{SECOND}"
    event = next(
        event for event in range(1, 100) if flush_until(run_dir, event) and pending.exists() and is_listed(run_dir)
    )
    assert event > 1
    data = pending.read_bytes()
    pending.write_bytes(data[:100] + bytes(8) + data[108:])
    with pytest.raises(InputError, match=rf"\.pending/steps\.{SECOND}: .*; restore it, or go back to the checkpoint"):
        open_runs(run_dir)
    [finding] = verify_run(run_dir).findings
    assert (finding.state, finding.table, finding.file) == ("damaged", "steps", f"steps/{SECOND}")
    assert last_whole_step(run_dir, read_manifest(run_dir))[0] == 1
    pending.unlink()
    with pytest.raises(InputError, match=rf"steps/{SECOND}: missing, although run/run.json lists it"):
        open_runs(run_dir)


def is_listed(run_dir: Path) -> bool:
    return SECOND in read_manifest(run_dir)["files"]["steps"]


def test_a_reader_waits_for_a_writer_that_is_about_to_move_its_files(run_dir: Path):
    next(event for event in range(1, 100) if flush_until(run_dir, event) and is_listed(run_dir))
    assert (run_dir / PENDING / f"steps.{SECOND}").exists()
    threading.Timer(0.05, move_listed, (run_dir, read_manifest(run_dir))).start()
    runs = open_runs(run_dir)
    assert not (run_dir / PENDING).exists()
    assert runs.sql("select count(*) from steps").item() == 2


def test_rank_0_moves_the_files_of_all_ranks(tmp_path: Path):
    files: list[Any] = []

    def gather_of_rank_1(own: Any) -> list[Any]:
        files.append(own)
        return [own]

    writer = TraceWriter.create(tmp_path / "run", {"run_id": "r"}, VOCAB, gather=lambda own: [own, *files[:1]])
    other = TraceWriter.create(tmp_path / "run", {"run_id": "r"}, VOCAB, rank=1, gather=gather_of_rank_1)
    add_step(other, 1)
    other.flush(1)
    assert not list((tmp_path / "run" / "steps").iterdir())
    add_step(writer, 1)
    writer.flush(1)
    names = {path.name for path in (tmp_path / "run" / "evals").iterdir()}
    assert names == {FIRST, FIRST.replace(".parquet", ".rank-001.parquet")}
    assert not verify_run(tmp_path / "run").findings


def test_names_are_durable_before_a_run_is_complete(run_dir: Path, monkeypatch):
    writer = TraceWriter.resume(run_dir, 1)
    add_step(writer, 2)
    writer.flush(2)
    synced, sync = [], os.fsync

    def note(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    writer.finish()
    assert {"steps", "evals"} <= set(synced[: synced.index(".run.json.tmp")])


def test_a_removed_table_stays_removed(run_dir: Path):
    next(event for event in range(1, 100) if flush_until(run_dir, event) and is_listed(run_dir))
    shutil.rmtree(run_dir / "evals")
    assert open_runs(run_dir).sql("select count(*) from evals").item() == 0
    writer = TraceWriter.resume(run_dir, 2)
    writer.finish()
    assert not (run_dir / "evals").exists()
    assert not (run_dir / PENDING).exists()
    assert steps_of(run_dir) == [1, 2]


def test_a_flush_whose_files_cannot_move_can_be_repeated(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parts, "MOVE_TIMEOUT_S", 0.0)
    writer = TraceWriter.resume(run_dir, 1)
    add_step(writer, 2)
    replace = Path.replace

    def refuse(path: Path, target: Path) -> Path:
        if path.parent.name == PENDING and path.name.startswith("steps.part"):
            raise PermissionError(13, "Permission denied", str(target))
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        with pytest.raises(PermissionError):
            writer.flush(2)
    assert steps_of(run_dir) == [1, 2]
    writer.flush()
    assert {path.name for path in (run_dir / "steps").iterdir()} == {FIRST, SECOND}
    assert not (run_dir / PENDING).exists()
    assert steps_of(run_dir) == [1, 2]
    assert not verify_run(run_dir).findings
