"""Run ``entrace`` commands in processes that can be stopped at any moment."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from .trial import require

# A command of a trial takes seconds; a longer one hangs.
TIMEOUT_S = 120.0
POLL_S = 0.001
# Modules that a server imports once for all processes.
PRELOAD = ["entrace.trainer.train", "entrace.trainer.cli", "reasoning_gym", "tests.chaos.preload"]
STEMS = ["stage_dynamics"]


class Ended(NamedTuple):
    """Describe how a command ended.

    The exit code is negative for a signal. Lines are those on stderr, and the peak is in MiB.
    """

    code: int
    lines: list[str]
    seconds: float
    peak_mib: float

    @property
    def last_line(self) -> str:
        """Return the last line, which names the error."""
        return self.lines[-1] if self.lines else ""

    def require_one_line(self) -> None:
        """Require that an error is one line, and not a traceback."""
        found = next((number for number, line in enumerate(self.lines) if "Traceback" in line), None)
        # The line before says where an exception was ignored.
        require(found is None, f"a traceback: {' | '.join(self.lines[max(0, (found or 0) - 1) :])}")
        errors = [line for line in self.lines if line.startswith("entrace: ")]
        require(self.code <= 0 or self.last_line in errors, f"exit code {self.code} without a line: {self.last_line}")


def begin(process: BaseProcess, has_begun: Callable[[], object]) -> float:
    """Start a process, wait until its work has begun, and return the time.

    The wait also ends with the process.
    """
    process.start()
    while not has_begun() and process.is_alive():
        time.sleep(POLL_S)
    return time.perf_counter()


class Started:
    """Control a running command."""

    def __init__(
        self,
        context: ForkServerContext,
        *arguments: Any,
        log: Path,
        out: Path | None = None,
        prepare: Callable[[], None] | None = None,
        finish: Callable[[], None] | None = None,
    ) -> None:
        """Start a command as a fork of a server that has imported everything.

        Args:
            context: Context of the server.
            arguments: Words after ``entrace``.
            log: File for stderr, and for stdout without ``out``.
            out: File, pipe, or device for stdout.
            prepare: Called in the process before the command; must be picklable.
            finish: Called in the process after the command; must be picklable.
        """
        self.log = log
        self._board = context.RawArray("d", 2)
        words = [str(argument) for argument in arguments]
        self._process = context.Process(target=_run, args=(words, log, self._board, out, prepare, finish))
        self._started = begin(self._process, lambda: self._board[0])

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end, at most ``timeout`` s; return whether the command ended."""
        self._process.join(timeout)
        return not self._process.is_alive()

    def stop(self, number: int) -> None:
        """Send a signal, unless the command has ended."""
        if self._process.is_alive() and self._process.pid:
            os.kill(self._process.pid, number)

    def end(self) -> Ended:
        """Wait for the end and return it.

        Raises:
            UnexpectedError: the command hangs.
        """
        ended = self.wait(TIMEOUT_S)
        seconds = time.perf_counter() - self._started
        self._process.kill()
        self._process.join()
        require(ended, f"hangs: no end after {TIMEOUT_S:g} s")
        lines = self.log.read_text(errors="replace").splitlines()
        return Ended(self._process.exitcode or 0, lines, seconds, self._board[1])


def draw_few_figures() -> None:
    """Limit a report to one figure, which takes seconds."""
    from entrace.analysis import figures

    figures.STEMS = STEMS


def _run(
    words: list[str],
    log: Path,
    board: Any,
    out: Path | None,
    prepare: Callable[[], None] | None,
    finish: Callable[[], None] | None,
) -> None:
    """Run a command line; the process target."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    os.dup2(os.open(log, flags), 2)
    os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT) if out else 2, 1)
    # The objects of the server remember whether its own files could be seeked in.
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
    import torch

    from entrace.trainer import cli

    torch.set_num_threads(1)
    if prepare:
        prepare()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["entrace", *words]
    # A fork begins with the peak of its parent.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    board[0] = 1
    try:
        cli.main()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if finish:
            finish()
        board[1] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
