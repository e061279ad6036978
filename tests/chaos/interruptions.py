"""Stop reports, imports, and prunes at random moments, and repeat them.

The result is compared with that of an undisturbed command.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import polars as pl

from entrace.analysis.trace import read_manifest, write_manifest
from entrace.analysis.trace.parts import PART
from entrace.analysis.trace.staging import is_interrupted
from entrace.analysis.trace.verify import verify_run

from .commands import Ended, Started, draw_few_figures
from .scene import contents, differences, table_of
from .trial import Fault, Outcome, Trial, require
from .verify import equal
from .victim import Board, Watch

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
# Exit codes of a command that a signal ends. Before a command handles SIGTERM, the system ends it.
STOPPED = {signal.SIGINT: {130}, signal.SIGTERM: {143, -signal.SIGTERM}, signal.SIGKILL: {-signal.SIGKILL}}
FLUSH_TOKENS = 300
IMPORTED = ("tokens", "rollouts", "prompts", "vocab", "steps")
SAMPLING = ("--token-steps", "2", "--token-responses", "0.5")


def flush_often() -> None:
    """Make an import durable several times."""
    from entrace.analysis.importers import run

    run.FLUSH_TOKENS = FLUSH_TOKENS


def watch(
    folder: Path, board: Board, kill_at: int | None, is_torn: bool, prepare: Callable[[], None] | None = None
) -> None:
    """Count file-system events below ``folder``.

    The process kills itself at event ``kill_at``, unless it is None.
    """
    if prepare:
        prepare()
    Watch(folder, board, kill_at, is_torn).install()


def stop_at(started: Started, number: int, seconds: float) -> Ended:
    """Stop a command after some seconds, and check how it ended."""
    started.wait(seconds)
    started.stop(number)
    ended = started.end()
    require(ended.code in {0, *STOPPED[signal.Signals(number)]}, f"exit code {ended.code}: {ended.last_line}")
    ended.require_one_line()
    return ended


def interrupt(
    start: Callable[..., Started], number: int | None, rng: np.random.Generator, seconds: float, num_events: int
) -> Ended:
    """Stop a command at a random moment, and check how it ended.

    Args:
        start: Starts the command; called with ``kill_at`` and ``is_torn`` of ``watch``, or without arguments.
        number: Signal that is sent after some time; without one, the command kills itself at a file-system event.
        rng: Draws the moment.
        seconds: Duration of the command if nothing stops it.
        num_events: Number of its file-system events if nothing stops it.
    """
    if number is not None:
        return stop_at(start(), number, rng.random() * seconds)
    ended = start(int(rng.integers(1, num_events + 1)), bool(rng.random() < 0.5)).end()
    require(ended.code in {0, -signal.SIGKILL}, f"exit code {ended.code}: {ended.last_line}")
    return ended


class Reports(Fault):
    """Stop a report, in a new folder or over an earlier one."""

    name = "interrupted report"
    number = 50

    @cached_property
    def _earlier(self) -> dict[str, bytes]:
        """Return an earlier report, of a run with another label."""
        run_dir = shutil.copytree(self.scene.trace, self.scene.folder / "report" / "earlier")
        write_manifest(run_dir, {**read_manifest(run_dir), "arm": "earlier"})
        return contents(self._report(run_dir, self.scene.folder / "report" / "before"))

    def attempt(self, index: int, rng: np.random.Generator) -> Trial:
        """Stop a report, and repeat it."""
        whole, seconds = self.scene.report
        earlier = self._earlier if index % 2 else {}
        number = SIGNALS[index // 2 % len(SIGNALS)]
        with self.scene.place(f"report/{index}") as place:
            out = place / "out"
            if earlier:
                out.mkdir()
                for name, data in earlier.items():
                    (out / name).write_bytes(data)
            ended = stop_at(self._start(self.scene.trace, out), number, rng.random() * seconds)
            left = contents(out)
            if ended.code == 0:
                require(left == whole, f"finished, but {differences(left, whole)} differ", Outcome.SILENT)
                return self.survived(index, "finished before the signal")
            is_marked = is_interrupted(out)
            require(left in (earlier, whole) or is_marked, f"{differences(left, earlier)} changed")
            require(number == signal.SIGKILL or not is_marked, "left files behind although it could remove them")
            again = self._report(self.scene.trace, out)
            require(contents(again) == whole, f"repeated: {differences(contents(again), whole)} differ")
        return self.survived(index, ended.last_line, signal=signal.Signals(number).name)

    def _report(self, run_dir: Path, out: Path) -> Path:
        ended = self._start(run_dir, out).end()
        require(ended.code == 0, f"exit code {ended.code}: {ended.last_line}")
        return out

    def _start(self, run_dir: Path, out: Path) -> Started:
        log = out.with_name(f"{out.name}.txt")
        return self.scene.start("report", run_dir, "--out", out, log=log, prepare=draw_few_figures)


class Imports(Fault):
    """Stop and resume an import."""

    name = "interrupted import"
    number = 70

    @cached_property
    def _whole(self) -> tuple[dict[str, pl.DataFrame], float, int]:
        """Return tables, seconds, and file-system events of an undisturbed import."""
        folder = self.scene.folder / "import" / "whole"
        folder.mkdir(parents=True)
        board = self.scene.board()
        ended = self._start(folder, board).end()
        require(ended.code == 0, ended.last_line)
        tables = {name: table_of(folder / "run", name) for name in IMPORTED}
        require(len(list((folder / "run" / "tokens").iterdir())) > 3, "too few flushes")
        return tables, ended.seconds, board.num_events.value

    def attempt(self, index: int, rng: np.random.Generator) -> Trial:
        """Stop an import, look at what is durable, and resume it."""
        whole, seconds, num_events = self._whole
        with self.scene.place(f"import/{index}") as folder:
            board = self.scene.board()
            number = None if index % 2 else SIGNALS[index // 2 % len(SIGNALS)]
            ended = interrupt(partial(self._start, folder, board), number, rng, seconds, num_events)
            if (folder / "run" / "run.json").exists():
                self._check(folder / "run", whole)
            again = self._start(folder, self.scene.board(), resume=True).end()
            require(again.code == 0, f"resumed: exit code {again.code}: {again.last_line}")
            require(read_manifest(folder / "run")["status"] == "complete", "resumed, but not complete")
            self._check(folder / "run", whole, is_complete=True)
        return self.survived(index, ended.last_line, place=board.place.value.decode())

    def _check(self, run_dir: Path, whole: dict[str, pl.DataFrame], is_complete: bool = False) -> None:
        """Require the rows of the whole import, up to the last durable step."""
        faults = verify_run(run_dir).faults
        require(not faults, "; ".join(map(str, faults)))
        durable = read_manifest(run_dir)["last_durable_step"]
        for name, frame in whole.items():
            found = table_of(run_dir, name)
            if not is_complete and "step" in frame.columns:
                frame = frame.filter(pl.col("step") <= durable)
            if not is_complete and "step" not in frame.columns:
                frame = frame.head(found.height)
            # A table without rows has no columns either.
            is_equal = (found.is_empty() and frame.is_empty()) or equal(found, frame)
            require(is_equal, f"{name}: other rows up to step {durable}", Outcome.SILENT)

    def _start(
        self, folder: Path, board: Board, kill_at: int | None = None, is_torn: bool = False, resume: bool = False
    ) -> Started:
        prepare = partial(watch, folder / "run", board, kill_at, is_torn, flush_often)
        words = ["import", self.scene.dump, "--model", "embedded", "--out", folder / "run"]
        words += ["--resume"] if resume else []
        return self.scene.start(*words, log=folder / "log.txt", prepare=prepare)


class Prunes(Fault):
    """Stop and repeat a prune."""

    name = "interrupted prune"
    number = 140

    @cached_property
    def _whole(self) -> tuple[dict[str, bytes], float, int]:
        """Return files, seconds, and file-system events of an undisturbed prune."""
        folder = self.scene.folder / "prune" / "whole"
        run_dir = shutil.copytree(self.scene.trace, folder / "run")
        board = self.scene.board()
        ended = self._start(run_dir, board).end()
        require(ended.code == 0, ended.last_line)
        return contents(run_dir), ended.seconds, board.num_events.value

    @cached_property
    def _tokens(self) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Return the tokens before and after."""
        return table_of(self.scene.trace, "tokens"), table_of(self.scene.folder / "prune" / "whole" / "run", "tokens")

    def attempt(self, index: int, rng: np.random.Generator) -> Trial:
        """Stop a prune, look at the tokens, and repeat it."""
        whole, seconds, num_events = self._whole
        with self.scene.place(f"prune/{index}") as folder:
            run_dir = shutil.copytree(self.scene.trace, folder / "run")
            board = self.scene.board()
            number = None if index % 3 else SIGNALS[index // 3 % len(SIGNALS)]
            ended = interrupt(partial(self._start, run_dir, board), number, rng, seconds, num_events)
            old, new = self._tokens
            found = table_of(run_dir, "tokens")
            require(equal(found, old) or equal(found, new), "tokens of neither before nor after", Outcome.SILENT)
            faults = verify_run(run_dir).faults
            require(not faults, "; ".join(map(str, faults)))
            by_name = [pl.read_parquet(path) for path in (run_dir / "tokens").iterdir() if PART.fullmatch(path.name)]
            if by_name:
                rows = pl.concat(by_name).select("rollout_id", "position")
                require(not rows.is_duplicated().any(), "a pattern finds a token twice", Outcome.SILENT)
            again = self._start(run_dir, self.scene.board()).end()
            require(again.code == 0, f"repeated: exit code {again.code}: {again.last_line}")
            left = contents(run_dir)
            require(left == whole, f"repeated: {differences(left, whole)} differ")
            require(not list(run_dir.rglob(".*")), "left hidden files behind")
        return self.survived(index, ended.last_line, place=board.place.value.decode())

    def _start(self, run_dir: Path, board: Board, kill_at: int | None = None, is_torn: bool = False) -> Started:
        prepare = partial(watch, run_dir, board, kill_at, is_torn)
        log = run_dir.with_name("log.txt")
        return self.scene.start("prune", run_dir, *SAMPLING, log=log, prepare=prepare)
