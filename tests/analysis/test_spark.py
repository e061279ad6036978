"""Test that Spark and DuckDB give equal answers to the same SQL.

Spark must be given nothing else.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from polars.testing import assert_frame_equal

pytest.importorskip("pyspark", reason="pyspark is not installed; make test-spark runs these tests")

from pyspark import SparkContext
from pyspark.sql import SparkSession

from entrace import open_runs
from entrace.analysis import queries
from entrace.analysis.runs import Runs
from entrace.analysis.spark import session
from entrace.analysis.spark.translation import shared
from entrace.analysis.trace import TABLES, InputError
from tests.analysis.conftest import write_steps, write_tiny
from tests.analysis.synthetic import Planted, write_run
from tests.analysis.test_trace_nulls import forget

# The engines add floats in different orders.
TOLERANCE = {"rel_tol": 1e-7, "abs_tol": 1e-10}
FROZEN = Path(__file__).parents[1] / "fixtures" / "frozen" / "none-seed0"
# On small tables, most of the time goes into plans and generated code.
SETTINGS = {
    "spark.sql.adaptive.enabled": "false",
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
    "spark.sql.codegen.wholeStage": "false",
    "spark.sql.files.openCostInBytes": "0",
    "spark.sql.shuffle.partitions": "2",
}
os.environ["JDK_JAVA_OPTIONS"] = "-XX:TieredStopAtLevel=1"
SUBMIT = ["--master local[2]", *(f"--conf {name}={value}" for name, value in SETTINGS.items()), "pyspark-shell"]
os.environ["PYSPARK_SUBMIT_ARGS"] = " ".join(SUBMIT)


def assert_equal(found: pl.DataFrame, expected: pl.DataFrame) -> None:
    """Compare two frames, with the types and the order of their columns."""
    assert found.schema == expected.schema
    assert_frame_equal(found, expected, rel_tol=TOLERANCE["rel_tol"], abs_tol=TOLERANCE["abs_tol"])


@dataclass
class Engines:
    """Hold runs that were opened on both engines."""

    duckdb: Runs
    spark: Runs

    def check(self, text: str, **params: object) -> pl.DataFrame:
        """Compare the answers to a query, types included, and return them."""
        expected = self.duckdb.sql(text, params)
        assert_equal(self.spark.sql(text, params), expected)
        return expected


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write two arms with two runs each, and two other traces.

    One of the runs per arm has nulls. The other traces are one worked out by hand and one of schema version 1. The
    folder has a name that is a pattern, an escape, and a partition to other readers.
    """
    root = tmp_path_factory.mktemp("spark") / "lr=0.1 [a]*{b} %20" / "study"
    for arm, accuracy in (("none", 0.6), ("ppl", 0.9)):
        for seed, parent in enumerate((root, root.parent / "with nulls")):
            planted = Planted(eval_accuracy=accuracy)
            write_run(parent / f"{arm}-run{seed}", arm=arm, seed=seed, planted=planted, steps=36, groups=2)
    for table in TABLES.values():
        nullable = [column.name for column in table.columns if column.nullable]
        forget(root, root.parent / "with nulls", table.name, nullable, "half")
    for run in (root.parent / "with nulls").iterdir():
        shutil.move(run, root / run.name)
    write_tiny(root / "tiny")
    shutil.copytree(FROZEN, root / FROZEN.name)
    return root


@pytest.fixture(scope="module")
def engines(folder: Path) -> Iterator[Engines]:
    yield Engines(open_runs(folder), open_runs(folder, engine="spark"))
    if active := SparkSession.getActiveSession():
        active.stop()


@pytest.mark.parametrize("stem", list(queries.BUILT_IN))
def test_questions(engines: Engines, stem: str):
    expected = engines.duckdb.query(stem)
    assert len(expected)
    assert_equal(engines.spark.query(stem), expected)


@pytest.mark.parametrize(
    ("stem", "params"),
    [
        ("entropy_by_position", {"stage": "plateau", "bins": 3, "runs": ["none-run0", "tiny"]}),
        ("high_entropy_words", {"top": 0.5, "words": 2}),
        ("paired_differences", {"baselines": {"none": "ppl"}, "k": 2}),
    ],
)
def test_questions_with_parameters(engines: Engines, stem: str, params: dict[str, object]):
    expected = engines.duckdb.query(stem, **params)
    assert len(expected)
    assert_equal(engines.spark.query(stem, **params), expected)


