"""Time the queries of analysis/sql against a plain scan of the columns they read.

The trace is large and simulated; the result is seconds per query. Each query runs as in the report, for one run by
name. Its scan runs on the same connection: ``select sum(...)`` over every column that the query reads, each table once.
These columns come from DuckDB's plan: projections and filters of the table scans in ``EXPLAIN``, on tables with the
first rows of the trace. Unlike count, min, and max, a sum cannot be answered from the statistics of a Parquet file.
Text counts as its length in bytes, a list as its number of elements, and a boolean as 0 or 1.

A query, its scan, and the query on a trace of a tenth of the size alternate, after one warm-up round. Ratios are
medians over rounds, of wall time and of CPU time, which other load affects less. "tenfold" is the growth of the
query's time from the small to the large trace. Peak memory is that of a new process that opens the trace and runs
every query once, including Python and imports.

Queries that read kept rows read no tokens after their first answer. The first answer of every query after opening is
therefore measured as well, with all that it computes once; growth is that of first answers.

Every breakdown of ``polars_breakdowns`` is also computed with polars' lazy engine, in turn with the query: first
without intervals on both sides (DuckDB then runs the query with functions that only divide), then with intervals where
polars can compute them. Values are compared. Opening a study of many small runs is timed in a part of its own.

``--report`` measures the report on a simulated study with the 104 runs of the tiny ablation instead: CPU seconds of a
new process that opens the study and writes the report, including imports.

Usage: python -m tests.benchmarks.bench_queries --tokens 50000000 --out reports/query_benchmarks.json [--trace DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

import entrace
from entrace.analysis import queries
from entrace.analysis.statistics import interval_functions
from entrace.analysis.terminal.progress import Progress
from entrace.analysis.trace import TABLES, describe_machine
from tests import markdown
from tests.benchmarks.polars_breakdowns import COLUMNS, Breakdowns, Mean
from tests.benchmarks.simulated_trace import write_ablation, write_study, write_trace

MODULE = "tests.benchmarks.bench_queries"
CORES = 2
SHRINK = 10
# Minimum and maximum rounds per query, and seconds of wall plus CPU time after which no further round starts.
REPEATS, SECONDS = (3, 20), 2.0
SAMPLE_ROWS = 10_000
# The histogram of entropy_thresholds is up to 0.5% too low, which includes a few more tokens.
TOLERANCE = 0.01
# Description and limit of what is measured. "polars_*" is the largest ratio of a query's time to that of the same
# breakdown in polars.
MEASURES: dict[str, tuple[str, float | None]] = {
    "median_ratio": ("A question against a scan of its columns, median ratio", 2.0),
    "worst_ratio": ("A question against a scan of its columns, largest ratio", 5.0),
    "first_median_ratio": ("The same for first answers after opening, median ratio", None),
    "first_worst_ratio": ("The same for first answers after opening, largest ratio", None),
    "growth": ("Ten times the tokens, ratio of total times of first answers", 11.0),
    "worst_growth": ("Ten times the tokens, largest ratio of times of first answers", 11.0),
    "report_s": ("Report on the run (s)", 60.0),
    "peak_memory_gib": ("Peak memory of a process that asks every question (GiB)", 4.0),
    "polars_without_intervals": ("A breakdown against polars without intervals, largest ratio", 1.0),
    "polars_with_intervals": ("A breakdown against polars with intervals, largest ratio", 1.0),
    "open_s": ("Opening a study of 1,000 runs (s)", 2.0),
}
# Runs of the study whose opening is timed.
STUDY_RUNS = 1000
# Limit of the CPU seconds of a report on the ablation.
REPORT_CPU_S = 30.0


def read_columns(trace: Path, stems: list[str]) -> dict[str, dict[str, list[str]]]:
    """Return the columns that each query reads, by table, from DuckDB's plan."""
    runs = entrace.open_runs(trace)
    con = duckdb.connect()
    interval_functions.register(con)
    for name in TABLES:
        # The view has the optional columns, too.
        con.register("rows", runs.sql(f"from {name} limit {SAMPLE_ROWS}").to_arrow())
        con.execute(f"create table {name} as from rows")
    for name in ("runs", *queries.COMPUTED):
        con.register("rows", runs.sql(f"from {name}").to_arrow())
        con.execute(f"create table {name} as from rows")
    for text in queries.staging():
        con.execute(text)
    # The first rows hold one stage only; the optimizer would remove the scans of queries about the other.
    con.execute("set disabled_optimizers = 'statistics_propagation'")
    found = {}
    for stem in stems:
        text = queries.BUILT_IN.read(stem)
        params = dict.fromkeys(duckdb.extract_statements(text)[0].named_parameters)
        plan = json.loads(con.execute(f"explain (format json) {text}", params).fetchall()[0][1])
        found[stem] = _columns_of(plan)
    return found


