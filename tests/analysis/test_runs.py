"""Test opening traces, the errors of damaged ones, and the limits on queries."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from polars.testing import assert_frame_equal

from entrace.analysis import queries
from entrace.analysis.runs import Runs, open_runs
from entrace.analysis.sandbox.statements import parameter_names
from entrace.analysis.trace import InputError, Recorder, TraceWriter, write_manifest
from tests.analysis.conftest import VOCAB, step_row, write_failed
from tests.slow import slow_after


def part(folder: Path, table: str) -> Path:
    return next((folder / table).glob("*.parquet"))


def drop_column(folder: Path) -> None:
    path = part(folder, "tokens")
    pq.write_table(pq.read_table(path).drop_columns("entropy"), path)


def change_type(folder: Path) -> None:
    path = part(folder, "tokens")
    table = pq.read_table(path)
    column = table.schema.get_field_index("step")
    pq.write_table(table.set_column(column, "step", table["step"].cast(pa.string())), path)


def change_version(folder: Path) -> None:
    path = part(folder, "rollouts")
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({b"entrace_schema_version": b"7"}), path)


def truncate(folder: Path) -> None:
    path = part(folder, "steps")
    path.write_bytes(path.read_bytes()[:-20])


def change_manifest_version(folder: Path) -> None:
    path = folder / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 99}))


def link_file(folder: Path) -> None:
    path = part(folder, "tokens")
    path.rename(folder / "moved.parquet")
    path.symlink_to(folder / "moved.parquet")


def link_folder(folder: Path) -> None:
    (folder / "tokens").rename(folder / "moved")
    (folder / "tokens").symlink_to(folder / "moved")


def make_pipe(folder: Path) -> None:
    path = part(folder, "tokens")
    path.unlink()
    os.mkfifo(path)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing column": (drop_column, r"tokens/part-.*: column entropy \(float\) is missing; found run_id, step, "),
    "wrong type": (change_type, r"column step is string, expected int32"),
    "other version": (change_version, r"rollouts/part-.*: schema version 7, this version of entrace reads 1 to 2"),
    "truncated": (truncate, r"steps/part-.*: damaged or truncated Parquet file"),
    "empty file": (lambda folder: part(folder, "tokens").write_bytes(b""), r"damaged or truncated Parquet file"),
    "other manifest": (change_manifest_version, r"run.json: schema_version 99, this version of entrace reads 1 to 2"),
    "not JSON": (lambda folder: (folder / "run.json").write_text("{"), r"run.json: not JSON"),
    "linked file": (link_file, r"tokens/part-.*: a link, or not a regular file; a trace holds regular files only"),
    "linked folder": (link_folder, r"tokens/part-.*: a link, or not a regular file; a trace holds regular files only"),
    "pipe": (make_pipe, r"tokens/part-.*: a link, or not a regular file; a trace holds regular files only"),
    "no manifest": (lambda folder: (folder / "run.json").unlink(), r"not a trace \(no run.json\)"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_trace_is_one_line(tiny_path: Path, tmp_path: Path, case: str):
    damage, message = DAMAGE[case]
    folder = tmp_path / "run"
    shutil.copytree(tiny_path, folder)
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        open_runs(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("path", "message"), [("nowhere", "no such folder"), ("*.trace", "no such folder")])
def test_no_such_folder(tmp_path: Path, path: str, message: str):
    with pytest.raises(InputError, match=message):
        open_runs(tmp_path / path)


def test_equal_run_ids_are_refused(tiny_path: Path, tmp_path: Path):
    shutil.copytree(tiny_path, tmp_path / "copy")
    with pytest.raises(InputError, match='run_id "tiny" is already used by '):
        open_runs([tiny_path, tmp_path / "copy"])


@pytest.mark.parametrize("given", ["folder", "glob", "runs"])
def test_study_folder_glob_and_list_open_the_same(study_path: Path, given: str):
    paths = {"folder": str(study_path), "glob": f"{study_path}/*", "runs": sorted(study_path.iterdir())}[given]
    assert set(open_runs(paths).manifests) == {path.name for path in study_path.iterdir()}


def test_failed_run_without_data_is_listed(tmp_path: Path):
    runs = open_runs(write_failed(tmp_path / "broken"))
    assert runs.sql("select run_id, status, error from runs").rows() == [("broken", "failed", "step 3: loss is nan")]
    assert runs.sql("select count(*) from tokens").item() == 0
    assert runs.query("entropy_by_position").is_empty()


def test_run_that_is_being_written(tmp_path: Path):
    writer = TraceWriter.create(tmp_path / "live", {"run_id": "live"}, VOCAB)
    writer.append("steps", step_row(1, entropy=1.0, accuracy=0.5))
    writer.flush(1)
    (tmp_path / "live" / "steps" / ".part-000002-000002.parquet.tmp").write_bytes(b"half a file")
    runs = open_runs(tmp_path / "live")
    writer.append("steps", step_row(2, entropy=1.0, accuracy=0.5))
    writer.flush(2)
    assert runs.sql("select step from steps").rows() == [(1,)]
    assert open_runs(tmp_path / "live").sql("select max(step) from steps").item() == 2


def test_stages_cover_every_step_once(study: Runs):
    counts = study.sql(
        """
        select steps.run_id, steps.step, count(*) as n
        from steps join stages on stages.run_id = steps.run_id and steps.step between first_step and last_step
        group by all
        """
    )
    assert set(counts["n"]) == {1}
    assert counts.height == study.sql("select count(*) from steps").item()


def test_stages_are_there_even_if_fits_were_asked_for_first(tiny_path: Path):
    runs = open_runs(tiny_path)
    assert runs.stage_fits["tiny"].boundary == 10
    assert runs.sql("select stage, first_step, last_step from stages").rows() == [
        ("rising", 1, 10),
        ("plateau", 11, 24),
    ]


@pytest.mark.parametrize("name", ["staged_steps", "responses_at_length", "steps_with_threshold(0.2)"])
def test_views_that_build_on_stages_have_rows_in_the_first_query(tiny_path: Path, name: str):
    assert open_runs(tiny_path).sql(f"select count(*) from {name}").item() > 0


# One question per kept view comes first.
READERS_OF_KEPT = ["high_entropy_by_position", "entropy_forecasts", "u_shape", "entropy_laws"]


@pytest.mark.parametrize(
    "stem", slow_after(4, [*READERS_OF_KEPT, "entropy_law_calibration", "high_entropy_words", "end_by_entropy"])
)
def test_kept_rows_answer_as_the_tokens_do(study_path: Path, stem: str):
    runs = open_runs(study_path)
    asked = [["none-seed1"], ["none-seed0", "none-seed1"], None]
    # The first answer keeps one run, the second adds another; queries of ``sql`` run in a process that keeps nothing.
    for names in asked:
        anew = runs.sql(queries.BUILT_IN.read(stem), {"runs": names})
        assert_frame_equal(runs.query(stem, runs=names), anew, abs_tol=1e-12)
    assert runs.query(stem)["run_id"].n_unique() == len(runs.stage_fits)


def test_every_kept_view_is_compared_with_the_tokens():
    texts = map(queries.BUILT_IN.read, READERS_OF_KEPT)
    assert {view for text in texts for view in queries.kept_views_in(text)} == set(queries.KEPT)


class Interrupting:
    """A connection on which Ctrl-C arrives during a statement.

    Python raises when the call returns.
    """

    def __init__(self, con: duckdb.DuckDBPyConnection, statement: str, number: int = 0) -> None:
        self._con, self._statement, self._number = con, statement, number

    def __getattr__(self, name: str) -> object:
        return getattr(self._con, name)

    def execute(self, text: str, *args: object) -> object:
        result = self._con.execute(text, *args)
        if text.startswith(self._statement):
            self._number -= 1
            if self._number == -1:
                raise KeyboardInterrupt
        return result


@pytest.mark.parametrize(
    ("statement", "number"),
    [
        ("begin", 0),
        ("begin", 3),
        *(("commit", i) for i in range(8)),
        ("delete from stages", 0),
        ("delete from fift", 0),
    ],
)
def test_after_ctrl_c_the_answer_is_the_same(tiny_path: Path, statement: str, number: int):
    expected = open_runs(tiny_path).query("u_shape")
    runs = open_runs(tiny_path)
    runs._con = Interrupting(runs._con, statement, number)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(KeyboardInterrupt):
        runs.query("u_shape")
    for _ in range(2):
        assert_frame_equal(runs.query("u_shape"), expected, abs_tol=1e-12)


def test_stop_ends_queries_and_nothing_else(tiny_path: Path):
    runs = open_runs(tiny_path)
    interrupted: list[str] = []

    class Stopping(Interrupting):
        """A connection whose user calls ``stop`` before every statement."""

        text = ""

        def execute(self, text: str, *args: object) -> object:
            self.text = text
            runs.stop()
            return super().execute(text, *args)

        def interrupt(self) -> None:
            interrupted.append(self.text)

    runs._con = Stopping(runs._con, "none")  # pyright: ignore[reportAttributeAccessIssue]
    assert runs.query("u_shape").height
    runs.stop()
    assert {" ".join(text.split()[:2]) for text in interrupted} == {"insert into"}


def test_kept_rows_do_not_outlive_the_tokens(tiny_path: Path, tmp_path: Path):
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_path, folder)
    runs = open_runs(folder)
    assert runs.query("high_entropy_words").height
    part(folder, "tokens").unlink()
    with pytest.raises(InputError, match="deleted since the run was opened"):
        runs.query("high_entropy_words")


def test_several_threads_ask_one_runs_object(study_path: Path):
    """Threads ask in this process and through queries in other processes.

    This process fills the computed tables of those queries.
    """
    runs = open_runs(study_path)
    asked: list[Callable[[], pl.DataFrame]] = [
        lambda: runs.query("stage_dynamics"),
        lambda: runs.query("entropy_by_sample_sign"),
        lambda: runs.read("select count(*) from staged_responses"),
        lambda: runs.sql("select count(*) from staged_tokens"),
    ]
    alone = [ask() for ask in asked]
    for _ in range(3):
        runs = open_runs(study_path)
        with ThreadPoolExecutor(len(asked)) as pool:
            together = [future.result() for future in [pool.submit(ask) for ask in asked]]
        for one, other in zip(alone, together, strict=True):
            assert_frame_equal(one, other)


def test_subjects_are_the_baseline_or_each_run(study: Runs, study_path: Path):
    assert study.subjects() == {"none": ["none-seed0", "none-seed1", "none-seed2"]}
    assert open_runs([study_path / "ppl-seed0", study_path / "ppl-seed1"]).subjects() == {
        "ppl-seed0": ["ppl-seed0"],
        "ppl-seed1": ["ppl-seed1"],
    }


def test_study_may_name_its_baseline(study_path: Path, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(study_path / "ppl-seed0", folder)
    manifest = json.loads((folder / "run.json").read_text())
    write_manifest(folder, {**manifest, "baseline": "ppl"})
    assert open_runs([folder, study_path / "none-seed0"]).subjects() == {"ppl": ["ppl-seed0"]}


@pytest.mark.parametrize(
    "statement",
    [
        "copy runs to '{run}/stolen.csv'",
        "copy runs to '{tmp}/stolen.csv'",
        "explain analyze copy runs to '{run}/stolen.csv'",
        "explain (analyze) copy runs to '{run}/stolen.csv'",
        "attach '{run}/new.db'",
        "install httpfs",
        "load httpfs",
        "pragma database_list",
        "pragma threads=1",
        "set enable_external_access = true",
        "reset lock_configuration",
        "call enable_logging()",
        "create table x as select 1",
        "drop table runs",
        "insert into runs (run_id) values ('x')",
        "with w as (insert into runs (run_id) values ('x') returning *) select * from w",
        "with w as (delete from stages returning *) select * from w",
        "select 1; select 2",
        "select 1; drop table runs",
        "select * from read_csv('/etc/passwd')",
        "select * from read_text('/etc/passwd')",
        "select * from '{tmp}/other.parquet'",
        "select * from glob('/etc/*')",
        "select getenv('HOME')",
        "select * from read_text('{run}/run.json')",
        "select * from read_blob('{run}/run.json')",
        "select * from read_csv('{run}/../../../etc/passwd')",
        "select * from parquet_metadata('{run}/steps/../../other.parquet')",
        "select * from read_parquet('{run}/*/*.parquet')",
        "select * from sniff_csv('/etc/passwd')",
        "select * from read_json('/proc/self/environ')",
        "select * from query_table('{tmp}/other.parquet')",
        "select * from read_csv('https://example.org/x.csv')",
        "select * from read_parquet('s3://bucket/x.parquet')",
        "select * from duckdb_secrets()",
        "select * from duckdb_extensions()",
        "create secret stolen (type s3)",
        "copy runs from '{tmp}/other.parquet'",
        "export database '{tmp}/all'",
        "import database '{tmp}/all'",
        "set variable x = 1",
        "prepare q as select 1",
        "execute q",
        "checkpoint",
        "vacuum",
        "begin",
        "commit",
        "rollback",
        "use temp",
        "create macro x() as 1",
        "update runs set run_id = 'x'",
        "select * from enable_profiling()",
        "select * from query('copy runs to ''{run}/stolen.csv''')",
        "from enable_logging(storage='file', storage_config={{'path': '{run}'}})",
        "select * from local_frame",
        "create table x as (pivot rollouts on step using count(*))",
        "create temp table x as (pivot rollouts on step using count(*))",
        "insert into runs (pivot runs on study using count(*))",
        "with w as (select 1) insert into runs (pivot runs on study using count(*))",
        "explain analyze create temp table x as (pivot rollouts on step using count(*))",
        "with w as (insert into runs (run_id) values ('x') returning *) pivot w on run_id using count(*)",
        "copy (pivot rollouts on step using count(*)) to '{run}/stolen.csv'",
        "pivot runs on study using count(*); drop table runs",
        "pivot runs on study using count(*); /* a */ rollback; drop table runs /* b */",
        "select 1; /* a */ rollback; drop table runs /* b */",
        "select 1) from runs; drop table runs; select exists (select 1",
        "pivot read_csv('/etc/passwd') on column0 using count(*)",
        "selec 1",
        "select nothing from tokens",
        "-- only a comment",
        "",
    ],
)
def test_query_can_neither_write_nor_look_elsewhere(tiny: Runs, tiny_path: Path, tmp_path: Path, statement: str):
    local_frame = pl.DataFrame({"x": [1]})
    local_frame.write_parquet(tmp_path / "other.parquet")
    before = {path: path.stat().st_mtime_ns for path in tiny_path.rglob("*")}
    with pytest.raises(InputError) as caught:
        tiny.sql(statement.format(run=tiny_path, tmp=tmp_path))
    assert "\n" not in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in tiny_path.rglob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["other.parquet"]
    assert tiny.sql("select count(*) from runs").item() == 1


@pytest.mark.parametrize(
    "statement",
    [
        "explain select 1",
        "-- why\nexplain analyze select count(*) from tokens",
        "explain pivot rollouts on step using count(*)",
        "from runs",
        "table runs",
        "values (1), (2)",
        "with w as (select 1) select * from w",
        "describe tokens",
        "describe pivot rollouts on step using count(*)",
        "show tables",
        "show tokens",
        "summarize steps",
        "unpivot steps on accuracy, reward_mean into name metric value value",
        "pivot_longer steps on accuracy, reward_mean",
        "pivot_wider rollouts on step using count(*)",
        "select * from (pivot rollouts on step using count(*))",
        "with w as (from rollouts) pivot w on step in (1, 2) using count(*)",
        "pivot rollouts on step using count(*); -- done",
        "select 1;",
        "select '; -- not a comment'",
        "pivot rollouts on step using count(*) /* ; */ ; /* done */ -- yes",
    ],
)
def test_reading_statements_pass(tiny: Runs, statement: str):
    assert tiny.sql(statement).height >= 1


def test_pivot_finds_its_columns_in_the_data(tiny: Runs):
    query = "pivot rollouts on is_correct using count(*) group by step order by step"
    found = tiny.sql(query)
    assert found.columns == ["step", "false", "true"]
    assert found.rows() == [(1, 2, 2), (10, 1, 1), (20, 2, 4)]
    # DuckDB creates a type for the PIVOT, which exists only during the query.
    assert tiny.sql(query).equals(found)


def test_a_pivot_that_writes_is_named(tiny: Runs):
    with pytest.raises(InputError) as caught:
        tiny.sql("create temp table x as (pivot rollouts on step using count(*))")
    expected = "sql is read-only: expected one query, such as SELECT or PIVOT; found a PIVOT inside another statement"
    assert str(caught.value) == expected


def test_names_are_suggested(tiny: Runs):
    with pytest.raises(InputError, match='unknown question "entropy_by_positon"; did you mean "entropy_by_position"'):
        tiny.query("entropy_by_positon")
    with pytest.raises(InputError, match='unknown parameter "stag"; did you mean "stage"'):
        tiny.query("entropy_by_position", stag="plateau")
    with pytest.raises(InputError, match="this query has none"):
        tiny.sql("select 1", {"x": 1})


def test_parameters_left_out_are_null(tiny: Runs):
    assert tiny.sql("select $a is null as a, $b as b", {"b": 2}).rows() == [(True, 2)]


def test_other_readers_open_the_folders(tiny_path: Path):
    expected = 6 * 2 + 6 * 5
    files = str(tiny_path / "tokens" / "*.parquet")
    assert duckdb.connect().execute(f"select count(*) from '{files}'").fetchall() == [(expected,)]
    assert pl.read_parquet(files).height == expected
    assert len(pd.read_parquet(tiny_path / "tokens")) == expected
    assert pl.read_parquet(tiny_path / "rollouts" / "*.parquet")["defects"].to_list()[3] == [
        "format_violation",
        "truncated",
    ]


def test_a_question_about_a_few_runs_reads_their_files_only(tmp_path: Path):
    for number in range(8):
        write_short_run(tmp_path / "study" / f"r{number}", seed=number)
    runs = open_runs(tmp_path / "study")
    chosen = ["r2", "r5"]
    alone = open_runs([tmp_path / "study" / name for name in chosen])
    stems = [stem for stem in runs.questions if "runs" in parameter_names(runs.questions.read(stem))]
    answers = {stem: runs.ask(stem, runs=chosen) for stem in stems}
    assert sum(answer.height > 0 for answer in answers.values()) >= 10
    for stem, answer in answers.items():
        assert_frame_equal(answer, alone.ask(stem, runs=chosen), check_row_order=False, rel_tol=1e-12, abs_tol=1e-12)
    # The rows of other runs are neither read nor checked; a question about all of them does both.
    shutil.rmtree(tmp_path / "study" / "r0" / "tokens")
    assert runs.ask("entropy_by_position", runs=chosen).height
    with pytest.raises(InputError, match="deleted since the run was opened"):
        runs.ask("entropy_by_position")
    # The views of a third group replace those of the first.
    for name in ("r3", "r4", "r2"):
        assert runs.ask("stage_dynamics", runs=[name])["run_id"].unique().to_list() == [name]


def write_short_run(run_dir: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    recorder = Recorder(run_dir, VOCAB, manifest={"seed": seed, "arm": "none"})
    for step in range(1, 13):
        ids = rng.integers(0, len(VOCAB), (8, 6))
        logprob = -rng.gamma(1, 0.5, ids.shape)
        recorder.record(
            step=step,
            prompt=[f"{i // 4 + step}" for i in range(8)],
            response_ids=ids,
            response_mask=np.ones(ids.shape, bool),
            logprob=logprob,
            entropy=rng.gamma(2, 0.3, ids.shape),
            logprob_after=np.minimum(logprob + rng.normal(0, 0.1, ids.shape), 0),
            entropy_after=rng.gamma(2, 0.3, ids.shape),
            reward=[0.0, 1.0] * 4,
        )
    recorder.close()
