"""Test the command line as users see it.

The tests cover output, one-line errors on stderr, and exit codes.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import polars as pl
import pytest

from entrace.analysis.cli import NOTES_SHOWN
from entrace.analysis.trace import TABLES, TraceWriter
from entrace.analysis.trace.staging import PARTIAL
from tests.analysis.conftest import write_failed, write_steps, write_tiny
from tests.patience import HANG_S
from tests.slow import slow_after


def test_incomplete_runs_are_noted_on_stderr(command, tmp_path: Path):
    for number in range(NOTES_SHOWN + 2):
        TraceWriter.create(tmp_path / f"run-{number}", {"run_id": f"run-{number}", "total_steps": 9}, ["<eos>"])
    code, out, err = command("sql", str(tmp_path), "select count(*) as n from steps", "--format", "csv")
    assert (code, out) == (0, b"n\n0\n")
    lines = err.splitlines()
    assert lines[0] == "entrace: run-0: being written or interrupted, 0 of 9 steps recorded"
    assert lines[-1] == "entrace: 2 more runs are incomplete or sampled"
    assert len(lines) == NOTES_SHOWN + 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["clams"], "claims"),
        (["claims", "RUN", "--jsn"], "--json"),
        (["sql", "RUN", "select 1", "--format", "xml"], "parquet"),
        (["report", "RUN"], "--out"),
        (["claims", "nowhere"], "nowhere: no such folder"),
        (["claims", "."], "not a trace (no run.json)"),
        (["sql", "select 1"], "name the runs first"),
        (["sql", "RUN", "selec 1"], "syntax error"),
        (["sql", "RUN", "select stepp from tokens"], "step"),
        (["sql", "RUN", "drop table runs"], "expected one query, such as SELECT or PIVOT; found DROP"),
        (["sql", "RUN", "--file", "nowhere.sql"], "nowhere.sql: no such file"),
        (["sql", "RUN", "select $a", "--param", "a"], "expected NAME=VALUE"),
        (["sql", "RUN", "select $alpha", "--param", "alpa=1"], 'did you mean "alpha"'),
        (["sql", "RUN", "select 1", "--engine", "sparc"], 'engine: unknown engine "sparc"; did you mean "spark"?'),
        (["tables", "tokenz"], 'unknown table "tokenz"; did you mean "tokens"?'),
        (["report", "RUN", "--out", "FULL"], "holds files other than a report"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(command, tiny_path: Path, tmp_path: Path, args: list[str], message: str):
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "notes.txt").write_text("mine")
    places = {"RUN": str(tiny_path), "FULL": str(tmp_path / "FULL"), ".": str(tmp_path / "FULL")}
    code, out, err = command(*[places.get(arg, arg) for arg in args])
    assert code == 2
    assert out == b""
    assert err.startswith("entrace: ")
    assert err.count("\n") == 1
    assert message in err
    assert [path.name for path in (tmp_path / "FULL").iterdir()] == ["notes.txt"]


@pytest.mark.skipif(find_spec("pyspark") is not None, reason="pyspark is installed")
def test_spark_without_its_extra(command, tiny_path: Path):
    code, out, err = command("sql", str(tiny_path), "select 1", "--engine", "spark")
    assert (code, out) == (2, b"")
    assert err == "entrace: spark: pyspark is missing; install it with pip install 'entrace[spark]'\n"


def test_other_failures_are_one_line_and_exit_1(command, monkeypatch: pytest.MonkeyPatch, tiny_path: Path):
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full\nreally")

    monkeypatch.setattr("entrace.analysis.runs.open_runs", fail)
    assert command("claims", str(tiny_path)) == (1, b"", "entrace: OSError: disk full really\n")


@pytest.mark.parametrize("form", ["csv", "json", "parquet"])
def test_sql_prints_what_scripts_read(command, tiny_path: Path, form: str):
    code, out, err = command("sql", str(tiny_path), "select 1 as a, 'x' as b", "--format", form)
    assert (code, err) == (0, "")
    read = {"csv": pl.read_csv, "json": pl.read_json, "parquet": pl.read_parquet}[form]
    assert read(io.BytesIO(out)).rows() == [(1, "x")]


def test_sql_from_file_with_params(command, tiny_path: Path, tmp_path: Path):
    (tmp_path / "q.sql").write_text("select $n + 1 as a, $name as b, $rest is null as c")
    args = ["--file", str(tmp_path / "q.sql"), "--param", "n=1", "--param", "name=x", "--format", "csv"]
    assert command("sql", str(tiny_path), *args)[1] == b"a,b,c\n2,x,true\n"


def test_tables_prints_every_column(command):
    out = command("tables")[1].decode()
    for table in TABLES.values():
        for column in table.columns:
            assert f"  {column.name} " in out
            assert column.meaning in out
    dictionary = json.loads(command("tables", "steps", "--json")[1])
    assert [entry["name"] for entry in dictionary["steps"]["columns"]] == [c.name for c in TABLES["steps"].columns]


def test_claims_as_text_and_json(command, tiny_path: Path):
    text = command("claims", str(tiny_path))[1]
    assert b"S1  entropy slows    none             supported" in text
    assert b"    figure stage_dynamics, analysis/sql/stage/stage_dynamics.sql\n" in text
    first = json.loads(command("claims", str(tiny_path), "--json")[1])["verdicts"][0]
    assert (first["claim"], first["part"], first["verdict"]) == ("S1", "entropy slows", "supported")
    assert first["null"] == "a straight line, or drifting noise"


def test_report_names_the_page(command, tmp_path: Path):
    code, out, _ = command("report", str(write_steps(tmp_path / "run")), "--out", str(tmp_path / "out"))
    assert (code, out.decode()) == (0, f"report: {tmp_path / 'out' / 'report.html'}\n")
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.parametrize("name", ["sql", "tables", "claims", "report"])
def test_help_has_an_example(command, name: str):
    code, out, _ = command(name, "--help")
    assert code == 0
    assert f"Example: entrace {name} " in out.decode()


def test_no_arguments_print_the_commands(command):
    code, out, _ = command()
    assert code == 0
    assert b"Commands:" in out


def test_a_closed_pipe_is_not_an_error(tiny_path: Path):
    query = "select range from range(200000)"
    script = f"{sys.executable} -m entrace sql {tiny_path} '{query}' --format csv | head -1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("range\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device without space")
@pytest.mark.parametrize("arguments", [["tables", "--json"], ["sql", "RUN", "from range(9)", "--format", "csv"]])
def test_output_that_cannot_be_written_is_one_line(tiny_path: Path, arguments: list[str]):
    command = [sys.executable, "-m", "entrace", *(str(tiny_path) if part == "RUN" else part for part in arguments)]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "entrace: no space left on device; free some space\n")


def test_a_missing_temporary_folder_has_a_remedy(tiny_path: Path, tmp_path: Path):
    code = (
        f"import tempfile; tempfile._candidate_tempdir_list = lambda: [{str(tmp_path / 'nowhere')!r}]\n"
        "from entrace.analysis.cli import app, run; run(app)"
    )
    command = [sys.executable, "-c", code, "sql", str(tiny_path), "select 1"]
    done = subprocess.run(command, capture_output=True, text=True)
    remedy = "set TMPDIR to a writable folder with free space"
    assert (done.returncode, done.stderr) == (1, f"entrace: no usable temporary folder; {remedy}\n")


def obey_permissions() -> None:
    """Give up root's right to read and write everything."""
    drop, override, read_search = 24, 1, 2
    for capability in (override, read_search):
        ctypes.CDLL(None).prctl(drop, capability)


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are given up as in Linux")
def test_a_missing_permission_has_a_remedy(tiny_path: Path, tmp_path: Path):
    run_dir = shutil.copytree(tiny_path, tmp_path / "run")
    part = next((run_dir / "steps").iterdir())
    part.chmod(0)
    (tmp_path / "closed").mkdir(mode=0o555)

    def say(*arguments: object) -> tuple[int, str]:
        command = [sys.executable, "-m", "entrace", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=obey_permissions)
        return done.returncode, done.stderr

    assert say("sql", run_dir, "select 1") == (2, f"entrace: {part}: permission denied; change its permissions\n")
    part.chmod(0o444)
    out = tmp_path / "closed" / "out"
    assert say("report", run_dir, "--out", out) == (1, f"entrace: {out}: permission denied; change its permissions\n")


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM")
def test_a_stopped_report_leaves_nothing_and_the_same_command_completes_it(command, tmp_path: Path):
    run_dir, out = write_failed(tmp_path / "broken"), tmp_path / "out"
    arguments = ["report", str(run_dir), "--out", str(out)]

    def stop(number: int) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "entrace", *arguments], stderr=subprocess.PIPE, text=True, env=environment
        )
        while process.poll() is None and not (out / PARTIAL / "claims.json").exists():
            time.sleep(0.001)
        process.send_signal(number)
        _, err = process.communicate(timeout=HANG_S)
        return subprocess.CompletedProcess(arguments, process.returncode, stderr=err)

    stopped = stop(signal.SIGTERM)
    assert (stopped.returncode, stopped.stderr) == (143, "entrace: stopped; run the same command again\n")
    assert not out.exists()
    assert stop(signal.SIGKILL).returncode == -signal.SIGKILL
    assert (out / PARTIAL).is_dir()
    code, _, err = command(*arguments)
    assert code == 0, err
    assert (out / "report.html").is_file()
    assert not (out / PARTIAL).exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM")
