"""Test the checks on opening a trace, and the notes on incomplete runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from entrace import Recorder, open_runs
from entrace.analysis.trace import InputError, TraceWriter, digests, read_manifest, write_manifest
from entrace.analysis.trace.parts import Layout, check_parts, last_whole_step
from entrace.analysis.trace.verify import accept_edits
from tests.analysis.conftest import VOCAB, step_row

PARTS = {step: f"part-{step - 1:06d}-{step:06d}.parquet" for step in (2, 4, 6)}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Write six of ten planned steps in three files, as a run in progress."""
    writer = TraceWriter.create(tmp_path / "run", {"run_id": "r", "total_steps": 10}, VOCAB)
    for step in range(1, 7):
        writer.append("steps", step_row(step, entropy=1.0, accuracy=0.5))
        writer.end_step(step)
        if step in PARTS:
            writer.flush()
    return tmp_path / "run"


def change_manifest(run_dir: Path, **values: object) -> None:
    write_manifest(run_dir, {**read_manifest(run_dir), **values})


def test_a_run_that_is_being_written_says_how_far_it_is(run_dir: Path):
    assert open_runs(run_dir).notes == {"r": "being written or interrupted, 6 of 10 steps recorded"}
    change_manifest(run_dir, status="failed", error="TrainingError: step 7: loss nan")
    assert open_runs(run_dir).notes == {"r": "failed (TrainingError: step 7: loss nan), 6 of 10 steps recorded"}
    change_manifest(run_dir, status="complete")
    assert open_runs(run_dir).notes == {}


def test_steps_that_are_missing_are_named(tmp_path: Path):
    """A trace of another trainer may lack steps, which the notes list."""
    writer = TraceWriter.create(tmp_path / "run", {"run_id": "r", "total_steps": 9}, VOCAB)
    for step in (1, 2, 5, 7):
        writer.append("steps", step_row(step, entropy=1.0, accuracy=0.5))
    writer.flush(7)
    writer.finish()
    note = "complete, 4 of 9 steps recorded; steps 3 to 4, 6 are missing"
    assert open_runs(tmp_path / "run").notes == {"r": note}


def link_part(run_dir: Path) -> None:
    part = run_dir / "steps" / PARTS[4]
    part.rename(run_dir / "elsewhere")
    part.symlink_to(run_dir / "elsewhere")


def repeat_part(run_dir: Path) -> None:
    shutil.copy(run_dir / "steps" / PARTS[4], run_dir / "steps" / "copy.parquet")


def shorten_part(run_dir: Path) -> None:
    path = run_dir / "steps" / PARTS[4]
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 1), path)


def drop_column(run_dir: Path) -> None:
    path = run_dir / "steps" / PARTS[4]
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["loss"]), path)


def change_type(run_dir: Path) -> None:
    path = run_dir / "steps" / PARTS[4]
    table = pq.read_table(path)
    pq.write_table(table.set_column(2, "loss", pa.array(["high"] * len(table))), path)


def cut_part(run_dir: Path) -> None:
    path = run_dir / "steps" / PARTS[4]
    path.write_bytes(path.read_bytes()[:-40])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "lost": (lambda run: (run / "steps" / PARTS[4]).unlink(), "missing, although run/run.json lists it; restore it"),
    "cut": (cut_part, "damaged or truncated Parquet file .*; restore it, or go back to the checkpoint before it with"),
    "fewer rows": (shorten_part, "holds 1 rows, run.json says 2"),
    "no column": (drop_column, r"column loss \(float\) is missing; found run_id, step"),
    "other type": (change_type, "column loss is string, expected float"),
    "a link": (link_part, "a link, or not a regular file; a trace holds regular files only"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_line_and_earlier_steps_are_intact(run_dir: Path, case: str):
    damage, message = DAMAGE[case]
    damage(run_dir)
    with pytest.raises(InputError, match=message) as caught:
        open_runs(run_dir)
    assert "\n" not in str(caught.value)
    step, reason = last_whole_step(run_dir, read_manifest(run_dir))
    assert step == 2
    assert PARTS[4] in str(reason)


def test_a_table_removed_as_a_whole_is_not_recorded(run_dir: Path):
    shutil.rmtree(run_dir / "vocab")
    runs = open_runs(run_dir)
    assert runs.sql("select count(*) from vocab").item() == 0
    assert runs.notes == {"r": "being written or interrupted, 6 of 10 steps recorded; removed: vocab"}


def test_a_step_recorded_twice_is_refused(run_dir: Path):
    repeat_part(run_dir)
    with pytest.raises(InputError, match="step 3 is recorded twice; remove the file that is not part of the run"):
        open_runs(run_dir)


def test_a_run_resumed_from_an_earlier_step_must_be_opened_again(run_dir: Path):
    runs = open_runs(run_dir)
    TraceWriter.resume(run_dir, 2)
    with pytest.raises(InputError, match="deleted since the run was opened; open the run again"):
        runs.sql("select max(step) from steps")
    assert open_runs(run_dir).sql("select max(step) from steps").item() == 2


@pytest.mark.parametrize("has_context", [False, True])
def test_a_file_that_equals_its_digest_has_the_layout_of_its_footer(tmp_path: Path, has_context: bool):
    recorder = Recorder(tmp_path / "run", VOCAB)
    recorder.record(
        step=1,
        prompt=["1 + 1 ="],
        response_ids=[[1, 2, 3]],
        entropy=[[0.5, 0.2, 0.1]],
        loss_mask=[[True, not has_context, True]],
        reward=[1.0],
    )
    recorder.close()
    found = list_layouts(tmp_path / "run", digests.read(tmp_path / "run"))
    assert found == list_layouts(tmp_path / "run", digests.Recorded())
    assert {layout.has_context for path, layout in found.items() if path.parent.name == "tokens"} == {has_context}


def list_layouts(run_dir: Path, recorded: digests.Recorded) -> dict[Path, Layout]:
    """Return the layout of each file; without digests, its footer is parsed."""
    parts = check_parts(run_dir, read_manifest(run_dir), recorded)
    return {path: layout for of_table in parts.values() for path, layout in of_table.items()}


def test_steps_of_an_edited_file_are_read(run_dir: Path):
    """Read the steps of a file whose accepted edit may have repeated one."""
    path = run_dir / "steps" / PARTS[4]
    table = pq.read_table(path)
    pq.write_table(table.take([0, 0]), path)
    assert accept_edits(run_dir) == [f"steps/{PARTS[4]}"]
    with pytest.raises(InputError, match="step 3 is recorded twice"):
        open_runs(run_dir)