def _columns_of(plan: list[dict[str, Any]]) -> dict[str, list[str]]:
    found: dict[str, set[str]] = {}
    for node in plan:
        for table, columns in _columns_of(node["children"]).items():
            found.setdefault(table, set()).update(columns)
        name = str(node["extra_info"].get("Table", "")).rpartition(".")[2]
        if name in TABLES:
            words = re.findall(r"\w+", f"{node['extra_info'].get('Projections')} {node['extra_info'].get('Filters')}")
            found.setdefault(name, set()).update(c.name for c in TABLES[name].columns if c.name in words)
    return {table: sorted(columns) for table, columns in found.items() if columns}


def scan_of(columns: dict[str, list[str]]) -> str:
    """Return SQL that only sums ``columns``."""
    tables = []
    for table, names in columns.items():
        types = {column.name: column.type for column in TABLES[table].columns}
        sums = ", ".join(f"sum({_number(name, types[name])})" for name in names)
        tables.append(f"(select {sums} from {table}) as {table}_sums")
    return f"select * from {', '.join(tables)}"


def _number(name: str, kind: pa.DataType) -> str:
    if pa.types.is_string(kind):
        return f"strlen({name})"
    if pa.types.is_list(kind):
        return f"len({name})"
    return f"{name}::tinyint" if pa.types.is_boolean(kind) else name


def ask(runs: entrace.Runs, stem: str) -> None:
    """Run one query as the report does."""
    runs.ask(stem, runs=list(runs.manifests))


def timed(work: Callable[..., Any], *arguments: Any) -> np.ndarray:
    """Return wall seconds and CPU seconds of ``work(*arguments)``, (2,)."""
    clocks = (time.perf_counter, time.process_time)
    started = [clock() for clock in clocks]
    work(*arguments)
    return np.array([clock() for clock in clocks]) - started


def measure(traces: tuple[Path, Path], opened: dict[Path, entrace.Runs], stem: str, scan: str) -> dict[str, float]:
    """Measure a query, its scan, and the query on the small trace.

    ``traces`` are the large and the small one. Values are medians over rounds; each first answer is measured once.
    """
    large, small = (opened[trace] for trace in traces)
    first_s, small_first_s = (timed(ask, entrace.open_runs(trace), stem)[0] for trace in traces)
    rounds: list[np.ndarray] = []
    while len(rounds) <= REPEATS[0] or (len(rounds) <= REPEATS[1] and np.sum(rounds) < SECONDS):
        rounds.append(np.stack((timed(ask, large, stem), timed(large.run_shipped, scan), timed(ask, small, stem))))
    warm = np.array(rounds[1:])
    query_s, scan_s, small_query_s = np.median(warm[:, :, 0], axis=0).tolist()
    ratio, cpu_ratio = np.median(warm[:, 0] / warm[:, 1], axis=0).tolist()
    return {
        "query_s": query_s,
        "scan_s": scan_s,
        "ratio": ratio,
        "cpu_ratio": cpu_ratio,
        "small_query_s": small_query_s,
        "first_s": first_s,
        "first_ratio": first_s / scan_s,
        "growth": first_s / small_first_s,
    }


