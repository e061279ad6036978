"""Test that pruning keeps what a sampled recording would hold.

Pruning may be interrupted in any state.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from entrace import open_runs
from entrace.analysis.trace import InputError, TraceWriter, read_manifest, write_manifest
from entrace.analysis.trace import prune as prune_module
from entrace.analysis.trace.digests import DIGESTS
from entrace.analysis.trace.lock import acquire_lock
from entrace.analysis.trace.prune import prune
from entrace.analysis.trace.sampling import TokenSampling, response_draws
from entrace.analysis.trace.verify import accept_edits, verify_run
from tests.analysis.synthetic import write_run
from tests.patience import without_progress
from tests.slow import slow_after

STEPS, EVERY = 40, 20
SAMPLING = TokenSampling(3, 0.25)
# Kills itself at the given event: the creation, rename, or removal of a file.
KILLED = """
import os, signal, sys
from pathlib import Path
from entrace.analysis.trace.prune import prune
from entrace.analysis.trace.sampling import TokenSampling

left = int(sys.argv[2])

def dying(call):
    def wrapped(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return wrapped

Path.replace, Path.unlink, os.fsync = dying(Path.replace), dying(Path.unlink), dying(os.fsync)
prune(Path(sys.argv[1]), TokenSampling(3, 0.25))
"""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of 40 steps in two files; after-update values at every fifth step."""
    return write_run(tmp_path_factory.mktemp("runs") / "full" / "run", steps=STEPS, groups=4, seed=5)


@pytest.fixture
def run_dir(recorded: Path, tmp_path: Path) -> Path:
    shutil.copytree(recorded, tmp_path / "run")
    return tmp_path / "run"


def tokens(run: Path) -> pl.DataFrame:
    return open_runs(run).sql("select * from tokens order by rollout_id, position")


def expected(recorded: Path, sampling: TokenSampling) -> pl.DataFrame:
    """Return the rows that the rule keeps, without the code under test."""
    found = tokens(recorded)
    draws = response_draws(5, found["step"].to_numpy(), found["rollout_id"].to_numpy())
    found = found.filter(pl.Series(draws < sampling.responses))
    captured = found.filter(pl.col("logprob_after").is_not_null())["step"].unique().to_list()
    step = pl.col("step")
    return found.filter(step.is_in([1, STEPS, *captured]) | (step % sampling.steps == 0))


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file except the list of digests.

    An interruption adds lines to that list.
    """
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != DIGESTS)
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize(
    "sampling", slow_after(2, [SAMPLING, TokenSampling(50, 0.5), TokenSampling(7), TokenSampling(responses=0.1)])
)
def test_the_sampled_tokens_remain_and_nothing_else_changes(recorded: Path, run_dir: Path, sampling: TokenSampling):
    before = contents(run_dir)
    result = prune(run_dir, sampling)
    found = tokens(run_dir)
    assert found.equals(expected(recorded, sampling))
    if sampling == TokenSampling(7):
        assert sorted(set(found["step"])) == [1, 5, 7, 10, 14, 15, 20, 21, 25, 28, 30, 35, 40]
    assert (result.rows_before, result.rows_after) == (len(tokens(recorded)), len(found))
    assert not verify_run(run_dir).faults
    after = contents(run_dir)
    sizes = [sum(len(data) for name, data in files.items() if "tokens/" in name) for files in (before, after)]
    assert [result.bytes_before, result.bytes_after] == sizes
    assert sizes[1] < sizes[0] / 2
    for name in before.keys() - {name for name in before if "tokens/" in name} - {"run.json"}:
        assert after[name] == before[name], name
    manifest, old = json.loads(after["run.json"]), json.loads(before["run.json"])
    assert manifest.pop("token_sampling") == {"steps": sampling.steps, "responses": sampling.responses}
    assert manifest | {"files": old["files"]} == old
    assert manifest["files"] == old["files"] | {"tokens": manifest["files"]["tokens"]}
    assert sum(manifest["files"]["tokens"].values()) == len(found)


def test_pruning_again_changes_nothing(run_dir: Path):
    prune(run_dir, SAMPLING)
    before = contents(run_dir)
    result = prune(run_dir, SAMPLING)
    assert result.rows_before == result.rows_after > 0
    assert contents(run_dir) == before


def test_pruning_in_two_steps_equals_pruning_once(recorded: Path, run_dir: Path):
    prune(run_dir, TokenSampling(2, 0.5))
    prune(run_dir, TokenSampling(3, 0.25))
    assert tokens(run_dir).equals(expected(recorded, TokenSampling(6, 0.25)))
    assert read_manifest(run_dir)["token_sampling"] == {"steps": 6, "responses": 0.25}
    assert {path.name for path in (run_dir / "tokens").iterdir()} == {
        "part-000001-000020.pruned-2.parquet",
        "part-000021-000040.pruned-2.parquet",
    }


def test_rows_are_read_and_written_in_bounded_parts(recorded: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prune_module, "ROWS_AT_ONCE", 100)
    monkeypatch.setattr(prune_module, "ROW_GROUP", 250)
    prune(run_dir, SAMPLING)
    assert tokens(run_dir).equals(expected(recorded, SAMPLING))
    for path in (run_dir / "tokens").iterdir():
        file = pq.ParquetFile(path)
        groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        assert len(groups) > 3
        assert max(groups) < 250 + 100
        old = pq.ParquetFile(recorded / "tokens" / f"{path.name.split('.')[0]}.parquet")
        assert file.schema_arrow.equals(old.schema_arrow, check_metadata=True)
        kinds = [
            {c.path_in_schema: c.encodings for c in (f.metadata.row_group(0).column(i) for i in range(18))}
            for f in (file, old)
        ]
        assert kinds[0] == kinds[1]


def test_a_dry_run_counts_and_changes_nothing(run_dir: Path):
    before = contents(run_dir)
    guess = prune(run_dir, SAMPLING, dry_run=True)
    assert contents(run_dir) == before
    assert not (run_dir.parent / ".locks").exists()
    found = prune(run_dir, SAMPLING)
    assert (guess.rows_before, guess.rows_after) == (found.rows_before, found.rows_after)
    assert guess.bytes_after == pytest.approx(found.bytes_after, rel=0.5)


@pytest.mark.slow
def test_a_killed_prune_leaves_the_old_or_the_new_trace_and_can_be_repeated(recorded: Path, tmp_path: Path):
    old, new = tokens(recorded), expected(recorded, SAMPLING)
    finished = tmp_path / "finished"
    shutil.copytree(recorded, finished)
    prune(finished, SAMPLING)
    states = []
    for event in range(1, 100):
        run = tmp_path / str(event)
        shutil.copytree(recorded, run)
        done = subprocess.run([sys.executable, "-c", KILLED, str(run), str(event)], check=False)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
        found = tokens(run)
        states.append("new" if found.equals(new) else "old" if found.equals(old) else "neither")
        if list((run / "tokens").iterdir()):
            by_pattern = pl.read_parquet(run / "tokens" / "*", columns=["rollout_id", "position"])
            assert not by_pattern.is_duplicated().any(), event
        prune(run, SAMPLING)
        assert not verify_run(run).faults
        assert {**contents(run), "run.json": b""} == {**contents(finished), "run.json": b""}
        assert read_manifest(run) == read_manifest(finished)
    assert set(states) == {"old", "new"}
    assert states == sorted(states, reverse=True)
    assert len(states) >= 8, "each of two files is synced and renamed and removed, and run.json replaced"


def test_an_error_leaves_the_old_trace_and_frees_its_space(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    before, calls = contents(run_dir), []
    write = prune_module._write_sampled

    def full_at_the_second(*args: object) -> int:
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return write(*args)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(prune_module, "_write_sampled", full_at_the_second)
    with pytest.raises(OSError, match="No space left"):
        prune(run_dir, SAMPLING)
    assert contents(run_dir) == before


def test_a_pruned_trace_can_be_resumed(run_dir: Path):
    prune(run_dir, SAMPLING)
    before = tokens(run_dir)
    writer = TraceWriter.resume(run_dir, 20)
    assert TokenSampling.of(writer.manifest) == SAMPLING
    assert tokens(run_dir).equals(before.filter(pl.col("step") <= 20))
    assert [path.name for path in (run_dir / "tokens").iterdir()] == ["part-000001-000020.pruned-1.parquet"]


def being_written(run: Path) -> None:
    write_manifest(run, {**read_manifest(run), "status": "running"})


def with_a_foreign_file(run: Path) -> None:
    shutil.move(run / "tokens" / "part-000001-000020.parquet", run / "tokens" / "mine.parquet")
    files = read_manifest(run)["files"]
    del files["tokens"]["part-000001-000020.parquet"]
    write_manifest(run, {**read_manifest(run), "files": files})


def with_a_damaged_file(run: Path) -> None:
    path = run / "tokens" / "part-000021-000040.parquet"
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (being_written, "run.json says that the run is being written, and no lock shows that it is not; finish it, or"),
        (with_a_foreign_file, r"mine.parquet: not written by TraceWriter, .*; remove or rename it"),
        (with_a_damaged_file, "damaged or truncated Parquet file"),
    ],
)
def test_a_trace_that_cannot_be_pruned_is_left_alone(run_dir: Path, change: Callable[[Path], None], message: str):
    change(run_dir)
    before = contents(run_dir)
    with pytest.raises(InputError, match=message) as refused:
        prune(run_dir, SAMPLING)
    assert "\n" not in str(refused.value)
    assert contents(run_dir) == before


def test_a_locked_run_is_refused_and_an_interrupted_one_is_pruned(recorded: Path, run_dir: Path):
    """The trainer locks a run while writing, and leaves it running if killed."""
    being_written(run_dir)
    lock = acquire_lock(run_dir, waits=False)
    assert lock is not None
    code = "import sys; from pathlib import Path; from entrace.analysis.trace.prune import prune, TokenSampling\n"
    command = [sys.executable, "-c", f"{code}prune(Path(sys.argv[1]), TokenSampling(2))", str(run_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "another process is already recording this run" in done.stderr
    os.close(lock)
    prune(run_dir, SAMPLING)
    assert tokens(run_dir).equals(expected(recorded, SAMPLING))
    assert read_manifest(run_dir)["status"] == "running"


def test_a_trace_without_a_list_of_files_is_pruned(recorded: Path, run_dir: Path):
    manifest = read_manifest(run_dir)
    del manifest["files"]
    write_manifest(run_dir, manifest)
    prune(run_dir, SAMPLING)
    assert tokens(run_dir).equals(expected(recorded, SAMPLING))
    assert read_manifest(run_dir)["files"].keys() == {p.name for p in run_dir.iterdir() if p.is_dir()}


def test_steps_of_a_trace_with_gaps_are_counted(tmp_path: Path):
    """An imported trace may hold steps 1, 11, 21, ..., none a multiple of 2."""
    run = write_run(tmp_path / "run", steps=8, groups=2)
    for table in ("steps", "tokens", "rollouts"):
        for path in (run / table).iterdir():
            rows = pq.read_table(path)
            columns = {"step": (10 * (rows["step"].to_numpy() - 1) + 1).astype(np.int32)}
            if table == "tokens":
                columns["logprob_after"] = np.full(len(rows), np.nan)
            for name, values in columns.items():
                at = rows.column_names.index(name)
                empty = name == "logprob_after"
                array = pl.Series([None] * len(rows), dtype=pl.Float32) if empty else pl.Series(values)
                rows = rows.set_column(at, rows.schema.field(name), array.to_arrow())
            pq.write_table(rows, path)
    accept_edits(run)
    prune(run, TokenSampling(2))
    assert sorted(set(tokens(run)["step"])) == [1, 11, 31, 51, 71]


def test_the_command_prints_sizes(command: Callable[..., tuple[int, bytes, str]], recorded: Path, run_dir: Path):
    study = run_dir.parent
    shutil.copytree(recorded, study / "second")
    manifest = read_manifest(study / "second")
    write_manifest(study / "second", {**manifest, "run_id": "second"})
    options = ["--token-steps", "3", "--token-responses", "0.25"]
    code, out, _ = command("prune", str(study), *options, "--dry-run")
    assert code == 0
    assert out.decode().splitlines()[0].startswith(f"{study.resolve() / 'run'}: tokens 25,600 to ")
    assert out.decode().splitlines()[1].endswith(" MB (estimated)")
    code, out, _ = command("prune", str(study), str(run_dir), *options, "--json")
    found = json.loads(out)
    assert code == 0
    assert [Path(entry["run"]).name for entry in found] == ["run", "second"]
    assert found[0]["rows_after"] == len(expected(recorded, SAMPLING))
    code, out, err = command("sql", str(run_dir), "select count(*) as n from tokens", "--format", "csv")
    assert (code, out.decode().split()) == (0, ["n", str(found[0]["rows_after"])])
    assert without_progress(err) == ["entrace: run: tokens are stored for 25% of the responses on one step in 3"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "prune: nothing to remove; set --token-steps above 1, or --token-responses below 1"),
        (["--token-responses", "0"], "--token-responses 0: expected a share in (0, 1], such as 0.25"),
        (["--token-responses", "25"], "--token-responses 25: expected a share in (0, 1], such as 0.25"),
    ],
)
def test_bad_options_are_one_line(
    command: Callable[..., tuple[int, bytes, str]], run_dir: Path, options: list[str], message: str
):
    assert command("prune", str(run_dir), *options) == (2, b"", f"entrace: {message}\n")
