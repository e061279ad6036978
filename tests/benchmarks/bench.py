"""Run all benchmarks against other software.

The report holds measurements, targets, and which targets are met.

Usage: python -m tests.benchmarks.bench --out reports/benchmarks [--quick]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from entrace.analysis.trace.manifest import describe_machine
from tests.benchmarks import bench_grpo_step, bench_smollm, bench_token_stats
from tests.benchmarks.measurements import Measurement, to_markdown

PACKAGES = ("torch", "transformers", "trl", "numpy", "pyarrow")
INTRODUCTION = """# Speed

Written by `{command}`. Values are medians over rounds. In each round, all compared programs run once, in
alternating order; quartiles show the spread between rounds. Ratios are computed within a round.
"""


def write_report(out: Path, command: str, measurements: list[Measurement], **more: Any) -> None:
    """Write machine, versions, and measurements to ``out``.md and ``out``.json."""
    machine = {"threads": torch.get_num_threads(), **describe_machine()["hardware"], **more}
    versions = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    lines = [
        INTRODUCTION.format(command=command),
        "; ".join(", ".join(f"{key} {value}" for key, value in part.items()) for part in (machine, versions)) + ".",
        "",
        to_markdown(measurements),
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text("\n".join(lines))
    result = {
        "machine": machine,
        "versions": versions,
        "measurements": [measurement.as_json() for measurement in measurements],
    }
    out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    verdicts = [measurement.is_met for measurement in measurements if measurement.is_met is not None]
    print(f"{out.with_suffix('.md')}: {sum(verdicts)} of {len(verdicts)} targets met")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="report to write, without file extension")
    parser.add_argument("--quick", action="store_true", help="run at toy size, without targets")
    arguments = parser.parse_args()
    measurements: list[Measurement] = []
    for part in (bench_grpo_step, bench_token_stats, bench_smollm):
        started = time.perf_counter()
        # In a new process, so that earlier parts do not affect the state of memory.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            measurements += pool.submit(part.measure, arguments.quick).result()
        print(f"{part.__name__}: {time.perf_counter() - started:.0f} s", flush=True)
    if arguments.quick:
        measurements = [replace(measurement, bound=None, target=None) for measurement in measurements]
    write_report(arguments.out, "make bench", measurements)


if __name__ == "__main__":
    main()