@pytest.mark.parametrize("name", [*TABLES, "response_tokens", "runs", "stages", "token_coverage"])
def test_tables_have_equal_rows(engines: Engines, name: str):
    """Nulls must match, and every file must be read exactly once."""
    columns = engines.duckdb.sql(f"select * from {name} limit 0").columns
    counts = ", ".join(f"count({column}) as {column}" for column in columns if column != "run_id")
    found = engines.check(f"select run_id, count(*) as num_rows, {counts} from {name} group by run_id order by run_id")
    assert len(found) > 1
    key = ", ".join(TABLES[name].sort_by) if name in TABLES else "all"
    engines.check(f"select * from {name} where run_id = 'none-run1' order by {key} limit 50")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("staged_steps", "step"),
        ("token_steps", "step"),
        ("responses_at_length", "rollout_id"),
        ("vocab_words", "token_id"),
    ],
)
def test_views_have_equal_rows(engines: Engines, name: str, key: str):
    assert len(engines.check(f"select * from {name} order by run_id, {key}"))


def test_tables_have_equal_columns(engines: Engines):
    """Columns must have equal order, because a union of stars matches by position."""
    names = [*TABLES, "response_tokens", "runs", "stages", "token_coverage", *shared().views]
    spark = engines.spark._spark._connected()  # pyright: ignore[reportOptionalMemberAccess]
    found = {name: spark.table(name).columns for name in names}
    assert found == {name: engines.duckdb.sql(f"select * from {name} limit 0").columns for name in names}


def test_the_stages_that_python_fits_are_equal(engines: Engines):
    assert engines.spark.stage_fits.keys() == engines.duckdb.stage_fits.keys()
    for run, fit in engines.duckdb.stage_fits.items():
        assert engines.spark.stage_fits[run].boundary == pytest.approx(fit.boundary)


# Where the two engines give different values for the same text, if it is left as it is.
EXPRESSIONS = [
    "i / 2",
    "(i + 0.5) / 3",
    "i / 0",
    "x / (i - i)",
    "i * 7 // 2",
    "(-i) // 2",
    "-7 // 2",
    "-7 % 3",
    "ln(x)",
    "ln(x - x)",
    "ln(-x)",
    "log(x)",
    "log10(1000.0)",
    "log2(x)",
    "log(2, x)",
    "sqrt(-x)",
    "(x * 1.5)::integer",
    "2.5::integer",
    "3.5::bigint",
    "(-2.5)::integer",
    "(x > 1)::integer",
    "'12'::integer",
    "x::float <= 0.2",
    "0.2 >= x::float",
    "f = 0.2",
    "f > 0.2 or f < 0.2",
    "f * 2",
    "sum(f)",
    "avg(f)",
    "quantile_cont(x, 0.3)",
    "quantile_cont(f, 0.3)",
    "quantile_cont(x, [0.1, 0.5])",
    "quantile_disc(x, 0.3)",
    "quantile_disc(x, 0.5)",
    "median(x)",
    "median(i)",
    "any_value(n)",
    "count(n)",
    "count(distinct n)",
    "list(n order by i)",
    "list(i order by n, i)",
    "list(n order by i) filter (where i > 1)",
    "list(n) filter (where i > 100)",
    "sum(x order by i)",
    "stddev(x)",
    "var_pop(x)",
    "corr(x, i)",
    "regr_slope(x, i)",
    "regr_r2(x, i)",
    "arg_max(i, x)",
    "arg_min(t, x)",
    "bool_or(n is null)",
    "count(*) filter (where n is null)",
    "greatest(1, null, 2)",
    "least(null, 2)",
    "range(3)",
    "range(0)",
    "range(2, 5)",
    "generate_series(1, 3)",
    "generate_series(3, 1)",
    "list_product([2, null, 3])",
    "list_product(list_transform(range(3), lambda q: q + 1))",
    "[4, 5][1]",
    "[4, 5][-1]",
    "[4, 5][3]",
    "list_contains([1, 2], 2)",
    "list_contains(null, 2)",
    "{'a': 1, 'b': 'x'}",
    "isfinite(1 / 0)",
    "isfinite(0 / 0)",
    "isfinite(null)",
    "'a' || 1",
    "'a' || null",
    "concat_ws('-', 'a', null, 'b')",
    "trim('xxaxx', 'x')",
    "'ab' like 'a_'",
    "'AB' ilike 'a%'",
    "regexp_matches('xay', 'a')",
    "chr(65)",
    "length('é')",
    "len([1, 2, 3])",
    "5000000000",
    "1e-3",
    "null is distinct from 1",
    "3 between 1 and 3",
    "2 not in (1, 3)",
    "case when null then 1 else 2 end",
    "if(null, 1, 2)",
    "nullif(1, 1)",
    "pow(2, 0.5)",
    "mod(7.5, 1)",
    "round(2.5)",
    "round(-2.567, 2)",
    "floor(-0.5)",
    "true and null",
    "('a' < 'B')",
]
ROWS = """with r as (
  select * from (values (1, 0.2, 'b', null), (2, 1.0, 'a', 5), (3, 8.0, 'C', null), (4, 2.5, 'é', 7)) as v (i, d, t, n)
), rows_of_r as (select i, d::double as x, d::float as f, t, n from r)
"""


