"""What rounding measured values to fewer mantissa bits saves, and what it changes in the report.

The token files of each run are read, rounded as ``record.mantissa_bits`` has them rounded, and written again by the
trace's own writer. Bytes per record are those of whole files over their rows, every column included.

What is derived from such a copy is compared, cell by cell, with what is derived from the files as recorded: the frame
of every figure (analysis.figures) and the scorecard (analysis.claims), of the study as a whole and of each of its runs
alone. The change of a number is |rounded - exact| / |exact|: neither the scale of a column nor the width of an interval
forgives small numbers. A change from zero or to or from null, a text that differs, and rows that come, go or trade
places have no bound.

Chosen are the fewest bits tried with which nothing changes by more than ``LIMIT`` in the study, nor in any of the other
runs: what the study allows is tried on each of them alone.

Usage: python tests/benchmarks/measure_precision.py data/runs/study --others RUN... --out reports/precision
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq

import analysis
from analysis import claims, figures
from analysis.progress import Progress
from analysis.trace import MANIFEST, TABLES, describe_machine
from analysis.trace.precision import EXACT_BITS, round_measured
from analysis.trace.writer import _write_part

BITS = (23, 22, 21, 20, 18, 16, 14, 12, 10, 8)
LIMIT = 1e-3
MAX_BYTES = 8
TOKENS = TABLES["tokens"]
SCORECARD = "scorecard"
EFFECT = ("effect", "low", "high")
PAGE = """# How many bits of mantissa the record needs

`make precision` makes this page from the default study, {runs} runs of {records:,} token records. The measured columns,
{columns}, are rounded to
some bits of mantissa (float32 has 23) and written again. Then all {figures} figures and the scorecard are derived anew,
for the study as a whole and for each run alone. The change of a number is |rounded - exact| / |exact|, however small it
is; a change from zero or to or from null, a text that differs, and rows that come, go or trade places have no bound.

**Chosen: {bits} bits**, the fewest of those tried with which nothing changes by more than {limit:g}
{scope}. A token record takes {bytes:.2f} bytes, all columns counted; at most
{max_bytes} are allowed.

| Bits | Bytes per record | Saved | Largest change | Where | Figures beyond {limit:g} | In effects | Verdicts |
| ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: |
{rows}

In effects: the largest change of an effect of the scorecard or of its interval. Verdicts: how many become others.

Counts break first: a token near the edge of a narrow bin falls into the next one. So do movements, differences of two
probabilities that may be almost equal. Whoever needs no more than the scorecard may set `record.mantissa_bits={lean}`:
its effects and intervals keep within {limit:g} here, and a record takes {lean_bytes:.2f} bytes.
{others}
Rounding takes {of_writing:.1%} of the time that a file needs to be rounded and written, and {of_training:.2%} of the
time of the training steps recorded in it.
"""

# What is derived, by the name of the study or run and the stem of the figure.
Derived = dict[tuple[str, str], pl.DataFrame]


@dataclass
class Size:
    """Token files written: bytes, rows, and for each file the seconds of rounding and of rounding and writing."""

    bytes: int = 0
    records: int = 0
    rounding_s: list[float] = field(default_factory=list)
    writing_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Change:
    """The largest change in one column of one frame."""

    change: float
    of: str
    stem: str
    column: str
    exact: Any
    rounded: Any

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no number for a change without bound: null."""
        return {**vars(self), "change": self.change if math.isfinite(self.change) else None}


UNCHANGED = Change(0.0, "", "", "", None, None)


def copy_run(run: Path, out: Path, bits: int, size: Size) -> None:
    """Writes ``run`` without its checkpoints to ``out``, tokens rounded, and adds their files to ``size``."""
    shutil.copytree(run, out, ignore=shutil.ignore_patterns("checkpoints", TOKENS.name))
    for path in sorted((run / TOKENS.name).glob("*.parquet")):
        rows = pq.read_table(path)
        target = out / TOKENS.name / path.name
        started = time.perf_counter()
        rounded = round_measured(rows, TOKENS, bits)
        size.rounding_s.append(time.perf_counter() - started)
        size.records += _write_part(target, TOKENS, [rounded])
        size.writing_s.append(time.perf_counter() - started)
        size.bytes += target.stat().st_size


