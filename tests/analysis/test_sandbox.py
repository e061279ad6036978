"""Test limits of a user's SQL.

Queries are bounded in time and memory, end with their reader, and are streamed.
"""

from __future__ import annotations

import _thread
import datetime
import gc
import io
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import polars.selectors as cs
import pytest

from entrace.analysis.runs import Runs, open_runs
from entrace.analysis.sandbox.process import Limits
from entrace.analysis.sandbox.worker import _distinct
from entrace.analysis.terminal.interrupt import interruptible
from entrace.analysis.trace import InputError
from tests.analysis.conftest import written
from tests.patience import HANG_S
from tests.slow import slow_after

# Ten times the second within which Ctrl-C must end a query.
STOP_S = 10.0
# Queries that need more memory than the limit, in DuckDB's buffers or outside them.
GREEDY = {
    "one text": "select length(repeat('x', 4000000000))",
    "many texts": "select string_agg(repeat('x', 1000000)) from range(1000000)",
    "list": "select list(range) from range(1000000000000)",
    "nested list": "select list_transform(range(300000000), lambda x: x::varchar)",
    "regular expression": "select max(regexp_replace(repeat('ab', 300000000), '(a+)+b', 'cc', 'g'))",
    "map": "select map_from_entries(list((range, range))) from range(1000000000)",
}
# Queries that would run for hours within any memory.
ENDLESS = {
    "cross join": "select count(*) from range(1e8::bigint) a, range(1e8::bigint) b where (a.range * b.range) % 7 = 3",
    "range": "select sum(hash(range)::double) from range(1000000000000)",
    "recursion": "with recursive t(x) as (select 1 union all select x + 1 from t) select max(x) from t",
    "aggregate without rows": "select a.step from steps a, range(1e12::bigint) where range < -1",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    from tests.analysis.conftest import write_tiny

    return open_runs(write_tiny(tmp_path_factory.mktemp("sandbox") / "tiny"))


def start(*args: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "entrace", "sql", *args]
    # Tests that run in the background of a shell inherit that Ctrl-C is ignored.
    hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=hear)


def path_of(runs: Runs) -> str:
    return next(iter(runs.manifests.values()))["path"]


def children_of(pid: int) -> list[int]:
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process")
@pytest.mark.parametrize("text", slow_after(3, GREEDY.values()), ids=GREEDY)
def test_memory_is_bounded_wherever_it_is_allocated(runs: Runs, text: str):
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    with pytest.raises(InputError, match=r"needs more than 400MiB of memory; .* raise --memory"):
        runs.sql(text, memory="400MiB")
    # The largest child so far, in KiB: the limit, and what an idle process needs. A child counts the memory of the
    # process that starts it, until it runs a program of its own.
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss <= max(before, own, 700 << 10)
    assert runs.sql("select count(*) from steps").item() == 24


@pytest.mark.parametrize("text", ENDLESS.values(), ids=ENDLESS)
def test_time_is_bounded(runs: Runs, text: str):
    started = time.monotonic()
    with pytest.raises(InputError, match=r"stopped after 0\.5 s; .* raise --timeout"):
        runs.sql(text, timeout=0.5)
    assert time.monotonic() - started < STOP_S


def test_a_result_that_exceeds_the_memory_is_refused_and_can_be_streamed(runs: Runs):
    text = "select range, range::double as x from range(8000000)"
    with pytest.raises(InputError, match=r"the result needs more than 100MiB of memory; .*runs\.stream"):
        runs.sql(text, memory="100MiB")
    heights, total = [], 0
    for part in runs.stream(text, memory="100MiB"):
        heights.append(part.height)
        total += int(part["range"].sum())
    assert heights[0] == 0
    assert sum(heights) == 8_000_000
    assert total == sum(range(8_000_000))
    assert max(heights) < 1_000_000


def test_two_results_can_be_read_at_once(runs: Runs):
    numbers, letters = runs.stream("select range from range(500000)"), runs.stream("select 'x' as x")
    next(numbers)
    assert pl.concat(letters).rows() == [("x",)]
    assert sum(part.height for part in numbers) == 500_000


@pytest.mark.parametrize(
    ("memory", "expected"), [("500MB", 500_000_000), ("2GiB", 2 << 30), ("1.5g", 1_500_000_000), (10**9, 10**9)]
)
def test_sizes_are_read_with_their_units(memory: str | int, expected: int):
    assert Limits.parse(memory, None).memory == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"memory": "lots"}, '"lots" is not a size; expected a number with a unit, such as 500MB or 2GiB'),
        ({"memory": "-1GB"}, "not a size"),
        ({"memory": "12"}, "too little for a query; expected at least 64MiB"),
        ({"timeout": -1}, "expected 0 (no limit) or more"),
        ({"timeout": float("nan")}, "expected 0 (no limit) or more"),
    ],
)
def test_bad_limits_are_named(runs: Runs, given: dict[str, Any], message: str):
    with pytest.raises(InputError) as error:
        runs.sql("select 1", **given)
    assert message in str(error.value)