def test_expressions_have_equal_values(engines: Engines):
    """Compare aggregates over all rows, and other expressions row by row."""
    aggregates = (
        "sum",
        "avg",
        "quantile",
        "median",
        "any_",
        "count(",
        "list(",
        "stddev",
        "var_",
        "corr",
        "regr",
        "arg_",
    )
    aggregates += ("bool_",)
    scalars = [e for e in EXPRESSIONS if not e.startswith(aggregates)]
    for chosen, order in ((scalars, "order by i"), ([e for e in EXPRESSIONS if e not in scalars], "")):
        columns = ", ".join(f"{expression} as c{number}" for number, expression in enumerate(chosen))
        found = engines.check(f"{ROWS} select {columns} from rows_of_r {order}")
        assert found.width == len(chosen)


@pytest.mark.parametrize(
    "text",
    [
        "from runs",
        "select n, i from rows_of_r order by n, i",
        "select n, i from rows_of_r order by n desc, i desc",
        "select t from rows_of_r order by all",
        "select * exclude (t) from rows_of_r order by i;  -- done",
        "select i, sum(x) over (order by i desc) as s, lag(t) over (order by i) as l from rows_of_r order by i",
        "select i, x from rows_of_r qualify row_number() over (order by x desc) <= 2 order by i",
        "select i, row_number() over (order by x desc) as place from rows_of_r qualify place <= 2 order by i",
        "select i % 2 as odd, sum(x) as s from rows_of_r group by all having s > 1 order by odd",
        "select name, value from (unpivot (select 1 as a, 2 as b, null::integer as c) on a, b, c into name name value "
        "value) order by name",
        "select * from rows_of_r semi join (select 2 as i) as s using (i)",
        "select * from rows_of_r anti join (select 2 as i) as s using (i) order by i",
        "select * from range(3) order by 1",
        "select q + 1 as q from generate_series(1, 3) as g(q) order by q",
        "select u from unnest([3, 1, 2]) as t(u) order by u",
        "select i, unnest(range(i)) as u from rows_of_r order by i, u",
        "select i, i as i from rows_of_r order by 1",
        "select * from rows_of_r join (select 1 as i, 2 as other) as o using (i)",
        "select i from rows_of_r union all select 9 as i order by i",
        "select * from (select i, t from rows_of_r) union all select 9 as i, 'z' as t order by i",
        "select r.*, u.n from r join (select i, count(*) as n from (select * from (select i from r) as p union all "
        "select * from (select i from r) as q) group by all) as u using (i) order by i",
        "select a.i, (select count(*) from r) as n from (with r as (select 7 as i) select * from r) as a",
        "select a.i, (select count(*) from runs) as n from (with runs as (select 7 as i) select * from runs) as a",
        "select i from (with m as materialized (select i from r) select * from m) as a order by i",
        "select i from rows_of_r where exists (select 1 from runs) and i > (select min(i) from rows_of_r) order by i",
        "select estimate(list(step_prompt(i, t, x, 1))) as e from rows_of_r",
        "select sign_of(true, x) as s, potential_bin(0.3) as p, pass_at_k(4, 1, 2) as k from rows_of_r",
        "select stage, entropy_threshold > 0 as is_positive from entropy_thresholds(0.2) order by run_id, stage",
    ],
)
def test_queries_have_equal_rows(engines: Engines, text: str):
    assert len(engines.check(text if text.startswith("from") else ROWS + text))


