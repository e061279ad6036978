"""Cause faults of every kind at random moments, and check that nothing is lost.

Usage: python -m tests.chaos.chaos [--out reports/chaos.json] [--kinds NAME,NAME] [--only KIND:INDEX] [--state FILE]

A trial survives, is refused in one line, gives a wrong answer silently, or loses something; the last two are failures,
and the exit code is then 1. Each result is appended to the file ``--state``, so that the same command continues where
it was stopped. The kind and the index of a trial determine its random numbers, and ``--only`` repeats it; moments in
seconds differ a little.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from entrace.analysis.terminal.progress import Progress
from entrace.analysis.trace import describe_machine
from entrace.analysis.trace.manifest import count_cores
from tests.markdown import table

from . import flips, interruptions, kills, output, training
from .scene import Scene
from .trial import FAILED, Fault, Outcome, Trial

FAULTS: dict[str, type[Fault]] = {
    fault.name: fault
    for fault in (
        kills.Kills,
        flips.Flips,
        flips.Blocks,
        interruptions.Reports,
        interruptions.Imports,
        interruptions.Prunes,
        output.Pipes,
        output.Memory,
        output.Disks,
        training.Writers,
        training.Clocks,
    )
}
DAMAGE = (flips.Flips.name, flips.Blocks.name)

# Of a process that plays trials.
_faults: dict[str, Fault] = {}


def make_faults(folder: Path, seed: int, kinds: Iterable[str]) -> dict[str, Fault]:
    """Return the faults of some kinds, which share a scene in ``folder``."""
    scene = Scene(folder, seed)
    return {kind: FAULTS[kind](scene) for kind in kinds}


def plan(kinds: Iterable[str], numbers: dict[str, int]) -> list[tuple[str, int]]:
    """Return all trials; the kinds alternate, so that the time left can be estimated."""
    trials = [((index + 0.5) / numbers[kind], kind, index) for kind in kinds for index in range(numbers[kind])]
    return [(kind, index) for _, kind, index in sorted(trials)]


def play_all(
    trials: Sequence[tuple[str, int]], seed: int, jobs: int, done: dict[tuple[str, int], Trial]
) -> Iterator[Trial]:
    """Play the trials that are not ``done`` in parallel, and yield each as it ends.

    ``jobs`` is the number of processes.
    """
    kinds = list(dict.fromkeys(kind for kind, _ in trials))
    left = (trial for trial in trials if trial not in done)
    # A folder of its own for each process; a stopped command leaves none behind.
    with tempfile.TemporaryDirectory(prefix="entrace-chaos-") as folder:
        # Processes that a fork would copy may hold locks.
        context = get_context("forkserver")
        with ProcessPoolExecutor(jobs, context, _prepare, (Path(folder), seed, kinds)) as pool:
            # Few at a time, so that Ctrl-C ends soon.
            running: set[Future[Trial]] = {pool.submit(_play, *trial) for trial in islice(left, jobs)}
            while running:
                ended, running = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    yield future.result()
                    running |= {pool.submit(_play, *trial) for trial in islice(left, 1)}


def _prepare(folder: Path, seed: int, kinds: list[str]) -> None:
    _faults.update(make_faults(folder / str(os.getpid()), seed, kinds))


def _play(kind: str, index: int) -> Trial:
    return _faults[kind].play(index)


def read_state(path: Path) -> dict[tuple[str, int], Trial]:
    """Return the trials that are stored, and remove a last line that was cut off."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    if path.exists():
        path.write_text("".join(f"{line}\n" for line in lines))
    trials = [Trial.from_dict(json.loads(line)) for line in lines]
    return {(trial.kind, trial.index): trial for trial in trials}


