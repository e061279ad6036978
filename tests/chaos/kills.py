"""Kill small training runs at random moments, and resume them.

A case is a run that is killed up to three times in a row: at a file-system event, by itself, or after some time, from
outside. After each kill the trace must open and hold exactly the steps up to the last durable one. Resumed to its end,
the run must equal an uninterrupted one in every row, weight, and state of the optimizer.
"""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .commands import PRELOAD, begin
from .trial import Fault, Outcome, Trial
from .verify import Reference
from .victim import Board, run

# Of cases that are killed once, twice, three times.
SHARES = (0.3, 0.35, 0.35)
# A resumed run reaches its first step after about this share of the events of a whole one.
RESUMING = 0.15


@dataclass(frozen=True)
class Moment:
    """Say when to kill.

    Attributes:
        at: Share of the events, or of the time, of an uninterrupted run that come before.
        by_event: At a file-system event; else after some time.
        is_torn: A write is killed after half of it, not before it.
    """

    at: float
    by_event: bool
    is_torn: bool


@dataclass
class Kill:
    """Record where a run was killed, and what is wrong with the trace that it left."""

    place: str
    moment: Moment
    defects: list[str]


@dataclass
class Case:
    """Record the kills of one run; ``defects`` are those at its end."""

    index: int
    kills: list[Kill] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)

    def failures(self) -> Iterator[str]:
        """Yield everything that is wrong, in words."""
        for kill in self.kills:
            yield from (f"case {self.index}, killed in {kill.place}: {defect}" for defect in kill.defects)
        places = " and ".join(kill.place for kill in self.kills) or "no place"
        yield from (f"case {self.index}, killed in {places}, then resumed: {defect}" for defect in self.defects)


def draw_moments(seed: int, index: int) -> list[Moment]:
    """Draw the moments of a case.

    The first is at any time, the others during a resume or soon after.
    """
    rng = np.random.default_rng([seed, index])
    num_kills = 1 + int(rng.choice(len(SHARES), p=SHARES))
    return [
        Moment(
            at=float(rng.random() * (RESUMING if number else 1)),
            by_event=bool(rng.random() < 0.6),
            is_torn=bool(rng.random() < 0.5),
        )
        for number in range(num_kills)
    ]


class Ending(NamedTuple):
    """Describe how a victim ended: killed, with an error, or neither.

    The description also has place, number of events, and seconds.
    """

    is_killed: bool
    error: str | None
    place: str
    num_events: int
    seconds: float


class Harness:
    """Run victims below a folder, and compare them with a run that is left alone."""

    def __init__(self, folder: Path) -> None:
        """Make the reference, whose seconds and events are the measure of moments."""
        # Imports cost seconds: a server pays them once and forks a process a victim.
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)
        self.folder = folder
        run_dir = folder / "reference" / "run"
        self.whole = self.run(run_dir)
        if self.whole.error:
            raise RuntimeError(f"the run that was left alone: {self.whole.error}")
        self.reference = Reference(run_dir)

    def play(self, seed: int, index: int) -> Case:
        """Kill a run at the moments of a case, and resume it to its end."""
        case = Case(index)
        run_dir = self.folder / f"case-{index}" / "run"
        for moment in draw_moments(seed, index):
            if moment.by_event:
                ending = self.run(run_dir, 1 + int(moment.at * self.whole.num_events), moment.is_torn)
            else:
                ending = self.run(run_dir, timeout=moment.at * self.whole.seconds)
            if not ending.is_killed:
                break
            case.kills.append(Kill(ending.place, moment, collect(self._look, run_dir)))
        error = self.run(run_dir).error
        case.defects = [error] if error else collect(self.reference.final_defects, run_dir)
        shutil.rmtree(run_dir.parent)
        return case

    def _look(self, run_dir: Path) -> Iterable[str]:
        # Before its first manifest a run is no trace.
        return self.reference.defects(run_dir) if (run_dir / "run.json").exists() else ()

    def run(
        self,
        run_dir: Path,
        kill_at: int | None = None,
        is_torn: bool = False,
        timeout: float | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> Ending:
        """Resume a run until it ends or is killed.

        The run kills itself at event ``kill_at``, and is killed after ``timeout`` seconds. Neither happens if None.
        """
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        log, board = run_dir.parent / "log.txt", Board.of(self.context)
        process = self.context.Process(target=run, args=(run_dir, log, board, kill_at, is_torn, prepare), daemon=True)
        started = begin(process, lambda: board.place.value)
        process.join(timeout)
        process.kill()
        process.join()
        seconds, place = time.perf_counter() - started, board.place.value.decode()
        is_killed = process.exitcode == -signal.SIGKILL
        error = None
        if process.exitcode and not is_killed:
            lines = log.read_text().splitlines() or ["nothing said"]
            error = f"exit code {process.exitcode} in {place}: {lines[-1]}"
        return Ending(is_killed, error, place, board.num_events.value, seconds)


def collect(look: Callable[[Path], Iterable[str]], run_dir: Path) -> list[str]:
    """Return the defects that ``look`` finds; an error counts as one."""
    try:
        return list(look(run_dir))
    except Exception as error:  # a reader that cannot cope is a finding
        return [f"does not open: {type(error).__name__}: {error}"]


def play_cases(harness: Harness, seed: int, num_kills: int) -> list[Case]:
    """Play cases in order until so many kills came about."""
    cases: list[Case] = []
    while sum(len(case.kills) for case in cases) < num_kills:
        cases.append(harness.play(seed, len(cases)))
    return cases


class Kills(Fault):
    """Kill and resume a training run; a trial is a case."""

    name = "killed training"
    number = 50

    def attempt(self, index: int, rng: np.random.Generator) -> Trial:
        """Play a case."""
        case = self.scene.harness.play(self.scene.seed, index)
        places = [[kill.place, "event" if kill.moment.by_event else "time"] for kill in case.kills]
        if failures := list(case.failures()):
            return Trial(self.name, index, Outcome.LOST, "; ".join(failures), {"kills": places})
        return self.survived(index, kills=places)


def tally_places(trials: Sequence[Trial]) -> dict[str, Any]:
    """Count the kills of trials, in all, and by place."""
    kills = [tuple(kill) for trial in trials for kill in trial.detail.get("kills", ())]
    places = Counter(place for place, _ in kills)
    return {
        "kills": len(kills),
        "by_event": sum(how == "event" for _, how in kills),
        "of_resumed_runs": sum(len(trial.detail["kills"][1:]) for trial in trials if "kills" in trial.detail),
        "places": dict(sorted(places.items())),
    }