@pytest.mark.parametrize(
    "value", ["it's", "a\\", "\\'", 'q"q', "`", "x\ny\t", "${env:HOME}", "${spark.app.id}", "é’", ""]
)
def test_text_is_never_read_as_sql(engines: Engines, value: str):
    quoted = "'" + value.replace("'", "''") + "'"
    assert engines.check(f"select {quoted} as a, $given as b, [$given] as c", given=value)["a"].item() == value


@pytest.mark.parametrize("value", [None, True, 3, 2**40, 0.1, 1e-300, float("inf"), [1, 2], ["a", "it's"]])
def test_parameters_keep_their_values(engines: Engines, value: object):
    engines.check("select $given as a, $given is null as b", given=value)


REFUSED = {
    "select * from 'x.parquet'": "is not a table of the trace",
    "select * from parquet.`x.parquet`": "sql",
    'select * from parquet."x.parquet"': "names a database or a file",
    'select * from "parquet.`x.parquet`"': "is not a table of the trace",
    "select * from parquet_scan('x.parquet')": "parquet_scan() is not supported on Spark",
    "select * from read_parquet('x.parquet')": "read_parquet() is not supported on Spark",
    "select * from read_csv('x.csv')": "read_csv() is not supported on Spark",
    "select * from read_text('/etc/passwd')": "read_text() is not supported on Spark",
    "select * from glob('*')": "glob() is not supported on Spark",
    "select * from tokns": 'did you mean "tokens"?',
    "select * from information_schema.tables": "names a database",
    "select * from duckdb_settings()": "duckdb_settings() is not supported on Spark",
    "select reflect('java.lang.System', 'exit', 1)": "reflect() is not supported on Spark",
    "select java_method('java.lang.System', 'exit', 1)": "java_method() is not supported on Spark",
    "select input_file_name()": "input_file_name() is not supported on Spark",
    "select getenv('HOME')": "getenv() is not supported on Spark",
    "select current_setting('threads')": "current_setting() is not supported on Spark",
    "select random()": "rand() is not supported on Spark",
    "select now()": "is not supported on Spark",
    "select x'; drop view tokens' as a": "sql",
    "select 1; select 2": "expected one query",
    "create table t as select 1": "read-only",
    "insert into runs select * from runs": "read-only",
    "drop view tokens": "read-only",
    "set threads = 1": "read-only",
    "with x as (insert into runs values (1) returning *) select * from x": "is not supported on Spark",
    "copy runs to 'x.csv'": "read-only",
    "describe tokens": "DESCRIBE is not supported on Spark",
    "explain select 1": "is not supported on Spark",
    "pivot runs on arm using count(*)": "PIVOT is not supported on Spark",
    "select * from runs asof join stages using (run_id)": "ASOF JOIN is not supported on Spark",
    "select * from runs positional join stages": "POSITIONAL JOIN is not supported on Spark",
    "select * from runs join stages using (run_id) union all select * from runs join stages using (run_id)": "USING",
    "with a as (select s.* from stages s join runs using (run_id)) select * from a union all from stages": "USING",
    "select distinct on (arm) * from runs": "DISTINCT ON is not supported on Spark",
    "select * from runs tablesample 10%": "is not supported on Spark",
    "select first(arm) from runs": "first() is not supported on Spark",
    "select histogram(seed) from runs": "histogram() is not supported on Spark",
    "select approx_quantile(seed, 0.5) from runs": "is not supported on Spark",
    "select list(arm order by seed desc) from runs": "descending",
    "select seed::date from runs": "the type DATE is not supported on Spark",
    "select columns('a.*') from runs": "is not supported on Spark",
    "with recursive r as (select 1 as n union all select n + 1 from r where n < 5) select * from r": "RECURSIVE",
    "select armm from runs": "armm",
    "select sum(arm) from runs": "sql",
    "select $a": "sql",
}