def test_errors_after_the_first_rows_are_one_line(runs: Runs):
    late = "select case when range = 2000000 then error('late') else range::varchar end from range(2000001)"
    with pytest.raises(InputError, match="late") as error:
        runs.sql(late)
    assert "\n" not in str(error.value)
    assert runs.sql("select 1 as a").item() == 1


@pytest.mark.parametrize("column", ["interval 3 day", "[interval 3 day]", "union_value(a := 1)"])
def test_types_that_no_frame_can_hold_are_named(runs: Runs, column: str):
    with pytest.raises(InputError, match=r'column "x" has type .*, which is not supported; cast it'):
        runs.sql(f"select {column} as x")


def test_equal_names_are_told_apart(runs: Runs):
    assert _distinct(["a", "a", "a_1", "A", "a"]) == ["a", "a_1", "a_1_1", "A_2", "a_3"]
    assert runs.sql("select 1 as a, 2 as A").columns == ["a", "A_1"]


def test_the_child_ends_with_its_runs(tmp_path: Path):
    from tests.analysis.conftest import write_tiny

    opened = open_runs(write_tiny(tmp_path / "tiny"))
    before = set(children_of(os.getpid()))
    assert opened.sql("select 1 as a").item() == 1
    assert len(set(children_of(os.getpid())) - before) == 1
    del opened
    gc.collect()
    assert set(children_of(os.getpid())) <= before