def peak_memory_gib(trace: Path) -> float:
    """Measure the peak resident memory of a process that runs every query once, GiB."""
    command = [sys.executable, "-m", MODULE, "--answer-all", str(trace)]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def answer_all(trace: Path) -> None:
    """Run every query, then print this process's peak memory in GiB."""
    runs = entrace.open_runs(trace)
    for stem in questions():
        ask(runs, stem)
        peak = _peak_gib()
        print(f"peak memory after {stem}: {peak:.2f} GiB", file=sys.stderr)
    print(_peak_gib())


def _peak_gib() -> float:
    # getrusage would include the peak of the parent process.
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0]) / 2**20


def questions() -> list[str]:
    """Return the stems of the queries that the report runs, without those in claims/."""
    return [stem for stem, path in queries.BUILT_IN.paths.items() if path.parent.name != "claims"]


def drop_intervals(runs: entrace.Runs) -> None:
    """Let the queries of ``runs`` compute means only.

    No interval is estimated from the sums of prompts.
    """
    sums = (f"list_sum(list_transform(entries, lambda entry: entry.{name}))" for name in ("total", "count"))
    mean = " / ".join(sums)
    for name in interval_functions.BOUNDS:
        runs._con.remove_function(name)
        runs._con.execute(
            f"create macro {name}(entries) as {{'value': {mean}, 'low': null::double, 'high': null::double}}"
        )


def measure_polars(
    runs: entrace.Runs, plain: entrace.Runs, breakdowns: Breakdowns, stem: str
) -> dict[str, dict[str, float]]:
    """Measure a query and the same breakdown in polars, and compare their values.

    The two are timed in turn.

    Returns:
        Median wall and CPU seconds of both, and medians of their ratios within rounds, without intervals and, if polars
        can compute them, with intervals.
    """
    breakdown = getattr(breakdowns, stem)()
    check_values(plain, breakdown.without_intervals(), stem)
    works = {"without_intervals": (plain, breakdown.without_intervals)}
    if isinstance(breakdown, Mean):
        works["with_intervals"] = (runs, breakdown.with_intervals)
    found = {}
    for name, (asked, peer) in works.items():
        rounds = []
        while len(rounds) <= REPEATS[0] or (len(rounds) <= REPEATS[1] and np.sum(rounds) < SECONDS):
            rounds.append(np.stack((timed(ask, asked, stem), timed(peer))))
        warm = np.array(rounds[1:])
        (entrace_s, _), (polars_s, _) = np.median(warm, axis=0).tolist()
        ratio, cpu_ratio = np.median(warm[:, 0] / warm[:, 1], axis=0).tolist()
        found[name] = {"entrace_s": entrace_s, "polars_s": polars_s, "ratio": ratio, "cpu_ratio": cpu_ratio}
    return found


def check_values(runs: entrace.Runs, values: np.ndarray, stem: str) -> None:
    """Check that a breakdown in polars gives the values of the query, in any order."""
    frame = runs.query(stem, runs=list(runs.manifests))
    if stem == "high_entropy_by_ppl":
        # The sum of three categories.
        frame = frame.filter(frame["category"] != "reasoning")
    expected = frame[COLUMNS[stem]].drop_nulls().to_numpy() + (1 if stem == "u_shape" else 0)
    # Empty cells, and words that do not occur, are rows of one side only.
    expected, values = (np.sort(side[np.isfinite(side) & (side != 0)]) for side in (expected, values))
    # A rare category may gain a token from the lower threshold.
    least = TOLERANCE**2 * np.abs(expected).max()
    np.testing.assert_allclose(values, expected, rtol=TOLERANCE, atol=least, err_msg=stem)