@pytest.mark.parametrize("text", REFUSED)
def test_anything_else_is_refused_in_one_line(engines: Engines, text: str):
    if text == "select $a":
        with pytest.raises(InputError, match=r'unknown parameter "b"'):
            engines.spark.sql(text, {"b": 1})
        return
    with pytest.raises(InputError) as refused:
        engines.spark.sql(text)
    assert REFUSED[text] in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "select 1 // 0 as a",
        "select 'x'::integer + i from (select 1 as i)",
        "select 2000000000::integer * 2 as a",
        "select (select step from steps) as a",
    ],
)
def test_what_fails_on_duckdb_fails_on_spark(engines: Engines, text: str):
    for runs in (engines.duckdb, engines.spark):
        with pytest.raises(InputError) as failed:
            runs.sql(text)
        assert "\n" not in str(failed.value)


def test_the_command(engines: Engines, tiny_path: Path, command):
    text = "select run_id, max(step) as step from steps group by all order by run_id"
    answers = [
        command("sql", str(tiny_path), text, "--engine", name, "--format", "csv") for name in ("duckdb", "spark")
    ]
    assert answers[0][:2] == answers[1][:2]
    assert answers[1][0] == 0
    code, out, err = command("sql", str(tiny_path), "select reflect('a', 'b')", "--engine", "spark")
    assert (code, out) == (2, b"")
    assert err.startswith("entrace: sql: reflect() is not supported on Spark; ")
    assert err.count("\n") == 1
    code, out, err = command("sql", str(tiny_path), "select 1 // (step - step) as a from steps", "--engine", "spark")
    assert (code, out) == (2, b"")
    assert err.startswith("entrace: sql: [DIVIDE_BY_ZERO] ")
    assert err.count("\n") == 1


def test_without_java(tmp_path: Path):
    write_steps(tmp_path / "run")
    env = {name: value for name, value in os.environ.items() if name != "JAVA_HOME"} | {"PATH": str(tmp_path)}
    words = [sys.executable, "-m", "entrace", "sql", str(tmp_path / "run"), "select 1", "--engine", "spark"]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("entrace: spark: no Java found; install Java 17")
    assert done.stderr.count("\n") == 1


def test_a_file_that_spark_would_ignore_is_an_error(tmp_path: Path):
    run = write_steps(tmp_path / "run")
    table = pq.read_table(next((run / "steps").glob("*.parquet")))
    steps = pa.array(table["step"].to_numpy() + 100, pa.int32())
    later = table.set_column(table.column_names.index("step"), "step", steps)
    assert later["step"].equals(pa.chunked_array([steps]))
    pq.write_table(later, run / "steps" / "_more.parquet")
    assert len(open_runs(run).sql("from steps")) == 2 * len(table)
    with pytest.raises(InputError, match=r"steps: Spark reads 1 of the 2 files; it ignores names that begin with _"):
        open_runs(run, engine="spark")


def test_pending_files_count(tmp_path: Path):
    run = write_steps(tmp_path / "run")
    part = sorted((run / "steps").glob("*.parquet"))[-1]
    (run / ".pending").mkdir(exist_ok=True)
    part.rename(run / ".pending" / f"steps.{part.name}")
    Engines(open_runs(run), open_runs(run, engine="spark")).check("select step, accuracy from steps order by step")


def test_a_deleted_file_is_named(tmp_path: Path):
    run = write_steps(tmp_path / "run")
    runs = open_runs(run, engine="spark")
    part = sorted((run / "steps").glob("*.parquet"))[-1]
    part.unlink()
    with pytest.raises(InputError, match=f"{part.name}: deleted since the run was opened"):
        runs.sql("select count(*) as n, sum(accuracy) from steps")


# Minutes of work: tasks notice an interruption between two rows of a file, and not between two rows of a range.
LONG = "select count(*) as n from tokens as a, tokens as b where a.step + b.step > 7"
ENDLESS = "select count(*) as n from range(1000000) as a(i), range(10000) as b(j) where i + j > 7"
IN_S = 60


def refuse(engines: Engines, text: str, timeout: float, match: str) -> None:
    """Check the error of a query that takes too long.

    The error must come soon after the limit.
    """
    started = time.monotonic()
    with pytest.raises(InputError, match=match) as stopped:
        engines.spark.sql(text, timeout=timeout)
    assert time.monotonic() - started < IN_S
    assert "\n" not in str(stopped.value)


