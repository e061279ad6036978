"""Test that flushed rows, and no others, read back once, unchanged, and in order.

This holds for any rows, batches, number of processes, and number of interruptions.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from entrace import open_runs
from entrace.analysis.trace import InputError, TraceWriter, read_manifest, write_manifest
from entrace.analysis.trace.plain import REPLACEMENT, SURROGATES
from tests.analysis.conftest import VOCAB, step_row
from tests.patience import HANG_S

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(exclude_categories=()), max_size=12)
TABLES = ("prompts", "rollouts", "steps", "tokens")


@dataclass(frozen=True)
class Response:
    """Hold the text of a response, and (value, token id) of each token."""

    text: str
    tokens: list[tuple[float, int]]


RESPONSES = st.builds(Response, TEXTS, st.lists(st.tuples(FLOATS, st.integers(0, len(VOCAB) - 1)), max_size=6))
# Per step: the responses of each of two processes, a flag for a flush, and a flag for a crash during the next step.
STEPS = st.lists(
    st.tuples(st.lists(RESPONSES, max_size=3), st.lists(RESPONSES, max_size=3), st.booleans(), st.booleans()),
    min_size=1,
    max_size=7,
)
LOST = Response("lost", [(1.0, 0)])
LONG = Response("long", [(float(i), i % len(VOCAB)) for i in range(100_000)])


class Meeting:
    """Exchange files written by the processes of a run, which are threads here."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=HANG_S)
        self.given: list = [None] * size

    def gather(self, rank: int):
        def exchange(files):
            self.given[rank] = files
            self.barrier.wait()
            everything = list(self.given)
            self.barrier.wait()
            return everything

        return exchange


def flush_together(writers: list[TraceWriter]) -> None:
    # The other ranks start first and wait for rank 0.
    others = [threading.Thread(target=writer.flush, daemon=True) for writer in writers[1:]]
    for thread in others:
        thread.start()
    writers[0].flush()
    for thread in others:
        thread.join()


def append_response(writer: TraceWriter, step: int, rollout_id: int, response: Response) -> dict[str, list[tuple]]:
    """Append one response with its own prompt; return the expected rows by table."""
    length = len(response.tokens)
    prompt = f"p{rollout_id}"
    same = {"step": step, "prompt_id": prompt, "rollout_id": rollout_id, "is_correct": True, "response_length": length}
    question = {"prompt_id": prompt, "split": "train", "task": "t", "prompt": response.text, "ground_truth": ""}
    writer.append("prompts", question)
    measures = dict.fromkeys(("reward", "advantage", "temperature"), 1.0)
    flags = {"has_answer": False, "is_truncated": False, "is_kept": True, "defects": [[response.text]]}
    text = {"completion": response.text, "entropy_kind": "exact", "policy_step": 0, "sample_index": 0, "group_id": 0}
    writer.append("rollouts", {**same, **measures, **flags, **text})
    values = [value for value, _ in response.tokens]
    ids = [entry for _, entry in response.tokens]
    floats = dict.fromkeys(("logprob", "entropy", "grad_norm", "advantage", "shaped_advantage"), values)
    writer.append("tokens", {**same, **floats, "token_id": ids, "position": np.arange(length)})
    stored = SURROGATES.sub(REPLACEMENT, response.text)
    return {
        "prompts": [(prompt, stored)],
        "rollouts": [(step, rollout_id, stored, [stored], length)],
        "steps": [],
        "tokens": [(step, rollout_id, position, *token) for position, token in enumerate(response.tokens)],
    }


def read(run_dir: Path) -> dict[str, list[tuple]]:
    runs = open_runs(run_dir)
    queries = {
        "prompts": "select prompt_id, prompt from prompts order by all",
        "rollouts": "select step, rollout_id, completion, defects, response_length from rollouts order by 1, 2",
        "steps": "select step from steps order by all",
        "tokens": "select step, rollout_id, position, entropy, token_id from tokens order by 1, 2, 3",
    }
    return {table: runs.sql(query).rows() for table, query in queries.items()}


