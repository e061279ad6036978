"""Time writing, opening, and verifying a trace, with and without checksums.

The cost of digests and page checksums is measured. Writing is ``TraceWriter.append`` and ``flush`` of all rows of a
run, opening is ``entrace.open_runs``, both with and without checksums and digests. Verifying is ``verify_run``, with
digests and, as for older traces, without; its ratio is to a scan: SQL that sums every column of every table. All of
them alternate; ratios are taken within a round.

Usage: python -m tests.benchmarks.bench_integrity [--trace RUN | --tokens 1000000] [--rounds 15] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq

import entrace
from entrace.analysis.trace import TABLES, TraceWriter, digests
from entrace.analysis.trace.digests import DIGESTS, Digest, Recorded
from entrace.analysis.trace.verify import verify_run
from tests.benchmarks.bench_queries import scan_of
from tests.benchmarks.measurements import AT_MOST, Measurement, quotients, time_in_rounds, to_markdown
from tests.benchmarks.simulated_trace import write_trace

LIMIT = 1.02
NOTHING = Digest("", 0)


@contextmanager
def without_integrity() -> Iterator[None]:
    """Write neither page checksums nor digests, and check none."""
    write_table = pq.write_table

    def write_plain(*arguments: Any, write_page_checksum: bool, **options: Any) -> None:
        write_table(*arguments, **options)

    with ExitStack() as stack:
        stack.enter_context(patch.object(pq, "write_table", write_plain))
        stack.enter_context(patch.object(Digest, "of", lambda data: NOTHING))
        stack.enter_context(patch.object(digests, "append", lambda run_dir, files: None))
        stack.enter_context(patch.object(digests, "read", lambda run_dir: Recorded()))
        stack.enter_context(patch.object(digests, "is_intact", lambda run_dir, name, data: True))
        yield


def plainly(work: Callable[[], Any]) -> Callable[[], Any]:
    """Return the work as it was before there were digests."""

    def run() -> None:
        with without_integrity():
            work()

    return run


def load(trace: Path) -> tuple[list[str], list[tuple[str, int, dict[str, Any]]]]:
    """Return the vocabulary of a run, and its rows by table and last step.

    The order is that of flushes, one entry per file.
    """
    texts = pq.read_table(trace / "vocab", columns=["text"])["text"].to_pylist()
    parts = []
    for name in ("prompts", "evals", "rollouts", "tokens", "steps"):
        for path in sorted((trace / name).glob("part-*.parquet")):
            rows = pq.read_table(path)
            names = [column for column in rows.column_names if column not in ("run_id", "category")]
            columns = {column: rows[column].combine_chunks() for column in names}
            if name == "tokens":
                columns["token_id"] = columns["token_id"].to_numpy()
            parts.append((name, int(path.stem.split("-")[2]), columns))
    return texts, sorted(parts, key=lambda part: part[1])


def write(folder: Path, texts: list[str], parts: list[tuple[str, int, dict[str, Any]]]) -> None:
    """Write the rows again, with a flush wherever the run had one."""
    shutil.rmtree(folder, ignore_errors=True)
    writer = TraceWriter.create(folder, {"run_id": "again"}, texts)
    for index, (table, step, columns) in enumerate(parts):
        writer.append(table, columns)
        if index + 1 == len(parts) or parts[index + 1][1] > step:
            writer.flush(step)
    writer.finish()


def measure(trace: Path, folder: Path, rounds: int) -> list[Measurement]:
    """Time all operations on a copy of ``trace`` with page checksums and digests."""
    texts, parts = load(trace)
    run, old = folder / "again", folder / "old"
    write(run, texts, parts)
    shutil.copytree(run, old)
    (old / DIGESTS).unlink()
    runs = entrace.open_runs(run)
    scan = scan_of({name: [column.name for column in table.columns] for name, table in TABLES.items()})

    def write_again() -> None:
        write(folder / "written", texts, parts)

    works = {
        "write": write_again,
        "write plainly": plainly(write_again),
        "open": lambda: entrace.open_runs(run),
        "open plainly": plainly(lambda: entrace.open_runs(run)),
        "verify": lambda: verify_run(run),
        "verify without digests": lambda: verify_run(old),
        "scan": lambda: runs.sql(scan),
    }
    seconds = time_in_rounds(works, rounds)
    size = sum(path.stat().st_size for path in run.rglob("*.parquet"))
    found = [
        Measurement.of("Integrity", name, "ratio", quotients(seconds[above], seconds[below]), bound, target)
        for name, above, below, bound, target in (
            ("writing, to without digests and checksums", "write", "write plainly", AT_MOST, LIMIT),
            ("opening, to without checks", "open", "open plainly", AT_MOST, LIMIT),
            ("verifying, to a scan", "verify", "scan", None, None),
            ("verifying without digests, to a scan", "verify without digests", "scan", None, None),
        )
    ]
    speed = [size / 1e6 / value for value in seconds["verify"]]
    return [*found, Measurement.of("Integrity", "verifying", "MB/s", speed)]


def main() -> None:
    """Measure, print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="run whose rows are used (default: a simulated one)")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="tokens of the simulated run")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="JSON file of the measurements")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="entrace-integrity-") as folder:
        trace = options.trace or write_trace(Path(folder, "simulated"), options.tokens)
        found = measure(trace, Path(folder), options.rounds)
    print(to_markdown(found))
    if options.out:
        options.out.write_text(json.dumps([measurement.as_json() for measurement in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
