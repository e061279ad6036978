"""Measure memory and speed of ``entrace sql`` for each output format.

The trace is large and simulated. Results are peak memory and rows per second. Each format prints all columns of all
tokens to /dev/null, in a process that reports its own peak memory (interpreter, imports, and output) and that of its
child, which runs the query. The measurement is repeated for 1,000 rows; the difference of the peaks is the cost of all
further output.

Usage: python -m tests.benchmarks.bench_output --tokens 50000000 --out reports/output_benchmarks.json [--trace DIR]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from entrace.analysis.terminal.export import FORMATS
from entrace.analysis.terminal.progress import Progress
from entrace.analysis.trace import describe_machine
from tests.markdown import table

from .simulated_trace import write_trace

FEW_ROWS = 1000
ALL, FEW = "select * from tokens", f"select * from tokens limit {FEW_ROWS}"
# Prints seconds and both peaks, in MiB, on the last line of stderr.
SCRIPT = """
import pathlib, resource, sys, time
from entrace.analysis.cli import app, run
started = time.perf_counter()
sys.argv = ["entrace", "sql", *sys.argv[1:]]
try:
    run(app)
finally:
    seconds = time.perf_counter() - started
    # Other than ru_maxrss, this excludes the memory of the process that started this one.
    own = next(line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(seconds, int(own.split()[1]) / 1024, child / 1024, file=sys.stderr)
"""


def measure(trace: Path, query: str, form: str) -> tuple[float, float, float]:
    """Return seconds, and the peak memory of the command and of its child in MiB."""
    arguments = [sys.executable, "-c", SCRIPT, str(trace), query, "--format", form, "--timeout", "0"]
    done = subprocess.run(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True)
    seconds, own, child = map(float, done.stderr.splitlines()[-1].split())
    return seconds, own, child


def run_benchmark(trace: Path, tokens: int) -> dict[str, Any]:
    """Measure every format."""
    formats = {}
    with Progress("output", len(FORMATS)) as progress:
        for done, form in enumerate(FORMATS, start=1):
            _, few_own, few_child = measure(trace, FEW, form)
            seconds, own, child = measure(trace, ALL, form)
            formats[form] = {
                "rows_per_s": round(tokens / seconds),
                "peak_mib": round(own),
                "peak_mib_of_1000_rows": round(few_own),
                "query_peak_mib": round(child),
                "query_peak_mib_of_1000_rows": round(few_child),
            }
            progress.update(done, form)
    return {"rows": tokens, "formats": formats, **describe_machine()}


def to_markdown(result: dict[str, Any]) -> str:
    """Return one row per format: speed, and peak memory beyond that of 1,000 rows.

    Peak memory counts both processes together.
    """
    rows = []
    for form, found in result["formats"].items():
        added = sum(found[key] - found[f"{key}_of_1000_rows"] for key in ("peak_mib", "query_peak_mib"))
        rows.append((f"`{form}`", f"{found['rows_per_s']:,}", added))
    return "\n".join(table(["Format", "Rows per second", "Added memory (MiB)"], rows, numbers=(1, 2)))


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=50_000_000, help="rows of the table tokens (default 50,000,000)")
    parser.add_argument("--trace", type=Path, help="folder for the trace, kept for later runs (default temporary)")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: print only)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        trace = options.trace or Path(temporary, "trace")
        if not trace.exists():
            write_trace(trace, options.tokens)
        result = run_benchmark(trace, options.tokens)
    text = json.dumps(result, indent=1)
    print(text)
    print(to_markdown(result))
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
