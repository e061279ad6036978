"""Measure how often verdicts are wrong on simulated runs with known truth.

Usage: python -m tests.calibration.calibrate [--worlds frozen,planted] [--simulations 200] [--jobs 2]
       [--out reports/calibration] [--cache data/runs/calibration] [--keep]

Writes OUT.json and OUT.md. Each outcome is saved in the cache, and the command resumes from there. ``--worlds`` adds
simulations to some worlds; the page includes all saved worlds. With ``--keep``, outcomes of other code versions count,
and worlds without any keep their entries in OUT.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import entrace.analysis
from entrace.analysis.claims import judge, load_ledger
from entrace.analysis.runs import open_runs
from entrace.analysis.terminal.progress import Progress
from entrace.analysis.trace.errors import InputError, nearest
from tests.calibration import figure_rows, parameters, real_cases, simulate, simulate_arms, simulate_updates, truth
from tests.calibration.parameters import UpdateWorld, World
from tests.calibration.summary import Outcome, render, summarize
from tests.calibration.worlds import UPDATE_CLAIMS, WORLDS

SEED = 2508
# Temporary traces are written to memory if the system has a file system for it.
SHARED_MEMORY = Path("/dev/shm")
SIMULATORS = (parameters, simulate, simulate_arms, simulate_updates)


def simulate_once(name: str, seed: int) -> Outcome:
    """Write and judge one simulation."""
    world = WORLDS[name].world
    rng = np.random.default_rng([seed, *name.encode()])
    folder = Path(tempfile.mkdtemp(prefix="entrace-", dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None))
    try:
        if isinstance(world, World):
            for seed_of_run in range(world.runs):
                simulate.write_run(folder / f"run-{seed_of_run}", simulate.simulate_run(world, rng), rng, seed_of_run)
        elif isinstance(world, UpdateWorld):
            for seed_of_run in range(world.runs):
                run = simulate_updates.simulate_updates(world, rng)
                simulate_updates.write_updates(folder / f"run-{seed_of_run}", run, seed_of_run)
        else:
            simulate_arms.write_ablation(folder, world, rng)
        runs = open_runs(folder)
        ledger = load_ledger()
        if isinstance(world, UpdateWorld):
            ledger = {claim: ledger[claim] for claim in UPDATE_CLAIMS}
        found = [(f"{v.claim}/{v.part}", v.subject, v.verdict, v.effect, v.low, v.high) for v in judge(runs, ledger)]
        if isinstance(world, World) and world.has_tokens and world.runs == 1:
            found += figure_rows.figure_rows(runs)
    finally:
        shutil.rmtree(folder)
    return found


def truth_once(name: str, num_runs: int = truth.TRUTH_RUNS) -> truth.Truth:
    """Return the true effects of a world."""
    world, rng = WORLDS[name].world, np.random.default_rng([SEED, *name.encode()])
    found = truth.truth_of(world, rng, num_runs)
    if isinstance(world, World) and world.has_tokens and world.boundary and world.runs == 1:
        of_runs = [
            figure_rows.figure_truth(simulate.simulate_run(replace(world, rho=0.0), rng)) for _ in range(num_runs)
        ]
        found |= {part: float(np.mean([run[part] for run in of_runs])) for part in of_runs[0]}
    return found


class Store:
    """Store outcomes and truths on disk, one file of JSON lines per world.

    Each line carries a hash of the code and parameters that it depends on. Lines with another hash are ignored unless
    ``keep`` is set.
    """

    def __init__(self, folder: Path, *, keep: bool = False) -> None:
        """Create ``folder`` if it does not exist."""
        self.folder, self.keep = folder, keep
        folder.mkdir(parents=True, exist_ok=True)

    def outcomes(self, name: str) -> dict[int, Outcome]:
        """Return saved outcomes of a world by seed."""
        return {line["seed"]: line["outcome"] for line in self._lines(f"{name}.jsonl", outcome_key(name))}

    def save_outcome(self, name: str, seed: int, outcome: Outcome) -> None:
        """Append an outcome."""
        self._append(f"{name}.jsonl", {"key": outcome_key(name), "seed": seed, "outcome": outcome})

    def real(self, name: str) -> list[Any] | None:
        """Return the saved verdicts on a real case."""
        return next((line["rows"] for line in self._lines(f"{name}.jsonl", real_key())), None)

    def save_real(self, name: str, rows: Sequence[Any]) -> None:
        """Append the verdicts on a real case."""
        self._append(f"{name}.jsonl", {"key": real_key(), "rows": rows})

    def truth(self, name: str) -> truth.Truth | None:
        """Return the saved truth of a world."""
        return next((line["truth"] for line in self._lines(f"{name}.truth.jsonl", truth_key(name))), None)

    def save_truth(self, name: str, found: truth.Truth) -> None:
        """Append a truth."""
        self._append(f"{name}.truth.jsonl", {"key": truth_key(name), "truth": found})

    def _append(self, file: str, line: dict[str, Any]) -> None:
        with (self.folder / file).open("a") as stream:
            # The previous line is incomplete if an earlier command was killed while writing.
            stream.write("\n" + json.dumps(line))

    def _lines(self, file: str, key: str) -> list[dict[str, Any]]:
        path = self.folder / file
        lines = [_parse(text) for text in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if line and (self.keep or line["key"] == key)]


def _parse(text: str) -> dict[str, Any] | None:
    """Parse a line; return None if it is empty or incomplete."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