def test_the_child_ends_when_its_parent_is_killed(runs: Runs):
    path = path_of(runs)
    parent = start(path, ENDLESS["range"])
    deadline = time.monotonic() + HANG_S
    while not (found := children_of(parent.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    parent.kill()
    parent.communicate()
    while any(Path(f"/proc/{child}").exists() for child in found) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found
    assert not any(Path(f"/proc/{child}").exists() for child in found)


@pytest.mark.parametrize(
    "text", slow_after(2, [*ENDLESS.values(), GREEDY["regular expression"]]), ids=[*ENDLESS, "regex"]
)
def test_ctrl_c_ends_any_query(runs: Runs, text: str):
    path = path_of(runs)
    process = start(path, text, "--memory", "6GiB")
    deadline = time.monotonic() + HANG_S
    while not children_of(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    try:
        out, err = process.communicate(timeout=HANG_S)
    finally:
        process.kill()
    assert time.monotonic() - started < STOP_S
    assert (process.returncode, out, err) == (130, b"", b"entrace: stopped; run the same command again\n")


# A terminal signals the process, an IDE may signal one thread or set Python's flag; only the first interrupts a wait.
@pytest.mark.parametrize(
    "interrupt",
    [lambda: os.kill(os.getpid(), signal.SIGINT), lambda: signal.raise_signal(signal.SIGINT), _thread.interrupt_main],
    ids=["process", "thread", "flag"],
)
@pytest.mark.usefixtures("heard_ctrl_c")
def test_ctrl_c_ends_a_query_from_python(runs: Runs, interrupt: Callable[[], None]):
    threading.Timer(0.5, interrupt).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        runs.sql(ENDLESS["recursion"])
    assert time.monotonic() - started < STOP_S


@pytest.mark.parametrize("form", slow_after(1, ["csv", "json", "parquet", "table"]))
def test_a_query_ends_when_nobody_reads_its_rows(runs: Runs, form: str):
    path = path_of(runs)
    # No row arrives, so only the closed pipe can end it.
    process = start(path, ENDLESS["aggregate without rows"], "--format", form)
    assert process.stdout is not None
    assert process.stderr is not None
    deadline = time.monotonic() + HANG_S
    while not children_of(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.stdout.close()
    assert process.wait(STOP_S) == 0
    assert process.stderr.read() == b""


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
@pytest.mark.parametrize("form", slow_after(1, ["json", "csv", "parquet", "table"]))
def test_output_needs_little_memory_whatever_its_size(runs: Runs, form: str, tmp_path: Path):
    path = path_of(runs)
    sizes = []
    for rows in (10, 2_000_000):
        text = f"select range as n, 'text ' || range as x from range({rows})"
        script = f"""
import pathlib, sys
from entrace.analysis.cli import app, run
sys.argv = ["entrace", "sql", {path!r}, {text!r}, "--format", {form!r}]
try:
    run(app)
finally:
    print(pathlib.Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0], file=sys.stderr)
"""
        with open(tmp_path / "out", "wb") as out:
            done = subprocess.run([sys.executable, "-c", script], stdout=out, stderr=subprocess.PIPE, check=True)
        sizes.append(int(done.stderr.split()[-1]) >> 10)
    assert sizes[1] - sizes[0] < 300
    read = {"csv": pl.read_csv, "json": pl.read_json, "parquet": pl.read_parquet}.get(form)
    if read:
        frame = read(tmp_path / "out")
        assert (frame.height, frame["n"].sum()) == (2_000_000, sum(range(2_000_000)))
    else:
        assert "2,000,000 rows in all" in (tmp_path / "out").read_text()


def test_the_parent_does_not_shadow_modules_with_files_of_the_working_directory(runs: Runs, tmp_path: Path):
    for name in ("duckdb", "pickle", "queue"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('shadowed')")
    path = path_of(runs)
    read = f"entrace.open_runs({path!r}).sql('select 7').item()"
    script = f"import sys; sys.path = sys.path[1:]; import entrace; print({read})"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("7\n", "")


def test_json_lines_equal_what_the_json_module_writes():
    frame = pl.DataFrame(
        {
            "number": [0.1, float("nan"), float("-inf"), 1e-300],
            "single": pl.Series([0.1, 1.5, None, float("inf")], dtype=pl.Float32),
            "text": ['"\\', "a\nb", "\x1b\u2028é\U0001f600", None],
            "count": [2**62, -1, 0, None],
            "flag": [True, False, None, True],
        }
    )
    hard = frame.with_columns(
        day=pl.lit(datetime.date(2026, 1, 2)),
        at=pl.lit(datetime.datetime(2026, 1, 2, 3, 4, 5, 600)),
        exact=pl.lit(12345678901234567890123456789, pl.Decimal(38, 0)),
        rows=pl.Series([[{"y": float("nan"), "z": [1]}]] * 4),
        raw=pl.lit(b"a\xff"),
    )
    finite = pl.when(cs.float().is_finite()).then(cs.float()).name.keep()
    expected = frame.with_columns(finite).to_dicts()
    assert json.loads(written(frame, "json")) == expected
    found = json.loads(written(hard, "json"))
    assert [{name: row[name] for name in frame.columns} for row in found] == expected
    assert found[0]["day"] == "2026-01-02"
    assert found[0]["exact"] == 12345678901234567890123456789
    assert found[0]["rows"] == [{"y": None, "z": [1]}]
    assert json.loads(written(frame.clear(), "json")) == []


def test_plans_are_printed_whole(command, runs: Runs):
    path = path_of(runs)
    out = command("sql", path, "explain select * from tokens where step = 3 and position > 1")[1].decode()
    assert out.count("\n") > 10
    assert "│" in out
    assert "\\n" not in out
    assert "explain_key" not in out


def test_safe_csv_marks_formulas(command, runs: Runs):
    path = path_of(runs)
    text = "select '=1+1' as a, '-2' as b, 'x' as c, -2 as d"
    assert command("sql", path, text, "--format", "csv")[1] == b"a,b,c,d\n=1+1,-2,x,-2\n"
    assert command("sql", path, text, "--format", "csv", "--safe")[1] == b"a,b,c,d\n'=1+1,'-2,x,-2\n"


def test_long_queries_show_their_progress(runs: Runs):
    path = path_of(runs)
    text = "select count(*) from range(100000000) where hash(range) % 7 = 1"
    script = f"""
import sys
from entrace.analysis.cli import app, run
from entrace.analysis.terminal import progress, query_progress
progress.PLAIN_LINE_EVERY_S = query_progress.SILENT_S = 0.0
sys.argv = ["entrace", "sql", {path!r}, {text!r}, "--format", "csv"]
run(app)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("count_star()\n")
    percents = [int(line.split()[1].split("/")[0]) for line in done.stderr.splitlines()]
    assert percents == sorted(percents)
    assert any(0 < percent < 100 for percent in percents)


def test_written_parts_make_one_parquet_file(runs: Runs):
    frame = pl.DataFrame({"a": range(10), "b": [[1, 2]] * 10, "c": ["x"] * 10})
    assert pl.read_parquet(io.BytesIO(written(frame, "parquet"))).equals(frame)


@pytest.mark.parametrize("has_started", [True, False])
def test_ctrl_c_while_the_thread_of_a_query_starts_leaves_the_connection_free(
    monkeypatch: pytest.MonkeyPatch, has_started: bool
):
    con = duckdb.connect()
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        if has_started:
            start(thread)
            # Until the query runs.
            time.sleep(0.3)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        interruptible(con, lambda: con.sql("select count(*) from range(1000000000) as a, range(100) as b").fetchall())
    assert con.sql("select 1").fetchall() == [(1,)]
