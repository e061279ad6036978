"""How often are verdicts wrong? Simulated runs with known truth, judged as any run is.

Usage: python -m tests.calibration.calibrate [--simulations 200] [--jobs 2] [--out reports/calibration]

Writes OUT.json and OUT.md. Per part of a claim: how often a run without the effect is called supported or contradicted,
how often the planted effect is found, and how often the 95 % interval holds the truth.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import beta

from analysis.claims import CONTRADICTED, SUPPORTED, judge, load_ledger
from analysis.progress import Progress
from analysis.runs import open_runs
from tests.calibration.simulate import simulate_run, write_run
from tests.calibration.simulate_arms import write_ablation, write_flat_run
from tests.calibration.truth import Truth, truth_of_flat_run, truth_of_methods, truth_of_run
from tests.calibration.worlds import NULL, NULL_METHODS, PLANTED, PLANTED_METHODS

# Where an effect is absent, and where it is planted. Stages and the exchange law are what a flat run lacks.
ABSENT = {"S1": "flat", "E1": "flat", "M1": "equal arms", "M2": "equal arms", "M3": "equal arms", "I3": "equal arms"}
PRESENT = {"M1": "better arms", "M2": "better arms", "M3": "better arms", "I3": "better arms"}
WORLDS = ("flat", "two stages", "planted", "equal arms", "better arms")
TRUTH_RUNS = 40

Outcome = dict[str, tuple[str, float, float, float]]


def simulate(world: str, seed: int) -> Outcome:
    """Writes and judges one simulation; returns verdict, effect and interval by ``claim/part``."""
    rng = np.random.default_rng([seed, WORLDS.index(world)])
    folder = Path(tempfile.mkdtemp(prefix="entrace-"))
    try:
        if world == "flat":
            write_flat_run(folder / "run", rng)
        elif world.endswith("arms"):
            write_ablation(folder, PLANTED_METHODS if world == "better arms" else NULL_METHODS, rng)
        else:
            sizes = PLANTED if world == "planted" else NULL
            write_run(folder / "run", simulate_run(sizes, rng), sizes, rng)
        verdicts = judge(open_runs(folder), seed)
    finally:
        shutil.rmtree(folder)
    # Claim M3 is made of two arms that are alike here; one stands for both.
    found = [v for v in verdicts if not (v.claim == "M3" and v.subject.startswith("position"))]
    return {
        f"{v.claim}/{v.part}": (v.verdict, *(np.nan if x is None else x for x in (v.effect, v.low, v.high)))
        for v in found
    }


def truths() -> dict[str, Truth]:
    """Truth of every world."""
    rng = np.random.default_rng(2508)
    return {
        "flat": truth_of_flat_run(),
        "two stages": truth_of_run(NULL, TRUTH_RUNS, rng),
        "planted": truth_of_run(PLANTED, TRUTH_RUNS, rng),
        "equal arms": truth_of_methods(NULL_METHODS),
        "better arms": truth_of_methods(PLANTED_METHODS),
    }


def summarize(outcomes: dict[str, list[Outcome]], truth: dict[str, Truth]) -> list[dict[str, Any]]:
    """One row a part of a claim."""
    rows = []
    for claim, entry in load_ledger().items():
        absent, present = ABSENT.get(claim, "two stages"), PRESENT.get(claim, "planted")
        for part, spec in entry["parts"].items():
            key = f"{claim}/{part}"
            words = [outcome[key][0] for outcome in outcomes[absent]]
            false = sum(word in (SUPPORTED, CONTRADICTED) for word in words)
            found = [outcome[key][0] for outcome in outcomes[present]]
            rows.append(
                {
                    "claim": claim,
                    "part": part,
                    "unit": spec["unit"],
                    "smallest_effect": spec["smallest_effect"],
                    "null": absent,
                    "simulations": len(words),
                    "false_supported": words.count(SUPPORTED) / len(words),
                    "false_contradicted": words.count(CONTRADICTED) / len(words),
                    "false_upper": upper_end(false, len(words)),
                    "planted": truth[present][claim, part],
                    "power": found.count(SUPPORTED) / len(found),
                    **_coverage(outcomes, truth, claim, part),
                }
            )
    return rows


def upper_end(hits: int, n: int) -> float:
    """Upper end of the 95 % interval of a rate (Clopper and Pearson, Biometrika 1934)."""
    return 1.0 if hits == n else float(beta.ppf(0.975, hits + 1, n - hits))


def _coverage(outcomes: dict[str, list[Outcome]], truth: dict[str, Truth], claim: str, part: str) -> dict[str, Any]:
    """Share of intervals that hold the truth, over all worlds that have both, and how far they reach."""
    hits: dict[str, list[bool]] = {}
    half_widths = []
    for world, simulations in outcomes.items():
        # Without stages the speed of one relative to the other has no truth to cover.
        if (claim, part) not in truth[world] or (claim == "S1" and world == "flat"):
            continue
        for outcome in simulations:
            _, effect, low, high = outcome[f"{claim}/{part}"]
            if np.isfinite(effect):
                hits.setdefault(world, []).append(low <= truth[world][claim, part] <= high)
                half_widths.append((high - low) / 2)
    every = [hit for found in hits.values() for hit in found]
    return {
        "coverage": float(np.mean(every)) if every else None,
        "intervals": len(every),
        "half_width": float(np.median(half_widths)),
        "coverage_by_world": {world: float(np.mean(found)) for world, found in hits.items()},
    }


def render(rows: list[dict[str, Any]]) -> str:
    """The table as Markdown."""
    lines = [
        "# How often verdicts are wrong",
        "",
        f"{rows[0]['simulations']} simulated runs a world, of the default study's size, judged as any run is by",
        "`entrace claims`. `make calibrate` makes this page; [verdicts.md](verdicts.md) says what they contain.",
        "",
        "| Claim | Part | False supported | False contradicted | Upper end of both | Planted effect | Found "
        "| Interval holds the truth | Its half width | Matters from |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row['claim']} | {row['part']} | {row['false_supported']:.1%} | {row['false_contradicted']:.1%} "
            f"| {row['false_upper']:.1%} | {row['planted']:.3g} {row['unit']} | {row['power']:.1%} "
            f"| {row['coverage']:.1%} of {row['intervals']} | {row['half_width']:.2g} | {row['smallest_effect']:g} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs all simulations and writes the two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=200, help="per world")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("reports/calibration"), help="without suffix")
    options = parser.parse_args()
    tasks = [(world, seed) for seed in range(options.simulations) for world in WORLDS]
    results: dict[tuple[str, int], Outcome] = {}
    context = multiprocessing.get_context("forkserver")
    with Progress("calibrate", len(tasks)) as progress, ProcessPoolExecutor(options.jobs, context) as pool:
        futures = {pool.submit(simulate, *task): task for task in tasks}
        for done, future in enumerate(as_completed(futures), start=1):
            results[futures[future]] = future.result()
            progress.update(done)
    outcomes = {world: [results[world, seed] for seed in range(options.simulations)] for world in WORLDS}
    rows = summarize(outcomes, truths())
    options.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(render(rows))
    print(render(rows))


if __name__ == "__main__":
    main()