def measure_opening() -> float:
    """Measure the median seconds in which a study of ``STUDY_RUNS`` runs opens."""
    with tempfile.TemporaryDirectory() as folder:
        study = write_study(Path(folder) / "study", STUDY_RUNS)
        return statistics.median(timed(entrace.open_runs, study)[0] for _ in range(REPEATS[0]))


def measure_report(path: Path) -> tuple[float, float]:
    """Measure wall and CPU seconds of a new process that writes a report."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", MODULE, "--write-report", str(path), str(Path(folder) / "report")]
        started = time.perf_counter()
        cpu_s = float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        return time.perf_counter() - started, cpu_s


def measure_ablation_report(root: Path) -> dict[str, Any]:
    """Measure the report on a simulated ablation."""
    study = root / "ablation"
    if not study.exists():
        write_ablation(study)
    cpu_s = measure_report(study)[1]
    return {"runs": len(list(study.iterdir())), "cores": CORES, **describe_machine(), "report_cpu_s": cpu_s}


def print_report_time(path: str, out: str) -> None:
    """Write the report on a run or study, then print this process's CPU seconds."""
    entrace.write_report(entrace.open_runs(path), out)
    print(time.process_time())


def run_benchmark(large: Path, small: Path, stems: list[str]) -> dict[str, Any]:
    """Run all measurements and return the content of the JSON file."""
    peak = peak_memory_gib(large)
    columns = read_columns(small, stems)
    opened = {trace: entrace.open_runs(trace) for trace in (large, small)}
    tokens = {trace: int(runs.sql("select count(*) from tokens").item()) for trace, runs in opened.items()}
    tenfold = 10 * tokens[small] / tokens[large]
    found: dict[str, Any] = {}
    with Progress("measure", len(stems)) as bar:
        for done, stem in enumerate(stems, start=1):
            row = measure((large, small), opened, stem, scan_of(columns[stem]))
            found[stem] = row | {"growth": tenfold * row["growth"], "columns": columns[stem]}
            bar.update(done, note=f"{stem}: ratio {found[stem]['ratio']:.2f}")
    plain = entrace.open_runs(large)
    drop_intervals(plain)
    breakdowns = Breakdowns(large, next(iter(plain.stage_fits.values())).boundary or 0.0)
    polars = {stem: measure_polars(opened[large], plain, breakdowns, stem) for stem in stems if stem in COLUMNS}
    ratios, first_ratios = ([row[name] for row in found.values()] for name in ("ratio", "first_ratio"))
    first_s = sum(row["first_s"] for row in found.values())
    small_first_s = sum(tenfold * row["first_s"] / row["growth"] for row in found.values())
    summary = {
        "median_ratio": statistics.median(ratios),
        "worst_ratio": max(ratios),
        "first_median_ratio": statistics.median(first_ratios),
        "first_worst_ratio": max(first_ratios),
        "growth": tenfold * first_s / small_first_s,
        "worst_growth": max(row["growth"] for row in found.values()),
        "peak_memory_gib": peak,
        **{
            f"polars_{name}": max((row[name]["ratio"] for row in polars.values() if name in row), default=0.0)
            for name in ("without_intervals", "with_intervals")
        },
        "report_s": measure_report(large)[0],
        "open_s": measure_opening(),
    }
    return {
        "tokens": tokens[large],
        "small_tokens": tokens[small],
        "cores": CORES,
        **describe_machine(),
        "limits": {name: limit for name, (_, limit) in MEASURES.items()},
        "measured": summary,
        "questions": found,
        "polars": polars,
    }