@cache
def outcome_key(name: str) -> str:
    """Return a hash of a world's parameters, the simulator, and all code that judges."""
    return _hash(name, [*_judging(), Path(figure_rows.__file__)])


def _judging() -> list[Path]:
    """Return the files that verdicts depend on."""
    folder = Path(entrace.analysis.__file__).resolve().parent
    paths = [*sorted(folder.rglob("*.py")), *sorted(folder.rglob("*.sql")), folder / "claims.toml"]
    return [path for path in paths if "figures" not in path.parts]


@cache
def real_key() -> str:
    """Return a hash of all code that judges a real case; the trainer is not included."""
    return _hash("", [Path(real_cases.__file__), *_judging()])


@cache
def truth_key(name: str) -> str:
    """Return a hash of a world's parameters, the simulator, and the truth's code."""
    return _hash(name, [Path(truth.__file__), Path(figure_rows.__file__)])


def _hash(name: str, paths: Sequence[Path]) -> str:
    content = hashlib.sha256(repr(WORLDS[name].world if name else "").encode())
    for path in [*paths, *(Path(str(module.__file__)) for module in SIMULATORS)]:
        content.update(path.read_bytes())
    return content.hexdigest()[:16]


def run(names: Sequence[str], simulations: int, jobs: int, store: Store, truth_runs: int = truth.TRUTH_RUNS) -> None:
    """Simulate the outcomes that the store lacks, alternating between worlds."""
    saved = {name: store.outcomes(name) for name in names}
    tasks = [(name, seed) for seed in range(simulations) for name in names if seed not in saved[name]]
    truths = [name for name in names if store.truth(name) is None]
    context = multiprocessing.get_context("forkserver")
    total = len(tasks) + len(truths)
    if not total:
        return
    with Progress("calibrate", total) as progress, ProcessPoolExecutor(jobs, context) as pool:
        progress.update(0)
        pending: dict[Any, tuple[str, int | None]] = {
            pool.submit(truth_once, name, truth_runs): (name, None) for name in truths
        }
        pending |= {pool.submit(simulate_once, *task): task for task in tasks}
        try:
            for done, future in enumerate(as_completed(pending), start=1):
                name, seed = pending[future]
                if seed is None:
                    store.save_truth(name, future.result())
                else:
                    store.save_outcome(name, seed, future.result())
                progress.update(done, name)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run_real(names: Sequence[str], store: Store) -> None:
    """Train and judge the real cases that the store lacks."""
    for name in names:
        if store.real(name) is None:
            with tempfile.TemporaryDirectory(prefix="entrace-") as folder:
                store.save_real(name, real_cases.judge_real(name, Path(folder) / "run"))


def choose(text: str | None) -> list[str]:
    """Return the worlds and real cases in a comma-separated list.

    Without ``text``, all are returned.

    Raises:
        InputError: a world is unknown.
    """
    known = [*WORLDS, *real_cases.REAL_CASES]
    if text is None:
        return known
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise InputError(f'--worlds: unknown world "{name}"{nearest(name, known)}')
    return list(dict.fromkeys(names))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, found {text}")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the simulations and write the two files; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", help="comma-separated names of worlds (default all)")
    parser.add_argument("--simulations", type=_positive, default=200, help="simulations per world (default 200)")
    parser.add_argument("--jobs", type=_positive, default=2, help="parallel processes (default 2)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("reports/calibration"),
        help="output path without suffix (default reports/calibration)",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("data/runs/calibration"),
        help="folder of saved outcomes (default data/runs/calibration)",
    )
    parser.add_argument("--keep", action="store_true", help="reuse outcomes and entries of other code versions")
    options = parser.parse_args(arguments)
    try:
        names = choose(options.worlds)
    except InputError as error:
        print(f"calibrate: {error}", file=sys.stderr)
        return 2
    store = Store(options.cache, keep=options.keep)
    run([name for name in names if name in WORLDS], options.simulations, options.jobs, store)
    run_real([name for name in names if name in real_cases.REAL_CASES], store)
    # The page includes all saved worlds of this code version, with all their simulations.
    saved = {name: list(store.outcomes(name).values()) for name in WORLDS}
    real = {name: rows for name in real_cases.REAL_CASES if (rows := store.real(name)) is not None}
    page = options.out.with_suffix(".json")
    former = json.loads(page.read_text()) if options.keep and page.exists() else None
    found = {name: (outcomes, store.truth(name) or {}) for name, outcomes in saved.items() if outcomes}
    summary = summarize(found, real, former)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(json.dumps(summary, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(render(summary))
    print(render(summary, with_cells=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