@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.parametrize("how", ["run the same command again", "the same command with --resume continues"])
def test_a_signal_within_a_call_of_duckdb_stops_a_command(name: str, status: int, how: str):
    """DuckDB replaces the exception of the signal handler by a RuntimeError."""
    code = f"""
import os, signal, threading
from contextlib import nullcontext
import duckdb, typer
from entrace.analysis.cli import run
from entrace.analysis.terminal.stops import stoppable

app = typer.Typer()
app.callback()(lambda: None)

@app.command()
def query():
    threading.Timer(0.2, os.kill, (os.getpid(), signal.{name})).start()
    with stoppable("with --resume continues") if "--resume" in {how!r} else nullcontext():
        duckdb.sql("select count(*) from range(100000000) as a, range(100) as b").fetchall()

signal.signal(signal.SIGINT, signal.default_int_handler)
run(app)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "query"], capture_output=True, text=True, timeout=HANG_S, check=False
    )
    assert (done.returncode, done.stderr) == (status, f"entrace: stopped; {how}\n")


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM")
@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_within_a_finalizer_stops_a_command(name: str, status: int):
    """Python prints and ignores an exception that is raised in a finalizer."""
    code = f"""
import os, signal, time
import typer
from entrace.analysis.cli import run

app = typer.Typer()
app.callback()(lambda: None)

