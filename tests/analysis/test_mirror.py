"""Test that dashboards get the rows of steps and evals, each once.

The tests read real files of each dashboard.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl
import pytest

from entrace.analysis.trace import InputError, TraceWriter
from entrace.analysis.trace.mirror import check_names, scalars
from tests.analysis.conftest import step_row

MANIFEST = {"run_id": "run", "study": "study", "config": {"steps": 4}}
ACCURACY = {1: 0.25, 2: 0.5, 3: 0.75}


def eval_rows(step: int, correct: list[bool | None]) -> dict[str, object]:
    shared = {"step": step, "benchmark": "held", "prompt_id": "p", "answer": "1", "temperature": 1.0}
    return {**shared, "sample_index": range(len(correct)), "is_correct": correct, "response_length": 4}


def record(writer: TraceWriter, steps: list[int]) -> None:
    for step in steps:
        writer.append("steps", step_row(step, entropy=1 / step, accuracy=ACCURACY[step]))
        if step == 2:
            rows = eval_rows(step, [True, False, None])
            writer.append("evals", {name: list(v) if isinstance(v, range) else v for name, v in rows.items()})
        writer.flush(step)


def values_in_tensorboard(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def values_in_trackio(folder: Path) -> dict[str, dict[int, float]]:
    from trackio.sqlite_storage import SQLiteStorage

    rows = SQLiteStorage.get_logs("study", "run")
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith(("steps/", "evals/")):
                found.setdefault(name, {})[row["step"]] = value
    return found


def records_in(path: Path) -> Iterator[bytes]:
    """Yield the records of a wandb file, a LevelDB log after a header of 7 bytes."""
    data, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        # 1 is a whole record, 2 and 3 continue in the next one, and 4 is the last part.
        if kind in (1, 4):
            yield record
            record = b""


def values_in_wandb(folder: Path) -> dict[str, dict[int, float]]:
    from wandb.proto import wandb_internal_pb2

    found: dict[str, dict[int, float]] = {}
    for path in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb")):
        for data in records_in(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = {item.key or "/".join(item.nested_key): float(item.value_json) for item in record.history.item}
                for name, value in items.items():
                    if name.startswith(("steps/", "evals/")):
                        found.setdefault(name, {})[record.history.step.num] = value
    return found


READERS: dict[str, Callable[[Path], dict[str, dict[int, float]]]] = {
    "tensorboard": values_in_tensorboard,
    "wandb": values_in_wandb,
    "trackio": values_in_trackio,
}


@pytest.fixture(autouse=True)
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


@pytest.mark.parametrize("name", READERS)
def test_a_dashboard_shows_every_durable_step_once(name: str, tmp_path: Path):
    pytest.importorskip({"tensorboard": "tensorboardX"}.get(name, name))
    folder = tmp_path / "run"
    writer = TraceWriter.create(folder, MANIFEST, ["a"], log=[name])
    record(writer, [1, 2])
    # Buffered and never durable: not shown.
    writer.append("steps", step_row(3, entropy=9.0, accuracy=0.0))
    writer.close_dashboards()
    writer = TraceWriter.resume(folder, 2, log=[name])
    record(writer, [3])
    writer.finish()
    found = READERS[name](folder)
    assert found["steps/accuracy"] == pytest.approx(ACCURACY)
    assert found["steps/entropy_token_mean"] == pytest.approx({1: 1, 2: 1 / 2, 3: 1 / 3})
    assert found["evals/held/accuracy"] == {2: 0.5}


def test_values_are_known_numbers_in_the_order_of_steps():
    steps = pl.DataFrame({"run_id": "r", "step": [3, 1], "loss": [0.5, None], "is_shaped": [True, False]})
    evals = pl.DataFrame(
        {
            "step": [0, 3, 3],
            "benchmark": ["a", "a", "b"],
            "is_correct": [True, False, None],
            "reward": [1.0, None, None],
            "entropy_mean": [0.5, 0.25, 0.125],
            "response_length": [2, 4, 6],
        }
    )
    assert scalars(steps, evals) == {
        0: {"evals/a/accuracy": 1, "evals/a/reward": 1, "evals/a/entropy": 0.5, "evals/a/response_length": 2},
        1: {"steps/is_shaped": 0},
        3: {
            **{"steps/loss": 0.5, "steps/is_shaped": 1},
            **{"evals/a/accuracy": 0, "evals/a/entropy": 0.25, "evals/a/response_length": 4},
            **{"evals/b/entropy": 0.125, "evals/b/response_length": 6},
        },
    }
    assert list(scalars(steps, None)) == [1, 3]
    assert scalars(None, None) == {}


def test_a_failing_dashboard_does_not_stop_recording(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch):
    writer = TraceWriter.create(tmp_path / "run", MANIFEST, ["a"], log=["tensorboard"])

    def fail(*_: object) -> None:
        raise OSError("no service\nat all")

    monkeypatch.setattr("tensorboardX.SummaryWriter.add_scalar", fail)
    with caplog.at_level(logging.WARNING):
        record(writer, [1, 2])
    writer.finish()
    told = [record.getMessage() for record in caplog.records]
    assert told == ["entrace: tensorboard no longer receives data (no service); the trace is complete"]
    assert writer.manifest["last_durable_step"] == 2


def test_unknown_and_missing_dashboards_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match=r'^record.log: unknown dashboard "wandbb"; did you mean "wandb"'):
        check_names(["wandbb"])
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(InputError, match=r"^record.log: wandb needs wandb; pip install 'entrace\[log\]'$"):
        TraceWriter.create(tmp_path / "run", MANIFEST, ["a"], log=["wandb"])
    assert not (tmp_path / "run").exists()
