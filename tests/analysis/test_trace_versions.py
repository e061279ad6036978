"""Test that schema version 1 opens alone, with version 2, and resumed.

A resumed run of version 1 continues in version 2.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from polars.testing import assert_frame_equal

from entrace import open_runs
from entrace.analysis import queries
from entrace.analysis.runs import Runs
from entrace.analysis.sandbox.connection import DEFAULTS
from entrace.analysis.trace import TABLES, InputError, TraceWriter, read_manifest
from entrace.analysis.trace.digests import DIGESTS
from tests.analysis.conftest import step_row
from tests.slow import slow_after

FROZEN = Path(__file__).parents[1] / "fixtures" / "frozen" / "none-seed0"
NEW_COLUMNS = [(table.name, column.name) for table in TABLES.values() for column in table.columns if column.since == 2]


def change_rows(run: Path, table: str, change: Callable[[pa.Table], pa.Table]) -> None:
    for path in (run / table).glob("*.parquet"):
        pq.write_table(change(pq.read_table(path)), path)
    # Older writers record no digests.
    (run / DIGESTS).unlink(missing_ok=True)


def as_version_1(run: Path, copy: Path) -> Path:
    """Copy a trace of version 2 in the form of version 1."""
    shutil.copytree(run, copy)
    for table in TABLES.values():
        dropped = [column.name for column in table.columns if column.since == 2]

        def downgrade(rows: pa.Table, dropped: list[str] = dropped) -> pa.Table:
            return rows.drop_columns(dropped).replace_schema_metadata({b"entrace_schema_version": b"1"})

        change_rows(copy, table.name, downgrade)
    (copy / "run.json").write_text(json.dumps({**read_manifest(copy), "schema_version": 1}))
    return copy


def assert_equal_answers(found: Runs, expected: Runs) -> None:
    for stem in queries.BUILT_IN.paths:
        # Version 1 has no column for it.
        if any((need.table, need.column) in NEW_COLUMNS for need in queries.BUILT_IN.needs(stem)):
            continue
        answers = [
            runs.query(stem).drop("selection", "temperature", "series", strict=False) for runs in (found, expected)
        ]
        if "predictor" in answers[0].columns:
            # This law needs sums over the vocabulary, which version 1 has no columns for.
            answers = [answer.filter(pl.col("predictor") != "first_order") for answer in answers]
            # Sums of floats in the order of the threads, which differs by rounding.
            assert_frame_equal(*answers, check_exact=False, rel_tol=1e-9, abs_tol=1e-12)
        else:
            assert answers[0].equals(answers[1]), stem


def test_a_frozen_trace_of_version_1_shows_the_present_columns():
    runs = open_runs(FROZEN)
    for table in TABLES.values():
        assert runs.sql(f"select * from {table.name} limit 0").columns == [column.name for column in table.columns]
    derived = {("rollouts", "group_id"), ("tokens", "is_kept"), *DEFAULTS}
    unknown = [place for place in NEW_COLUMNS if place not in derived]
    assert unknown
    for table, column in unknown:
        assert runs.sql(f"select count({column}) from {table}").item() == 0
    kept = "select sum(response_length) from rollouts where is_kept"
    assert runs.sql("select count(*) from tokens where is_kept").item() == runs.sql(kept).item()
    assert runs.sql("select count(*) from tokens where is_kept is null").item() == 0


def test_every_question_has_the_same_answer_for_version_1(tiny: Runs, tiny_path: Path, tmp_path: Path):
    old = open_runs(as_version_1(tiny_path, tmp_path / "tiny"))
    assert old.sql("select count(distinct group_id) from rollouts").item() == 6
    assert_equal_answers(old, tiny)


def test_versions_open_together(tiny_path: Path):
    runs, separate = open_runs([FROZEN, tiny_path]), [open_runs(FROZEN), open_runs(tiny_path)]
    for table in TABLES:
        both = runs.sql(f"select run_id, count(*) from {table} group by all order by 1").rows()
        alone = [
            row for one in separate for row in one.sql(f"select run_id, count(*) from {table} group by all").rows()
        ]
        assert both == alone


def test_a_run_begun_with_version_1_is_resumed_with_version_2(tiny_path: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(FROZEN, run)
    writer = TraceWriter.resume(run, 20)
    row = pq.read_table(next((tiny_path / "rollouts").iterdir())).slice(0, 1).to_pydict()
    ids = {"run_id": writer.manifest["run_id"], "step": 21, "rollout_id": [5000], "group_id": [5000]}
    writer.append("rollouts", {**row, **ids})
    writer.append("steps", step_row(21, entropy=1.0, accuracy=0.5))
    writer.flush(21)
    assert read_manifest(run)["schema_version"] == 2
    runs = open_runs(run)
    assert runs.sql("select max(step) from rollouts").item() == 21
    groups = runs.sql("select group_id, count(distinct (step, prompt_id)) as n from rollouts group by all")
    assert set(groups["n"]) == {1}


@pytest.mark.slow
@pytest.mark.parametrize(("table", "column"), NEW_COLUMNS)
def test_a_file_of_version_2_may_lack_a_nullable_column(tiny_path: Path, tmp_path: Path, table: str, column: str):
    run = tmp_path / "run"
    shutil.copytree(tiny_path, run)
    change_rows(run, table, lambda rows: rows.drop_columns([column]))
    if TABLES[table].arrow_schema.field(column).nullable:
        found = open_runs(run).sql(f"select count(*) as rows, count({column}) as known from {table}")
        default = (table, column) in DEFAULTS
        assert found["known"].item() == (found["rows"].item() if default else 0)
        return
    with pytest.raises(InputError, match=rf"{table}/part-.*: column {column} \(.*\) is missing"):
        open_runs(run)


def test_tokens_of_version_2_are_read_without_their_rollouts(tiny: Runs, tmp_path: Path, tiny_path: Path):
    plan = "explain select count(*) from tokens where is_kept"
    assert "Join" not in str(tiny.sql(plan).rows())
    assert "Join" in str(open_runs(as_version_1(tiny_path, tmp_path / "tiny")).sql(plan).rows())


@pytest.mark.parametrize("version", slow_after(1, [2, 1]))
def test_an_advantage_without_an_update_changes_no_answer(tiny: Runs, tiny_path: Path, tmp_path: Path, version: int):
    """Only ``is_kept`` marks the update.

    Other trainers also give dropped groups an advantage.
    """
    run = tmp_path / "tiny"
    if version == 1:
        as_version_1(tiny_path, run)
    else:
        shutil.copytree(tiny_path, run)

    def give_advantage(rows: pa.Table) -> pa.Table:
        frame = pl.DataFrame(rows)
        dropped = pl.when(pl.col("rollout_id") == 11).then(1.0).when(pl.col("rollout_id") == 12).then(-1.0)
        changed = frame.with_columns(dropped.otherwise(pl.col("advantage")).cast(pl.Float32).alias("advantage"))
        return changed.to_arrow().select(rows.column_names).cast(rows.schema)

    for table in ("tokens", "rollouts"):
        change_rows(run, table, give_advantage)
    runs = open_runs(run)
    counts = "select count(*) filter (advantage <> 0), count(*) filter (is_kept) from tokens"
    assert runs.sql(counts).row(0) == (42, 32)
    assert runs.sql("select count(*) from staged_tokens where sample_sign is not null").item() == 32
    assert_equal_answers(runs, tiny)


@pytest.mark.parametrize("version", [1, 2])
def test_a_prompt_sampled_twice_in_one_step_is_two_groups(tiny: Runs, tiny_path: Path, tmp_path: Path, version: int):
    run = tmp_path / "tiny"
    shutil.copytree(tiny_path, run)

    def rename(rows: pa.Table) -> pa.Table:
        names = [
            "a" if (step, name) == (20, "b") else name
            for step, name in zip(rows["step"].to_pylist(), rows["prompt_id"].to_pylist(), strict=True)
        ]
        i = rows.schema.get_field_index("prompt_id")
        return rows.set_column(i, rows.schema.field(i), pa.array(names))

    for table in ("tokens", "rollouts"):
        change_rows(run, table, rename)
    runs = open_runs(as_version_1(run, tmp_path / "old") if version == 1 else run)
    groups = runs.sql("select group_id, count(*) as n from rollouts where step = 20 group by all order by 1")
    assert groups["n"].to_list() == [2, 2, 2]
    assert (
        runs.query("ppl_halves")["difference"].sort().to_list()
        == tiny.query("ppl_halves")["difference"].sort().to_list()
    )
    by_ppl, separate = (which.query("correctness_by_ppl", stage="plateau", bins=2) for which in (runs, tiny))
    assert by_ppl["accuracy"].to_list() == separate["accuracy"].to_list()
    terciles, apart = (which.query("high_entropy_by_ppl", stage="plateau", top=1.0) for which in (runs, tiny))
    assert terciles["num_tokens"].to_list() == apart["num_tokens"].to_list()