def derive(folders: Sequence[Path]) -> Derived:
    """Frames of all figures, and the scorecard, of each study or run."""
    derived: Derived = {}
    for folder in folders:
        runs = analysis.open_runs(folder)
        derived |= {(folder.name, stem): figures.query(runs, stem) for stem in figures.STEMS}
        verdicts = [verdict.to_dict() for verdict in claims.judge(runs)]
        derived[folder.name, SCORECARD] = pl.DataFrame(verdicts, infer_schema_length=None)
    return derived


def compare(exact: Derived, rounded: Derived) -> list[Change]:
    """Largest change of each column, largest first; no column without a change."""
    changes = []
    for (of, stem), frame in exact.items():
        other = rounded[of, stem]
        if frame.height != other.height:
            changes.append(Change(math.inf, of, stem, "rows", frame.height, other.height))
            continue
        for column in frame.columns:
            pairs = zip(frame[column].to_list(), other[column].to_list(), strict=True)
            cells = (Change(change_of(a, b), of, stem, column, a, b) for a, b in pairs if a != b)
            changes.append(max(cells, key=lambda cell: cell.change, default=UNCHANGED))
    return sorted((change for change in changes if change.change), key=lambda change: -change.change)


def change_of(exact: Any, rounded: Any) -> float:
    """Relative change of a number, infinite where there is no such thing; 0 for equal values, nan for nan included."""
    if exact == rounded or (exact != exact and rounded != rounded):
        return 0.0
    if not (isinstance(exact, int | float) and isinstance(rounded, int | float)) or exact == 0:
        return math.inf
    change = abs(rounded - exact) / abs(exact)
    return change if math.isfinite(change) else math.inf


def measure(study: Path, bits: int, exact: Derived) -> dict[str, Any]:
    """What rounding the study to ``bits`` saves and changes."""
    size = Size()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, study.name)
        runs = [run.name for run in run_folders(study)]
        for run in runs:
            copy_run(study / run, copy / run, bits, size)
        rounded = derive([copy, *(copy / run for run in runs)])
        trained_s = analysis.open_runs(copy).sql("select sum(rollout_s + reward_s + update_s + record_s) from steps")
    changes = compare(exact, rounded)
    effects = [change for change in changes if change.stem == SCORECARD and change.column in EFFECT]
    verdicts = [(old["verdict"] != rounded[key]["verdict"]).sum() for key, old in exact.items() if key[1] == SCORECARD]
    return {
        "bits": bits,
        "bytes_per_record": size.bytes / size.records,
        "records": size.records,
        "worst": (changes or [UNCHANGED])[0].to_dict(),
        "beyond_limit": sorted({change.stem for change in changes if change.change > LIMIT}),
        "worst_effect": (effects or [UNCHANGED])[0].to_dict(),
        "verdicts_changed": int(sum(verdicts)),
        "rounding_of_writing": statistics.median(map(float.__truediv__, size.rounding_s, size.writing_s)),
        "rounding_of_training": sum(size.rounding_s) / trained_s.item(),
    }


def try_others(runs: Sequence[Path], candidates: Sequence[int], bar: Progress, done: int) -> dict[str, Any]:
    """Largest change in each of ``runs`` alone, by bits and name of the run."""
    found: dict[str, Any] = {str(bits): {} for bits in candidates}
    for number, run in enumerate(runs, start=1):
        exact = derive([run])
        for bits in candidates:
            with tempfile.TemporaryDirectory() as folder:
                copy = Path(folder, run.name)
                copy_run(run, copy, bits, Size())
                changes = compare(exact, derive([copy]))
            found[str(bits)][run.name] = (changes or [UNCHANGED])[0].to_dict()
        bar.update(done + number, note=run.name)
    return found


