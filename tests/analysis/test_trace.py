"""Test that rows read back unchanged, and invalid rows fail with one line."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entrace.analysis.trace import TABLES, InputError, TraceWriter, Vocabulary, read_manifest
from entrace.analysis.trace import writer as writer_module
from tests.analysis.conftest import VOCAB, step_row

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
TOKENS = st.lists(
    st.tuples(
        st.integers(1, 5),
        st.text(max_size=8),
        st.integers(0, 2**40),
        st.integers(0, 3),
        FLOATS,
        st.one_of(st.none(), FLOATS),
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=40, deadline=None)
@given(rows=TOKENS)
def test_tokens_come_back_exactly_and_sorted(rows: list[tuple]):
    steps, prompts, rollouts, token_ids, entropies, after = zip(*rows, strict=True)
    with tempfile.TemporaryDirectory() as folder:
        writer = TraceWriter.create(Path(folder) / "run", {"run_id": "r"}, VOCAB)
        writer.append(
            "tokens",
            {
                "step": list(steps),
                "prompt_id": list(prompts),
                "rollout_id": list(rollouts),
                "position": list(range(len(rows))),
                "response_length": len(rows),
                "token_id": list(token_ids),
                "logprob": list(entropies),
                "entropy": list(entropies),
                "advantage": 0.5,
                "shaped_advantage": 0.5,
                "grad_norm": list(entropies),
                "is_correct": True,
                "entropy_after": list(after),
            },
        )
        writer.flush(5)
        found = pl.read_parquet(f"{folder}/run/tokens/*.parquet")
    expected = sorted(
        (step, rollout, position, prompt, token, entropy, late)
        for position, (step, prompt, rollout, token, entropy, late) in enumerate(rows)
    )
    names = ["step", "rollout_id", "position", "prompt_id", "token_id", "entropy", "entropy_after"]
    assert found.select(names).rows() == expected
    assert found["category"].to_list() == [
        ["special", "formal_reasoning", "logical_structuring", "semantic_support"][row[4]] for row in expected
    ]


def test_arrays_can_be_reused_after_append(tmp_path: Path):
    writer = new_writer(tmp_path)
    numbers = {"rollout_id": np.arange(3), "position": np.arange(3, dtype=np.int32)}
    measured = {name: np.ones(3, dtype=np.float32) for name in ("logprob", "entropy", "grad_norm")}
    known = {"step": 1, "prompt_id": "p", "response_length": 3, "token_id": 0, "is_correct": True, "advantage": 0.5}
    writer.append("tokens", {**known, "shaped_advantage": 0.5, **numbers, **measured})
    for array in (numbers | measured).values():
        array[:] = 7
    writer.flush(1)
    found = pl.read_parquet(f"{tmp_path}/run/tokens/*.parquet")
    assert found["rollout_id"].to_list() == found["position"].to_list() == [0, 1, 2]
    assert set(found["entropy"]) == {1.0}


def test_columns_carry_unit_and_meaning(tiny_path: Path):
    for name, table in TABLES.items():
        for path in (tiny_path / name).glob("*.parquet"):
            schema = pq.read_schema(path)
            for column in table.columns:
                metadata = schema.field(column.name).metadata
                assert metadata[b"unit"].decode() == column.unit
                assert metadata[b"meaning"].decode() == column.meaning


def test_a_file_has_an_optional_column_if_any_row_has_it(tmp_path: Path):
    writer = new_writer(tmp_path)
    known = {"prompt_id": "p", "rollout_id": 0, "response_length": 3, "token_id": 0, "position": [0, 1, 2]}
    optional = [column.name for column in TABLES["tokens"].columns if column.is_optional]
    assert optional
    for step, values in enumerate(([None], [None, optional[0], None], [None, *optional]), 1):
        for place, name in enumerate(values):
            columns = {} if name is None else {name: [0.5, None, 0.25]}
            writer.append("tokens", {**known, "rollout_id": place, "step": step, **columns})
        writer.flush(step)
    files = [pq.read_table(path) for path in sorted((tmp_path / "run" / "tokens").iterdir())]
    held = [[name for name in file.column_names if name in optional] for file in files]
    assert held == [[], optional[:1], optional]
    assert files[1][optional[0]].to_pylist() == [None] * 3 + [0.5, None, 0.25] + [None] * 3
    assert files[2].schema.equals(TABLES["tokens"].arrow_schema, check_metadata=True)


def new_writer(folder: Path) -> TraceWriter:
    return TraceWriter.create(folder / "run", {"run_id": "r"}, VOCAB)


@pytest.mark.parametrize(
    ("table", "columns", "message"),
    [
        ("token", {}, 'unknown table "token"; did you mean "tokens"'),
        (
            "steps",
            {**step_row(1, entropy=1, accuracy=1), "acuracy": 1},
            'unknown column "acuracy"; did you mean "accuracy"',
        ),
        ("prompts", {"prompt_id": "a"}, 'column "split" is missing'),
        ("vocab", {"token_id": [1, 2], "text": ["a"], "category": "special"}, r"different lengths \[1, 2\]"),
        ("steps", {**step_row(1, entropy=1, accuracy=1), "step": "one"}, r"column step is not int32 \(.*\)$"),
        ("tokens", {"token_id": [0, 99]}, r"not in the vocabulary, 0 to 3 \(Index 99 out of bounds\)"),
        ("tokens", {"token_id": ["x"]}, "token_id is not in the vocabulary, 0 to 3"),
        ("tokens", {"step": 1}, 'column "prompt_id" is missing'),
        (
            "vocab",
            {"token_id": [1], "text": [None], "category": "special"},
            "column text holds 1 nulls in 1 rows; every row needs a value",
        ),
        *(
            (
                "vocab",
                {"token_id": [1, 2], "text": ["a", "b"], "category": "special", "is_special": values},
                rf"table vocab: column is_special is not bool \(found {shown}, expected true or false\)$",
            )
            for values, shown in (
                (np.array([1.0, 0.5]), "0.5"),
                (np.array([0, 2]), "2"),
                (np.array([1.0, np.nan]), "nan"),
                (pa.array([1, -1]), "-1"),
                (pa.array(["true", "false"]), "'true'"),
            )
        ),
        ("steps", {**step_row(1, entropy=1, accuracy=1), "step": 10**400}, r"column step is not int32 \(.*\)$"),
    ],
)
def test_invalid_rows_are_rejected(tmp_path: Path, table: str, columns: dict, message: str):
    with pytest.raises(InputError, match=message):
        new_writer(tmp_path).append(table, columns)


@pytest.mark.parametrize("values", [np.array([True, False]), np.array([1.0, 0.0]), pa.array([1, 0]), [True, False]])
def test_flags_may_be_0_and_1_in_arrays(tmp_path: Path, values: Any):
    writer = new_writer(tmp_path)
    columns = {"token_id": [8, 9], "text": ["a", "b"], "category": "special", "is_special": values}
    writer.append("vocab", columns)
    writer.flush(0)
    assert pl.read_parquet(tmp_path / "run/vocab/*.parquet")["is_special"].to_list()[-2:] == [True, False]


def test_vocabulary_and_its_marks_are_recorded(tmp_path: Path):
    marked = Vocabulary(["[INST]", "<b>", "<0xF0>"], [True, False, False])
    for name, vocab, categories, marks in (
        ("marked", marked, ["special", "semantic_support", "special"], [True, False, False]),
        ("texts", marked.texts, ["special"] * 3, [None] * 3),
    ):
        TraceWriter.create(tmp_path / name, {"run_id": "r"}, vocab).flush(0)
        found = pl.read_parquet(tmp_path / name / "vocab" / "*.parquet")
        assert found["text"].to_list() == ["[INST]", "<b>", "<0xF0>"]
        assert found["category"].to_list() == categories
        assert found["is_special"].to_list() == marks


def test_folder_in_use_is_refused(tmp_path: Path):
    new_writer(tmp_path)
    with pytest.raises(InputError, match="already holds files"):
        new_writer(tmp_path)


def test_manifest_needs_a_run_id(tmp_path: Path):
    with pytest.raises(InputError, match="run_id"):
        TraceWriter.create(tmp_path / "run", {}, VOCAB)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"run_id": ""}, "manifest: run_id is '', expected text that names the run"),
        ({"run_id": 5}, "manifest: run_id is 5, expected text that names the run"),
        ({"run_id": "r", "seed": "one"}, "manifest: seed is 'one', expected a 32-bit integer"),
        ({"run_id": "r", "config": {"lr": float("nan")}}, "manifest: config.lr is nan, which JSON cannot hold"),
        ({"run_id": "r", "config": {"lr": {1}}}, "manifest: config.lr is of type set, which JSON cannot hold"),
    ],
)
def test_invalid_manifests_are_refused(tmp_path: Path, manifest: dict, message: str):
    with pytest.raises(InputError, match=message):
        TraceWriter.create(tmp_path / "run", manifest, VOCAB)
    assert not (tmp_path / "run").exists()


def test_a_file_is_no_folder_of_a_run(tmp_path: Path):
    (tmp_path / "run").write_text("text")
    with pytest.raises(InputError, match=r"run: cannot be the folder of a run \(not a directory"):
        new_writer(tmp_path)


def test_resume_removes_later_steps(tmp_path: Path):
    writer = new_writer(tmp_path)
    for step in (1, 2, 3):
        writer.append("steps", step_row(step, entropy=1.0, accuracy=0.5))
        writer.flush(step)
    (tmp_path / "run" / "steps" / ".part-000004-000004.parquet.tmp").write_bytes(b"half")
    resumed = TraceWriter.resume(tmp_path / "run", 2)
    resumed.append("steps", step_row(3, entropy=9.0, accuracy=0.5))
    resumed.flush(3)
    steps = pl.read_parquet(tmp_path / "run" / "steps" / "*.parquet").sort("step")
    assert steps["entropy_token_mean"].to_list() == [1.0, 1.0, 9.0]
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_finish_records_how_the_run_ended(tmp_path: Path):
    writer = new_writer(tmp_path)
    assert read_manifest(tmp_path / "run")["status"] == "running"
    writer.finish("step 3: loss is nan")
    manifest = read_manifest(tmp_path / "run")
    assert (manifest["status"], manifest["error"]) == ("failed", "step 3: loss is nan")


def test_equal_rows_give_equal_bytes(tmp_path: Path):
    files = []
    for name in ("a", "b"):
        writer = TraceWriter.create(tmp_path / name, {"run_id": "r"}, VOCAB)
        values = np.random.default_rng(0).random(500, dtype=np.float32)
        writer.append("vocab", {"token_id": np.arange(500), "text": [str(v) for v in values], "category": "special"})
        writer.flush(1)
        files.append(next((tmp_path / name / "vocab").iterdir()).read_bytes())
    assert files[0] == files[1]


def test_row_groups_end_at_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writer_module, "MIN_ROW_GROUP", 100)
    monkeypatch.setattr(writer_module, "MAX_ROW_GROUP", 250)
    writer = TraceWriter.create(tmp_path / "run", {"run_id": "r"}, VOCAB)
    # A full group, two steps that fill one together, a step longer than a group, and few rows at the end.
    sizes = [100, 99, 1, 251, 5]
    for step, size in enumerate(sizes, start=1):
        row = {"prompt_id": "a", "rollout_id": 0, "response_length": size, "token_id": 1, "logprob": -1, "entropy": 1}
        values = {"advantage": 0, "shaped_advantage": 0, "is_correct": True, "grad_norm": None}
        writer.append("tokens", {"step": step, "position": np.arange(size), **row, **values})
    writer.flush(len(sizes))
    with pq.ParquetFile(next((tmp_path / "run" / "tokens").iterdir())) as file:
        groups = [file.read_row_group(i)["step"].to_pylist() for i in range(file.num_row_groups)]
    assert [len(group) for group in groups] == [100, 100, 250, 1, 5]
    assert [step for group in groups for step in group] == np.repeat([1, 2, 3, 4, 5], sizes).tolist()
