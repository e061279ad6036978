"""Runs as processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

from entrace.analysis.trace.manifest import count_cores
from entrace.trainer.ablation.launch.job import Job, ProgressListener, carry_out, settle

GRACE_S = 10.0


class LocalLauncher:
    """``jobs`` processes at a time, each with an equal share of the cores."""

    def __init__(self, jobs: int = 1) -> None:
        """Starts nothing yet."""
        self.slots = jobs

    def connect(self) -> None:
        """Nothing to connect to."""

    def close(self) -> None:
        """Nothing to let go of."""

    def run(self, works: Sequence[Job], watcher: ProgressListener) -> None:
        """Carries out all runs in order."""
        context = _start_server()
        threads = max(1, count_cores() // self.slots)
        waiting = list(works)
        # A pipe for each: a process killed while it writes to a shared queue would leave the others waiting.
        running: dict[Any, tuple[Job, Any]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self.slots:
                    work = waiting.pop(0)
                    ours, theirs = context.Pipe(duplex=False)
                    process = context.Process(target=_run, args=(work, threads, theirs), daemon=True)
                    process.start()
                    theirs.close()
                    running[ours] = work, process
                ready: list[Any] = wait(list(running))
                for pipe in ready:
                    work, process = running[pipe]
                    try:
                        done, figures = pipe.recv()
                    except (EOFError, OSError):
                        process.join()
                        del running[pipe]
                        watcher.end(work.run_id, settle(work))
                    else:
                        watcher.update(work.run_id, done, **figures)
        finally:
            _stop([process for _, process in running.values()])


def _start_server() -> Any:
    """A multiprocessing context. Imports cost seconds: a server pays them once and forks a fresh process a run."""
    if not hasattr(os, "fork"):
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["entrace.trainer.train"])
    # Ctrl-C reaches the whole group. The server and all that it forks inherit that they ignore it: who waits for the
    # runs stops them.
    if threading.current_thread() is threading.main_thread():
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            forkserver.ensure_running()
        finally:
            signal.signal(signal.SIGINT, handler)
    return context


def _stop(processes: Sequence[Any]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(GRACE_S)
        if process.is_alive():
            process.kill()
            process.join()


def _run(work: Job, threads: int, pipe: Connection[Any, Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _interrupt)

    def report(done: int, **figures: float) -> None:
        try:
            pipe.send((done, figures))
        except OSError:
            # Whoever started the grid may have been killed; its runs must not go on unseen.
            raise KeyboardInterrupt from None

    with suppress(KeyboardInterrupt):
        carry_out(work, threads, report)


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt
