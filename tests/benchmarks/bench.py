"""All benchmarks against other software, and their report: figures, targets, and whether they are met.

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
from tests.benchmarks.figures import Figure, to_markdown

PACKAGES = ("torch", "transformers", "trl", "numpy", "pyarrow")
INTRODUCTION = """# Speed

Written by `{command}`. Figures are medians over turns, in each of which everything that is
compared runs once, in alternating order; quartiles show the spread between turns. Ratios are taken
within a turn, but for those of what is added to the product, which are taken between medians: their
quartiles are those of medians over turns drawn with replacement.
"""


def write_report(out: Path, command: str, figures: list[Figure], **more: Any) -> None:
    """Writes ``out``.md and ``out``.json: what it was measured on and with, and the figures."""
    machine = {"threads": torch.get_num_threads(), **describe_machine()["hardware"], **more}
    versions = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    lines = [
        INTRODUCTION.format(command=command),
        "; ".join(", ".join(f"{key} {value}" for key, value in part.items()) for part in (machine, versions)) + ".",
        "",
        to_markdown(figures),
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text("\n".join(lines))
    result = {"machine": machine, "versions": versions, "figures": [figure.as_json() for figure in figures]}
    out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    verdicts = [figure.is_met for figure in figures if figure.is_met is not None]
    print(f"{out.with_suffix('.md')}: {sum(verdicts)} of {len(verdicts)} targets met")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="report to write, without ending")
    parser.add_argument("--quick", action="store_true", help="at toy size: that it runs, not how fast")
    arguments = parser.parse_args()
    figures: list[Figure] = []
    for part in (bench_grpo_step, bench_token_stats, bench_smollm):
        started = time.perf_counter()
        # In a process of its own: memory is as the system has it, whatever the parts before did.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            figures += pool.submit(part.measure, arguments.quick).result()
        print(f"{part.__name__}: {time.perf_counter() - started:.0f} s", flush=True)
    if arguments.quick:
        figures = [replace(figure, bound=None, target=None) for figure in figures]
    write_report(arguments.out, "make bench", figures)


if __name__ == "__main__":
    main()