def run_benchmark(study: Path, others: Sequence[Path]) -> dict[str, Any]:
    """Measures everything and returns what goes into the JSON file."""
    exact = derive([study, *run_folders(study)])
    levels = []
    with Progress("measure", len(BITS) + len(others)) as bar:
        for done, bits in enumerate(BITS, start=1):
            levels.append(measure(study, bits, exact))
            bar.update(done, note=f"{bits} bits: {levels[-1]['bytes_per_record']:.2f} bytes per record")
        allowed = [level["bits"] for level in levels if not exceeds(level["worst"])]
        tried = try_others(others, [bits for bits in allowed if bits != EXACT_BITS], bar, len(BITS))
    chosen = min(bits for bits in allowed if not any(map(exceeds, tried.get(str(bits), {}).values())))
    return {
        "limit": LIMIT,
        "chosen": chosen,
        "study": [run.name for run in run_folders(study)],
        **describe_machine(),
        "levels": levels,
        "others": tried,
    }


def exceeds(change: dict[str, Any]) -> bool:
    """Whether a change is larger than allowed; null stands for one without bound."""
    return change["change"] is None or change["change"] > LIMIT


def run_folders(study: Path) -> list[Path]:
    """The runs of a study."""
    return sorted(path.parent for path in study.glob(f"*/{MANIFEST}"))


def to_page(result: dict[str, Any]) -> str:
    """The result for people, in Markdown."""
    levels = {level["bits"]: level for level in result["levels"]}
    chosen = levels[result["chosen"]]
    keeping = [bits for bits, level in levels.items() if not exceeds(level["worst_effect"])]
    lean = min(bits for bits in keeping if not levels[bits]["verdicts_changed"])
    return PAGE.format(
        runs=len(result["study"]),
        columns=", ".join(f"`{column.name}`" for column in TOKENS.columns if column.is_measured),
        records=chosen["records"],
        bits=chosen["bits"],
        limit=LIMIT,
        scope="in the study and in the other runs below" if result["others"] else "in the study",
        bytes=chosen["bytes_per_record"],
        max_bytes=MAX_BYTES,
        figures=len(figures.STEMS),
        rows="\n".join(_row(level, levels[EXACT_BITS]["bytes_per_record"]) for level in levels.values()),
        lean=lean,
        lean_bytes=levels[lean]["bytes_per_record"],
        others="".join(_about_others(bits, tried) for bits, tried in result["others"].items()),
        of_writing=chosen["rounding_of_writing"],
        of_training=chosen["rounding_of_training"],
    )


def _row(level: dict[str, Any], exact_bytes: float) -> str:
    cells = (
        str(level["bits"]),
        f"{level['bytes_per_record']:.2f}",
        f"{1 - level['bytes_per_record'] / exact_bytes:.1%}",
        _amount(level["worst"]),
        _place(level["worst"]),
        str(len(set(level["beyond_limit"]) - {SCORECARD})),
        _amount(level["worst_effect"]),
        str(level["verdicts_changed"]),
    )
    return f"| {' | '.join(cells)} |"


def _about_others(bits: str, tried: dict[str, dict[str, Any]]) -> str:
    within = sum(not exceeds(change) for change in tried.values())
    worst = max(tried.values(), key=lambda change: math.inf if change["change"] is None else change["change"])
    return (
        f"\nWith {bits} bits nothing in the study changes by more than {LIMIT:g}. That holds for {within} of "
        f"{len(tried)} other runs, each alone.\nThe largest change is {_amount(worst)}, in {_place(worst)}: "
        f"{_cell(worst['exact'])} becomes {_cell(worst['rounded'])}.\n"
    )


def _amount(change: dict[str, Any]) -> str:
    return "without bound" if change["change"] is None else f"{change['change']:.1e}"


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _place(change: dict[str, Any]) -> str:
    return f"{change['stem']}.{change['column']}, {change['of']}" if change["stem"] else "nowhere"


def main() -> None:
    """Measures, prints the page, and writes it with its JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of the study's runs")
    parser.add_argument("--others", type=Path, nargs="*", default=[], help="folders of other runs")
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    arguments = parser.parse_args()
    if not run_folders(arguments.study):
        parser.error(f"{arguments.study}: holds no runs; make them with make study")
    result = run_benchmark(arguments.study, arguments.others)
    page = to_page(result)
    print(page)
    if arguments.out:
        arguments.out.with_suffix(".json").write_text(json.dumps(result, indent=2, default=str, allow_nan=False) + "\n")
        arguments.out.with_suffix(".md").write_text(page)


if __name__ == "__main__":
    main()
