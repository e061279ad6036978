"""Seconds per query of analysis/sql on a large simulated trace, against a plain scan of the columns it reads.

Each query runs as in the report, for one run by name. Its scan runs through ``Runs.sql`` as well: ``select sum(...)``
over every column that the query reads, each table once. These columns come from DuckDB's plan: projections and filters
of the table scans in ``EXPLAIN``, on tables with the first rows of the trace. Unlike count, min, and max, a sum cannot
be answered from the statistics of a Parquet file. Text counts as its length in bytes, a list as its number of elements,
and a boolean as 0 or 1.

A query, its scan, and the query on a trace of a tenth of the size alternate, after one warm-up round. Ratios are
medians over rounds, of wall time and of CPU time, which other load affects less. "tenfold" is the growth of the
query's time from the small to the large trace. Peak memory is that of a new process that opens the trace and runs
every query once, including Python and imports. Some breakdowns are also computed with pandas and polars, without the
intervals of the queries, and compared. pandas runs on the small trace only, where its columns fit into memory.

Usage: python tests/benchmarks/bench_queries.py --tokens 50000000 --out reports/query_benchmarks.json [--trace DIR]
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
from simulated_trace import write_trace

import entrace
from entrace.analysis import queries
from entrace.analysis.statistics import interval_functions
from entrace.analysis.terminal.progress import Progress
from entrace.analysis.trace import TABLES, describe_machine

CORES = 2
SHRINK = 10
# Minimum and maximum rounds per query, and seconds of wall plus CPU time after which no further round starts.
REPEATS, SECONDS = (3, 20), 2.0
SAMPLE_ROWS = 10_000
# The histogram of entropy_thresholds is up to 0.5 % too low, which includes a few more tokens.
TOLERANCE = 0.01
LIMITS = {"median_ratio": 3.0, "worst_ratio": 10.0, "growth": 11.0, "worst_growth": 11.0, "peak_memory_gib": 2.0}

Peer = Callable[[Path, float], np.ndarray]


def read_columns(trace: Path, stems: list[str]) -> dict[str, dict[str, list[str]]]:
    """Return the columns that each query reads, by table, from DuckDB's plan."""
    runs = entrace.open_runs(trace)
    con = duckdb.connect()
    interval_functions.register(con)
    for name in TABLES:
        con.execute(f"create table {name} as from read_parquet('{trace}/{name}/*.parquet') limit {SAMPLE_ROWS}")
    for name in ("runs", "stages"):
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
    runs.query(stem, runs=list(runs.manifests))


def timed(work: Callable[..., Any], *arguments: Any) -> np.ndarray:
    """Return wall seconds and CPU seconds of ``work(*arguments)``, (2,)."""
    clocks = (time.perf_counter, time.process_time)
    started = [clock() for clock in clocks]
    work(*arguments)
    return np.array([clock() for clock in clocks]) - started


def measure(large: entrace.Runs, small: entrace.Runs, stem: str, scan: str) -> dict[str, float]:
    """Measure medians over rounds of a query, its scan, and the query on the small trace."""
    rounds: list[np.ndarray] = []
    while len(rounds) <= REPEATS[0] or (len(rounds) <= REPEATS[1] and np.sum(rounds) < SECONDS):
        rounds.append(np.stack((timed(ask, large, stem), timed(large.sql, scan), timed(ask, small, stem))))
    warm = np.array(rounds[1:])
    query_s, scan_s, small_query_s = np.median(warm[:, :, 0], axis=0).tolist()
    ratio, cpu_ratio = np.median(warm[:, 0] / warm[:, 1], axis=0).tolist()
    growth = float(np.median(warm[:, 0, 0] / warm[:, 2, 0]))
    return {
        "query_s": query_s,
        "scan_s": scan_s,
        "ratio": ratio,
        "cpu_ratio": cpu_ratio,
        "small_query_s": small_query_s,
        "growth": growth,
    }


def peak_memory_gib(trace: Path) -> float:
    """Measure the peak resident memory of a process that runs every query once, GiB."""
    command = [sys.executable, __file__, "--answer-all", str(trace)]
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