def append_state(path: Path, trial: Trial) -> None:
    """Store a trial."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(trial.to_dict()) + "\n")


def default_state(seed: int, commit: str) -> Path:
    """Return a file outside the repository, a different one for each commit."""
    return Path(tempfile.gettempdir(), "entrace-chaos", f"{commit[:12]}-seed-{seed}.jsonl")


def tally(trials: Sequence[Trial], seed: int, machine: dict[str, Any]) -> dict[str, Any]:
    """Count outcomes, commits, and seconds by kind, and list the failures.

    ``machine`` describes the machine of the trials.
    """
    by_kind = {kind: [trial for trial in trials if trial.kind == kind] for kind in FAULTS}
    counts = {
        kind: {"tried": len(found), **{name: sum(t.outcome == name for t in found) for name in Outcome}}
        for kind, found in by_kind.items()
        if found
    }
    total = {key: sum(count[key] for count in counts.values()) for key in ("tried", *Outcome)}
    return {
        "seed": seed,
        "kinds": counts,
        "all": total,
        "training": kills.tally_places([trial for trial in trials if trial.kind == kills.Kills.name]),
        "damage": flips.tally_places([trial for trial in trials if trial.kind in DAMAGE]),
        "commits": {kind: dict(Counter(trial.commit for trial in by_kind[kind]).most_common()) for kind in counts},
        "seconds": {kind: round(sum(trial.seconds for trial in by_kind[kind])) for kind in counts},
        "failures": [trial.to_dict() for trial in trials if trial.outcome in FAILED],
        **machine,
    }


def render(result: dict[str, Any]) -> str:
    """Return the tally as a table in Markdown."""
    head = ("fault", "tried", *Outcome)
    rows = [(kind, *count.values()) for kind, count in (*result["kinds"].items(), ("all", result["all"]))]
    return "\n".join(table(head, rows, numbers=range(1, len(head))))


def parse_kinds(text: str) -> list[str]:
    """Return the kinds of ``--kinds``."""
    kinds = text.split(",")
    if unknown := set(kinds) - set(FAULTS):
        named = ", ".join(sorted(unknown))
        raise argparse.ArgumentTypeError(f"unknown kind {named}; expected {', '.join(FAULTS)}")
    return kinds


def parse_trial(text: str) -> tuple[str, int]:
    """Return the kind and the index of ``--only``."""
    kind, _, index = text.rpartition(":")
    if kind not in FAULTS or not index.isdecimal():
        raise argparse.ArgumentTypeError(
            f'expected KIND:INDEX, such as "{next(iter(FAULTS))}:0", found "{text}"; kinds are {", ".join(FAULTS)}'
        )
    return kind, int(index)


def main() -> None:
    """Play the trials, print the tally, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=count_cores(), help="processes (default: the number of cores)")
    parser.add_argument(
        "--kinds",
        type=parse_kinds,
        default=list(FAULTS),
        help=f"kinds separated by commas (default all): {', '.join(FAULTS)}",
    )
    parser.add_argument("--share", type=float, default=1.0, help="share of the trials of each kind (default 1.0)")
    parser.add_argument("--only", type=parse_trial, metavar="KIND:INDEX", help="play one trial")
    parser.add_argument("--state", type=Path, help="JSONL file of finished trials (default: in the temporary folder)")
    parser.add_argument("--out", type=Path, help="JSON file of the tally (default: print only)")
    options = parser.parse_args()
    machine = describe_machine()
    commit = machine.pop("git_commit") or "unknown"
    if options.only:
        trials, state = [options.only], None
    else:
        numbers = {kind: max(1, round(FAULTS[kind].number * options.share)) for kind in options.kinds}
        trials, state = plan(options.kinds, numbers), options.state or default_state(options.seed, commit)
    done = read_state(state) if state else {}
    found = [done[trial] for trial in trials if trial in done]
    with Progress("chaos", len(trials)) as progress:
        for played in play_all(trials, options.seed, options.jobs, done):
            trial = replace(played, commit=commit)
            found.append(trial)
            if state:
                append_state(state, trial)
            failures = sum(trial.outcome in FAILED for trial in found)
            progress.update(len(found), trial.kind, failures=failures)
    order = {trial: place for place, trial in enumerate(trials)}
    found.sort(key=lambda trial: order[trial.kind, trial.index])
    result = tally(found, options.seed, machine)
    print(render(result))
    for failure in result["failures"]:
        print(f"{failure['kind']}:{failure['index']}: {failure['outcome']}: {failure['message']}")
    if options.only:
        print(json.dumps(found[0].to_dict(), indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if state and not options.state:
        # The next run starts anew.
        state.unlink(missing_ok=True)
    sys.exit(1 if result["failures"] else 0)


if __name__ == "__main__":
    main()
