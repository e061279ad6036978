"""Test that the writer rejects NaN and infinity.

The reader must name the column that holds them.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from entrace import open_runs
from entrace.analysis.trace import TABLES, InputError, TraceWriter
from entrace.analysis.trace.verify import accept_edits
from entrace.analysis.trace.writer import write_part
from tests.analysis.conftest import VOCAB
from tests.slow import slow_after

FLOATS = [
    pytest.param(table.name, column.name, column.nullable, id=f"{table.name}.{column.name}")
    for table in TABLES.values()
    for column in table.float_columns
]
# One column of each table that may hold null, and one that must not.
FEW = list({(case.values[0], case.values[2]): case.id for case in FLOATS}.values())


def rows_of(run: Path, table: str) -> dict[str, list[Any]]:
    return pq.read_table(next((run / table).iterdir())).to_pydict()


def spoil(run: Path, table: str, column: str, value: float) -> None:
    """Put ``value`` into the first row of a column without the writer's checks."""
    path = next((run / table).iterdir())
    rows = pq.read_table(path)
    i = rows.schema.get_field_index(column)
    values = [value, *rows[i].to_pylist()[1:]]
    pq.write_table(rows.set_column(i, rows.schema.field(i), pa.array(values, rows.schema.field(i).type)), path)
    accept_edits(run)


def test_the_float_columns_include_every_measurement():
    names = {case.id for case in FLOATS}
    assert {"tokens.entropy", "tokens.logprob", "tokens.grad_norm", "rollouts.reward", "steps.loss"} <= names
    assert {"tokens.logprob_after", "evals.entropy_mean", "interventions.impact"} <= names


@pytest.mark.parametrize(("table", "column", "nullable"), FLOATS)
@pytest.mark.parametrize("as_given", [list, np.array], ids=["list", "array"])
def test_the_writer_rejects_values_that_are_not_finite(
    tiny_path: Path, tmp_path: Path, table: str, column: str, nullable: bool, as_given: Callable[[list[float]], Any]
):
    writer = TraceWriter.create(tmp_path / "run", {"run_id": "run"}, VOCAB)
    rows = rows_of(tiny_path, table)
    writer.append(table, {**rows, column: 0.5})
    values = [math.nan, -math.inf, *[0.5] * (len(rows["run_id"]) - 2)]
    remedy = "leave it null where unknown" if nullable else "it must be a finite number in every row"
    with pytest.raises(InputError) as caught:
        writer.append(table, {**rows, column: as_given(values)})
    assert str(caught.value) == (
        f"table {table}: column {column} is NaN or infinite in 2 of {len(values)} rows; {remedy}"
    )
    with pytest.raises(InputError, match=rf"column {column} is NaN or infinite in 2 of"):
        write_part(tmp_path / "run" / table / "other.parquet", table, {**rows, column: as_given(values)}, {})


def test_a_number_too_large_for_the_column_is_rejected(tiny_path: Path, tmp_path: Path):
    writer = TraceWriter.create(tmp_path / "run", {"run_id": "run"}, VOCAB)
    with pytest.raises(InputError, match="table steps: column loss is NaN or infinite in 1 of 1 rows"):
        writer.append("steps", {name: v[0] for name, v in rows_of(tiny_path, "steps").items()} | {"loss": 1e300})


@pytest.mark.parametrize("value", slow_after(1, [math.nan, math.inf]))
@pytest.mark.parametrize(
    ("table", "column", "nullable"),
    [case if case.id in FEW else pytest.param(*case.values, id=case.id, marks=pytest.mark.slow) for case in FLOATS],
)
def test_the_reader_names_table_column_rows_and_remedy(
    tiny_path: Path, tmp_path: Path, table: str, column: str, nullable: bool, value: float
):
    run = tmp_path / "run"
    shutil.copytree(tiny_path, run)
    spoil(run, table, column, value)
    runs = open_runs(run)
    rows = len(rows_of(run, table)["run_id"])
    remedy = "write null where the value is unknown" if nullable else "correct or remove these rows"
    with pytest.raises(InputError) as caught:
        runs.sql(f"select count(*) from {table}")
    assert str(caught.value) == (
        f"run tiny: table {table}: column {column} is NaN or infinite in 1 of {rows} rows; {remedy}, and write the "
        "trace again"
    )


@pytest.mark.parametrize(
    ("table", "column", "stem"),
    [
        ("tokens", "entropy", "entropy_by_position"),
        ("tokens", "logprob_after", "movement_by_entropy"),
        ("tokens", "entropy", "u_shape"),
        ("tokens", "entropy", "high_entropy_words"),
        ("rollouts", "ppl", "correctness_by_ppl"),
        ("steps", "accuracy", "stage_dynamics"),
        ("evals", "entropy_mean", "ablation_final"),
        ("interventions", "impact", "robustness_by_ppl"),
    ],
)
def test_questions_reject_values_that_are_not_finite(
    tiny_path: Path, tmp_path: Path, table: str, column: str, stem: str
):
    run = tmp_path / "run"
    shutil.copytree(tiny_path, run)
    spoil(run, table, column, math.nan)
    with pytest.raises(InputError, match=f"table {table}: column {column} is NaN or infinite in 1 of"):
        open_runs(run).query(stem)


def test_a_table_that_no_query_reads_is_not_scanned(tiny_path: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(tiny_path, run)
    spoil(run, "tokens", "entropy", math.nan)
    assert open_runs(run).query("stage_dynamics").height == 24