def pandas_sign(trace: Path, boundary: float) -> np.ndarray:
    import pandas as pd

    columns = ["step", "is_kept", "advantage", "entropy_mean", "response_length"]
    rows: Any = pd.read_parquet(trace / "rollouts", columns=columns).query("is_kept and advantage != 0")
    rows["entropy_sum"] = rows.entropy_mean.astype("float64") * rows.response_length
    sums = rows.groupby(["step", rows.advantage > 0])[["entropy_sum", "response_length"]].sum()
    return (sums.entropy_sum / sums.response_length).to_numpy()


def polars_sign(trace: Path, boundary: float) -> np.ndarray:
    import polars as pl

    length = pl.col("response_length")
    return (
        pl.scan_parquet(trace / "rollouts")
        .filter(pl.col("is_kept") & (pl.col("advantage") != 0))
        .group_by("step", pl.col("advantage") > 0)
        .agg((pl.col("entropy_mean").cast(pl.Float64) * length).sum() / length.sum())
        .collect(engine="streaming")["entropy_mean"]
        .to_numpy()
    )


def pandas_position(trace: Path, boundary: float) -> np.ndarray:
    import pandas as pd

    columns = ["step", "position", "response_length", "advantage", "entropy"]
    rows: Any = pd.read_parquet(trace / "tokens", columns=columns).query("advantage != 0")
    part = (10 * rows.position) // rows.response_length
    entropy = rows.entropy.astype("float64")
    return entropy.groupby([rows.step > boundary, rows.advantage > 0, part]).mean().to_numpy()


def polars_position(trace: Path, boundary: float) -> np.ndarray:
    import polars as pl

    part = (10 * pl.col("position")) // pl.col("response_length")
    return (
        pl.scan_parquet(trace / "tokens")
        .filter(pl.col("advantage") != 0)
        .group_by(pl.col("step") > boundary, pl.col("advantage") > 0, part)
        .agg(pl.col("entropy").cast(pl.Float64).mean())
        .collect(engine="streaming")["entropy"]
        .to_numpy()
    )


def pandas_categories(trace: Path, boundary: float) -> np.ndarray:
    import pandas as pd

    rows: Any = pd.read_parquet(trace / "tokens", columns=["step", "category"])
    return rows.groupby("step").category.value_counts(normalize=True).to_numpy()


def polars_categories(trace: Path, boundary: float) -> np.ndarray:
    import polars as pl

    counts = pl.scan_parquet(trace / "tokens").group_by("step", "category").len()
    share = pl.col("len") / pl.col("len").sum().over("step")
    return counts.select(share).collect(engine="streaming")["len"].to_numpy()


def pandas_words(trace: Path, boundary: float) -> np.ndarray:
    import pandas as pd

    rows: Any = pd.read_parquet(trace / "tokens", columns=["step", "token_id", "advantage", "entropy"])
    rows = rows.query("advantage != 0")
    plateau = rows.step > boundary
    is_high = rows.entropy >= rows.entropy.groupby(plateau).transform("quantile", 0.8)
    counts = rows[is_high].groupby(plateau).token_id.value_counts()
    return counts.groupby(level=0).nlargest(15).to_numpy()


def polars_words(trace: Path, boundary: float) -> np.ndarray:
    import polars as pl

    plateau = (pl.col("step") > boundary).alias("plateau")
    rows = pl.scan_parquet(trace / "tokens").filter(pl.col("advantage") != 0).select(plateau, "token_id", "entropy")
    thresholds = rows.group_by("plateau").agg(pl.col("entropy").quantile(0.8).alias("threshold"))
    counts = (
        rows.join(thresholds, on="plateau")
        .filter(pl.col("entropy") >= pl.col("threshold"))
        .group_by("plateau", "token_id")
        .len()
    )
    top = counts.group_by("plateau").agg(pl.col("len").top_k(15)).explode("len")
    return top.collect(engine="streaming")["len"].to_numpy()


# Query -> the column that all compute, the pandas code, and the polars code.
PEERS: dict[str, tuple[str, Peer, Peer]] = {
    "entropy_by_sample_sign": ("entropy", pandas_sign, polars_sign),
    "entropy_by_position": ("entropy", pandas_position, polars_position),
    "high_entropy_words": ("num_high", pandas_words, polars_words),
    "category_shares": ("share", pandas_categories, polars_categories),
}