@pytest.fixture
def scanned(engines: Engines):
    """Let the scan for NaN, which comes before the first query over tokens, be over."""
    engines.spark.sql("select count(*) as n from tokens")


def test_a_query_that_takes_too_long_is_interrupted(engines: Engines, scanned: None):
    jvm = SparkContext._gateway.proc  # pyright: ignore
    refuse(engines, LONG, 2, "^sql: stopped after 2 s; narrow the query")
    engines.check("select count(*) as n from tokens")
    assert SparkContext._gateway.proc is jvm  # pyright: ignore


@pytest.mark.parametrize("is_key", [False, True])
def test_a_query_is_interrupted_by_others(engines: Engines, scanned: None, heard_ctrl_c: None, is_key: bool):
    def press() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    stop: Callable[[], None] = press if is_key else engines.spark.stop
    timer = threading.Timer(2, stop)
    timer.start()
    with pytest.raises(KeyboardInterrupt if is_key else InputError, match="" if is_key else "^sql: stopped$"):
        engines.spark.sql(LONG, timeout=IN_S)
    engines.check("select count(*) as n from tokens")


def test_a_stopped_application_is_started_again(engines: Engines):
    """Its tables return, including those that Python fills."""
    engines.check("select * from stages order by run_id, stage")
    SparkSession.builder.getOrCreate().stop()
    engines.check("select * from stages order by run_id, stage")


def test_spark_is_ended_with_tasks_that_it_cannot_interrupt(engines: Engines, monkeypatch: pytest.MonkeyPatch):
    engines.check("select count(*) as n from range(10) as a(i), range(10) as b(j) where i + j > 7")
    jvm = SparkContext._gateway.proc  # pyright: ignore
    with monkeypatch.context() as patch:
        # As if somebody else had started it.
        patch.setattr(session, "_started", None)
        refuse(engines, ENDLESS, 5, "^sql: stopped after 5 s, .* its tasks continue in the active application")
    assert jvm.poll() is None
    # One of the two cores is left.
    engines.check("select count(*) as n from runs")
    refuse(engines, ENDLESS, 5, "^sql: stopped after 5 s, together with Spark, .*; the next query starts Spark again")
    assert jvm.poll() is not None
    engines.check("select * from stages order by run_id, stage")


def test_a_jvm_that_ended_is_started_again(engines: Engines, scanned: None):
    jvm = SparkContext._gateway.proc  # pyright: ignore
    timer = threading.Timer(2, jvm.terminate)
    timer.start()
    refuse(engines, LONG, IN_S, "^sql: Spark ended during the query")
    engines.check("select * from stages order by run_id, stage")
    assert SparkContext._gateway.proc is not jvm  # pyright: ignore


ON_AN_EXECUTOR = """
import sys
from entrace import open_runs
from entrace.analysis.trace import InputError
from polars.testing import assert_frame_equal
from pyspark import SparkContext

duckdb, spark = open_runs(sys.argv[1]), open_runs(sys.argv[1], engine="spark")
text = "select step, estimate(list(step_prompt(step, prompt_id, entropy, 1))) as e from tokens group by all order by 1"
assert_frame_equal(spark.sql(text), duckdb.sql(text), rel_tol=1e-7)
jvm = SparkContext._gateway.proc
try:
    spark.sql(sys.argv[2], timeout=5)
except InputError as error:
    print(error)
assert_frame_equal(spark.sql(text), duckdb.sql(text), rel_tol=1e-7)
assert SparkContext._gateway.proc is jvm
"""


def test_an_executor_is_ended_with_tasks_that_spark_cannot_interrupt(tiny_path: Path):
    """Use a cluster of one executor, which is a separate process."""
    submit = os.environ["PYSPARK_SUBMIT_ARGS"].replace("local[2]", "local-cluster[1,2,1024]")
    words = [sys.executable, "-c", ON_AN_EXECUTOR, str(tiny_path), ENDLESS]
    done = subprocess.run(words, env={**os.environ, "PYSPARK_SUBMIT_ARGS": submit}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "sql: stopped after 5 s; narrow the query, or raise --timeout (timeout= in Python)\n"
    # The JVM itself says which options and modules it has.
    said = [line for line in done.stderr.splitlines() if not line.startswith(("NOTE: ", "WARNING: Using incubator"))]
    assert not said