def to_table(result: dict[str, Any]) -> str:
    """Return the result as a table of text."""
    lines = [f"{'query':<26}{'query s':>9}{'scan s':>9}{'ratio':>7}{'of CPU':>8}{'tenfold':>9}  columns read"]
    for stem, row in result["questions"].items():
        read = "; ".join(f"{table}: {len(columns)}" for table, columns in row["columns"].items())
        seconds = f"{row['query_s']:>9.3f}{row['scan_s']:>9.3f}"
        ratios = f"{row['ratio']:>7.2f}{row['cpu_ratio']:>8.2f}{row['growth']:>8.1f}x"
        lines.append(f"{stem:<26}{seconds}{ratios}  {read}")
    lines += ["", f"{'same breakdown in polars':<50}{'entrace s':>10}{'polars s':>10}{'ratio':>7}{'of CPU':>8}"]
    for stem, row in result["polars"].items():
        for name, found in row.items():
            seconds = f"{found['entrace_s']:>10.3f}{found['polars_s']:>10.3f}"
            lines.append(f"{f'{stem}, {name}':<50}{seconds}{found['ratio']:>7.2f}{found['cpu_ratio']:>8.2f}")
    lines.append("")
    for name, (_, limit) in MEASURES.items():
        measured = result["measured"][name]
        goal = "" if limit is None else f"  at most {limit:g}  {'ok' if measured <= limit else 'MISSED'}"
        lines.append(f"{name:<25}{measured:>7.2f}{goal}")
    return "\n".join(lines)


def to_markdown(result: dict[str, Any]) -> str:
    """Return a table of the limits beside what was measured.

    It ends with all breakdowns together against polars.
    """
    rows = [
        (text, "" if limit is None else f"{limit:g}", f"{result['measured'][name]:.1f}")
        for name, (text, limit) in MEASURES.items()
    ]
    for kind in ("without_intervals", "with_intervals"):
        found = [by[kind] for by in result["polars"].values() if kind in by]
        times = [sum(row[name] for row in found) for name in ("entrace_s", "polars_s")]
        words = f"polars {kind.replace('_', ' ')}"
        faster = sum(row["ratio"] <= 1 for row in found)
        rows.append((f"At least as fast as {words}, of {len(found)} breakdowns", str(len(found)), str(faster)))
        rows.append((f"All these breakdowns against {words}, ratio of total times", "1", f"{times[0] / times[1]:.2f}"))
    return "\n".join(markdown.table(["Measure", "Target", "Measured"], rows, numbers=(1, 2)))


def rounded(value: Any) -> Any:
    """Return ``value`` with floats rounded to four significant digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    """Write missing traces, measure, print the table, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokens", type=int, default=50_000_000, help="token rows of the large trace (default %(default)s)"
    )
    parser.add_argument("--trace", type=Path, help="folder in which to keep the traces (default: temporary)")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: none)")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="STEM",
        choices=sorted(queries.BUILT_IN.paths),
        help="measure these queries only, including those of claims/ (default: all of the report)",
    )
    parser.add_argument("--report", action="store_true", help="measure the report on an ablation instead")
    parser.add_argument("--write-report", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--answer-all", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    if arguments.answer_all:
        return answer_all(arguments.answer_all)
    if arguments.write_report:
        return print_report_time(*arguments.write_report)
    with tempfile.TemporaryDirectory() as folder:
        root = arguments.trace or Path(folder)
        if arguments.report:
            result = measure_ablation_report(root)
            print(f"report on {result['runs']} runs: {result['report_cpu_s']:.1f} CPU s, at most {REPORT_CPU_S:g}")
            return write(result, arguments.out)
        large, small = (root / f"tokens-{size}" for size in (arguments.tokens, arguments.tokens // SHRINK))
        for trace in (large, small):
            if not trace.exists():
                write_trace(trace, int(trace.name.removeprefix("tokens-")))
        result = run_benchmark(large, small, arguments.only or questions())
    print(to_table(result))
    return write(result, arguments.out)


def write(result: dict[str, Any], out: Path | None) -> None:
    """Write a result as JSON, if a file is given."""
    if out:
        out.write_text(json.dumps(rounded(result), indent=2) + "\n")


if __name__ == "__main__":
    main()
