"""Launch runs as processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Sequence
from multiprocessing.connection import wait
from typing import Any

from entrace.analysis.trace.manifest import count_cores
from entrace.trainer.ablation.launch.job import Job, Output, ProgressListener, describe_exit, settle
from entrace.trainer.ablation.launch.worker import run
from entrace.trainer.config import Config
from entrace.trainer.resources import EMBEDDED

GRACE_S = 10.0


class LocalLauncher:
    """Run up to ``jobs`` processes at a time."""

    def __init__(self, jobs: int = 1, threads: int | None = None) -> None:
        """Store the number of concurrent runs and the CPU threads per run.

        The default number of threads is that of ``threads_of``.
        """
        self.slots, self._threads = jobs, threads

    def connect(self) -> None:
        """Do nothing: processes need no connection."""

    def close(self) -> None:
        """Do nothing: nothing was acquired."""

    def threads_of(self, config: Config) -> int:
        """Return the CPU threads of a run.

        The embedded policy gets one thread, other policies an equal share of the cores. The order in which floats are
        added depends on the number of threads. The embedded policy is too small to gain from a second one, so its runs
        do not depend on ``jobs`` or on the number of cores.
        """
        if self._threads:
            return self._threads
        return 1 if config.policy.path == EMBEDDED else max(1, count_cores() // self.slots)

    def run(self, jobs: Sequence[Job], listener: ProgressListener) -> None:
        """Execute all runs in order."""
        context = _start_server(jobs)
        waiting = list(jobs)
        # One pipe per process: a process killed while writing to a shared queue would block the others.
        running: dict[Any, tuple[Job, Any, Output]] = {}
        errors: dict[str, str] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self.slots:
                    job = waiting.pop(0)
                    output = Output(job)
                    ours, theirs = context.Pipe(duplex=False)
                    arguments = (pickle.dumps(job), job.log, self.threads_of(job.config), theirs)
                    process = context.Process(target=run, args=arguments, daemon=True)
                    process.start()
                    theirs.close()
                    running[ours] = job, process, output
                ready: list[Any] = wait(list(running))
                for pipe in ready:
                    job, process, output = running[pipe]
                    output.show()
                    try:
                        message = pipe.recv()
                    except (EOFError, OSError):
                        process.join()
                        del running[pipe]
                        ending = describe_exit(process.exitcode) + output.quote()
                        listener.end(job.run_id, settle(job, errors.get(job.run_id, ending)))
                    else:
                        if isinstance(message, str):
                            errors[job.run_id] = message
                        else:
                            done, metrics = message
                            listener.update(job.run_id, done, **metrics)
        finally:
            _stop([process for _, process, _ in running.values()])


def _start_server(jobs: Sequence[Job]) -> Any:
    """Return a multiprocessing context that forks one process per run.

    Its server imports once what every run would import.
    """
    if not hasattr(os, "fork"):
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    # The trainer imports the other two on first use: pyarrow needs pandas for its first array.
    sources = (source for job in jobs for source in job.config.task.sources.values())
    libraries = ["pandas"] if all(source.is_file for source in sources) else ["pandas", "reasoning_gym"]
    context.set_forkserver_preload(["entrace.trainer.train", *libraries])
    # Ctrl-C reaches the whole process group. The server and its children ignore it; the launcher stops the runs.
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