def merge(*parts: dict[str, list[tuple]]) -> dict[str, list[tuple]]:
    return {table: sorted((row for part in parts for row in part[table]), key=lambda row: row[:3]) for table in TABLES}


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(steps=STEPS, num_ranks=st.integers(1, 2))
@example(steps=[([LONG], [LONG], True, True), ([], [], False, False), ([LONG], [], True, False)], num_ranks=2)
def test_flushed_rows_read_back_once_and_in_order(steps: list, num_ranks: int):
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder, "run")
        meeting = Meeting(num_ranks)
        places = [{"rank": rank, "gather": meeting.gather(rank)} for rank in range(num_ranks)]

        def start(replace: bool) -> list[TraceWriter]:
            return [TraceWriter.create(run_dir, {"run_id": "r"}, VOCAB, replace=replace, **place) for place in places]

        writers = start(replace=False)
        durable, pending, last = merge(), merge(), 0
        rollout_ids = itertools.count()
        step = 1
        for *contributions, is_flushed, is_lost in steps:
            for writer, responses in zip(writers, contributions, strict=False):
                for response in responses:
                    pending = merge(pending, append_response(writer, step, next(rollout_ids), response))
            writers[0].append("steps", step_row(step, entropy=1.0, accuracy=0.5))
            pending["steps"].append((step,))
            for writer in writers:
                writer.end_step(step)
            if is_lost:
                append_response(writers[0], step + 1, -1, LOST)
            if is_flushed:
                flush_together(writers)
                durable, pending, last = merge(durable, pending), merge(), step
            step += 1
            if is_lost:
                assert read(run_dir) == durable
                writers = [TraceWriter.resume(run_dir, last, **place) for place in places] if last else start(True)
                pending, step = merge(), last + 1
        assert read(run_dir) == durable
        assert not list(run_dir.rglob("*.tmp"))


def test_leftovers_of_an_interrupted_flush_are_ignored_and_removed_at_resume(tmp_path: Path):
    """The process dies before the manifest lists the files of the second flush."""
    writer = TraceWriter.create(tmp_path / "run", {"run_id": "r"}, VOCAB)
    append_response(writer, 1, 0, LOST)
    writer.append("steps", step_row(1, entropy=1.0, accuracy=0.5))
    writer.flush(1)
    before, manifest = read(tmp_path / "run"), (tmp_path / "run" / "run.json").read_bytes()
    append_response(writer, 2, 1, LOST)
    writer.flush(2)
    (tmp_path / "run" / "run.json").write_bytes(manifest)
    assert read(tmp_path / "run") == before
    TraceWriter.resume(tmp_path / "run", 1)
    assert len(list((tmp_path / "run").glob("tokens/*"))) == len(list((tmp_path / "run").glob("rollouts/*"))) == 1
    assert read(tmp_path / "run") == before


def test_a_file_that_cannot_be_written_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    writer = TraceWriter.create(tmp_path / "run", {"run_id": "r"}, VOCAB)
    writer.append("steps", step_row(1, entropy=1.0, accuracy=0.5))
    writer.flush(1)
    append_response(writer, 2, 0, LOST)
    writer.append("steps", step_row(2, entropy=1.0, accuracy=0.5))
    writer.end_step(2)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError("quota")))
        with pytest.raises(OSError, match="quota"):
            writer.flush()
    assert read(tmp_path / "run")["steps"] == [(1,)]
    assert not list((tmp_path / "run").rglob("*.tmp"))
    writer.flush()
    assert read(tmp_path / "run")["steps"] == [(1,), (2,)]
    assert len(read(tmp_path / "run")["tokens"]) == len(LOST.tokens)


def test_no_row_is_added_to_a_durable_step(tmp_path: Path):
    writer = TraceWriter.create(tmp_path / "run", {"run_id": "r"}, VOCAB)
    for _ in range(2):
        writer.append("steps", step_row(1, entropy=1.0, accuracy=0.5))
        if not read(tmp_path / "run")["steps"]:
            writer.flush(1)
    with pytest.raises(InputError, match="step 1 is durable; no row can be added"):
        writer.flush(1)


@pytest.mark.parametrize("given", ["list", "array", "scalar"])
def test_lone_surrogates_are_replaced(tmp_path: Path, given: str):
    texts = {"list": ["a\ud800b"], "array": np.array(["a\ud800b"], dtype=object), "scalar": "a\ud800b"}
    writer = TraceWriter.create(tmp_path / "run", {"run_id": "r"}, VOCAB)
    row = {"prompt_id": "p", "split": "train", "task": "t", "ground_truth": ""}
    writer.append("prompts", {**row, "prompt": texts[given]})
    writer.flush(1)
    assert open_runs(tmp_path / "run").sql("select prompt from prompts").item() == f"a{REPLACEMENT}b"


def test_traces_without_a_list_of_files_read_as_before(tiny_path: Path, tmp_path: Path):
    """In traces of earlier versions every file counts, and resuming creates the list."""
    shutil.copytree(tiny_path, tmp_path / "old")
    manifest = read_manifest(tmp_path / "old")
    del manifest["files"]
    write_manifest(tmp_path / "old", manifest)
    count = "select count(*) from tokens"
    assert open_runs(tmp_path / "old").sql(count).item() == open_runs(tiny_path).sql(count).item()
    TraceWriter.resume(tmp_path / "old", 24)
    assert set(read_manifest(tmp_path / "old")["files"]["tokens"]) == {"part-000001-000024.parquet"}
    assert open_runs(tmp_path / "old").sql(count).item() == open_runs(tiny_path).sql(count).item()