class Finalized:
    def __del__(self):
        os.kill(os.getpid(), signal.{name})

@app.command()
def query():
    Finalized()
    time.sleep(600)

signal.signal(signal.SIGINT, signal.default_int_handler)
run(app)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "query"], capture_output=True, text=True, timeout=HANG_S, check=False
    )
    assert (done.returncode, done.stderr) == (status, "entrace: stopped; run the same command again\n")


def test_start_up_loads_nothing_heavy_and_no_training_package():
    heavy = {"duckdb", "polars", "pandas", "matplotlib", "scipy", "pyarrow", "numpy"}
    training = {"torch", "transformers", "entrace.trainer"}
    check = "import sys, entrace.analysis.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout.split()
    assert "entrace.analysis.cli" in loaded
    assert not (heavy | training) & set(loaded)


def test_whole_package_works_without_training_packages(tiny_path: Path):
    script = f"""
import pkgutil, sys
import entrace.analysis, entrace.figures
found = [module.name for module in pkgutil.walk_packages(entrace.analysis.__path__, "entrace.analysis.")]
# Of the extra spark, only what looks for it is imported without it.
modules = [name for name in found if not name.endswith((".spark.allowed", ".spark.translation"))]
assert "entrace.analysis.runs" in modules
for name in modules:
    __import__(name)
assert entrace.judge(entrace.open_runs({str(tiny_path)!r}))
print(*[name for name in ("torch", "transformers", "entrace.trainer") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_named_questions_are_listed_and_asked(command, tiny_path: Path):
    rows = json.loads(command("sql", "--list", "--format", "json")[1])
    assert {"stem", "level", "question", "claim", "params", "units", "needs"} == set(rows[0])
    assert "stage_dynamics" in {row["stem"] for row in rows}
    code, out, err = command("sql", "--list")
    assert (code, err) == (0, "")
    for row in rows:
        assert f"\n  {row['question']}\n" in out.decode(), "whole, and not cut off"
    code, out, err = command(
        "sql", str(tiny_path), "--question", "entropy_by_sample_sign", "stage=rising", "--format", "json"
    )
    assert (code, err) == (0, "")
    assert {row["stage"] for row in json.loads(out)} == {"rising"}


@pytest.mark.parametrize("name", slow_after(2, ["0", '{"a": 1}', "1e3", "true"]))
def test_a_run_whose_name_looks_like_json_can_be_named(command, tmp_path: Path, name: str):
    run_dir = write_tiny(tmp_path / name)
    for value in (name, json.dumps([name])):
        arguments = ["sql", str(run_dir), "--question", "stage_dynamics", "--format", "json"]
        code, out, err = command(*arguments, "--param", f"runs={value}")
        assert (code, err) == (0, "")
        assert {row["run_id"] for row in json.loads(out)} == {name}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["RUN", "--question", "entropy_by_sample_sgn"], 'did you mean "entropy_by_sample_sign"?'),
        (["RUN", "--question", "entropy_by_sample_sign", "stage=rise"], 'did you mean "rising"?'),
        (["RUN", "--question", "entropy_by_sample_sign", "stge=rising"], 'unknown parameter "stge"'),
        (["RUN", "--question", "entropy_by_sample_sign", 'runs=["tny"]'], 'did you mean "tiny"?'),
        (["--question", "entropy_by_sample_sign"], "RUN... --question NAME"),
        (["RUN", "--question", "stage_dynamics", "--file", "x.sql"], "--file and --question both name a query"),
        (["RUN", "select 1", "--memory", "lots"], "is not a size"),
        (["RUN", "select 1", "--timeout", "-1"], "expected 0 (no limit) or more"),
    ],
)
def test_wrong_questions_and_limits_are_one_line(command, tiny_path: Path, args: list[str], message: str):
    code, out, err = command("sql", *[str(tiny_path) if arg == "RUN" else arg for arg in args])
    assert (code, out, err.count("\n")) == (2, b"", 1)
    assert message in err


def test_an_empty_answer_to_a_question_says_what_removed_the_rows(command, tiny_path: Path):
    code, out, err = command("sql", str(tiny_path), "--question", "stage_dynamics", "runs=[]", "--format", "csv")
    assert code == 0
    assert out.count(b"\n") == 1
    assert "stage_dynamics: no rows: runs=[] removed all" in err