def measure_peers(runs: entrace.Runs, trace: Path, stem: str, libraries: list[str]) -> dict[str, float]:
    """Measure median seconds of a query and of the same breakdown in dataframe code, and check that they agree."""
    column, *peers = PEERS[stem]
    boundary = next(iter(runs.stage_fits.values())).boundary or 0.0
    expected = np.sort(runs.query(stem, runs=list(runs.manifests))[column].to_numpy())
    seconds: dict[str, list[float]] = {"entrace": []} | {name: [] for name in libraries}
    for _ in range(REPEATS[0]):
        seconds["entrace"].append(timed(ask, runs, stem)[0])
        for name, peer in zip(("pandas", "polars"), peers, strict=True):
            if name in libraries:
                started = time.perf_counter()
                values = peer(trace, boundary)
                seconds[name].append(time.perf_counter() - started)
                np.testing.assert_allclose(np.sort(values), expected, rtol=TOLERANCE)
    return {f"{name}_s": statistics.median(values) for name, values in seconds.items()}


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
            row = measure(opened[large], opened[small], stem, scan_of(columns[stem]))
            found[stem] = row | {"growth": tenfold * row["growth"], "columns": columns[stem]}
            bar.update(done, note=f"{stem}: ratio {found[stem]['ratio']:.2f}")
    peers = {
        f"{stem}, {tokens[trace]:,} tokens": measure_peers(opened[trace], trace, stem, libraries)
        for stem in PEERS
        for trace, libraries in ((small, ["polars", "pandas"]), (large, ["polars"]))
    }
    ratios = [row["ratio"] for row in found.values()]
    total = sum(row["query_s"] for row in found.values()) / sum(row["small_query_s"] for row in found.values())
    summary = {
        "median_ratio": statistics.median(ratios),
        "worst_ratio": max(ratios),
        "growth": tenfold * total,
        "worst_growth": max(row["growth"] for row in found.values()),
        "peak_memory_gib": peak,
    }
    return {
        "tokens": tokens[large],
        "small_tokens": tokens[small],
        "cores": CORES,
        **describe_machine(),
        "limits": LIMITS,
        "measured": summary,
        "questions": found,
        "peers": peers,
    }


def to_table(result: dict[str, Any]) -> str:
    """Return the result as a table of text."""
    lines = [f"{'query':<26}{'query s':>9}{'scan s':>9}{'ratio':>7}{'of CPU':>8}{'tenfold':>9}  columns read"]
    for stem, row in result["questions"].items():
        read = "; ".join(f"{table}: {len(columns)}" for table, columns in row["columns"].items())
        seconds = f"{row['query_s']:>9.3f}{row['scan_s']:>9.3f}"
        ratios = f"{row['ratio']:>7.2f}{row['cpu_ratio']:>8.2f}{row['growth']:>8.1f}x"
        lines.append(f"{stem:<26}{seconds}{ratios}  {read}")
    lines += ["", f"{'same breakdown, seconds':<50}{'entrace':>9}{'polars':>9}{'pandas':>9}"]
    for name, row in result["peers"].items():
        cells = [row.get(f"{library}_s") for library in ("entrace", "polars", "pandas")]
        lines.append(f"{name:<50}" + "".join(f"{'-' if cell is None else format(cell, '.3f'):>9}" for cell in cells))
    lines += ["(polars and pandas compute no intervals; pandas on the small trace only)", ""]
    for name, limit in LIMITS.items():
        measured = result["measured"][name]
        lines.append(f"{name:<17}{measured:>7.2f}  at most {limit:g}  {'ok' if measured <= limit else 'MISSED'}")
    return "\n".join(lines)


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
        help="measure these queries only, including those of claims/ (default: all of the report)",
    )
    parser.add_argument("--answer-all", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    if arguments.answer_all:
        return answer_all(arguments.answer_all)
    with tempfile.TemporaryDirectory() as folder:
        root = arguments.trace or Path(folder)
        large, small = (root / f"tokens-{size}" for size in (arguments.tokens, arguments.tokens // SHRINK))
        for trace in (large, small):
            if not trace.exists():
                write_trace(trace, int(trace.name.removeprefix("tokens-")))
        result = run_benchmark(large, small, arguments.only or questions())
    print(to_table(result))
    if arguments.out:
        arguments.out.write_text(json.dumps(rounded(result), indent=2) + "\n")
    return None


if __name__ == "__main__":
    main()
