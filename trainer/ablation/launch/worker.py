"""Run a job in its own process, with all output in the run's log.

Only the standard library is imported before the output is redirected.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn


def run(pickled: bytes, log: Path, threads: int, pipe: Connection[Any, Any]) -> None:
    """Execute a pickled job, the target of a process.

    Args:
        pickled: The job.
        log: File for the output.
        threads: CPU threads of torch.
        pipe: Receives the number of finished steps and their metrics, or an error that could not be recorded.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _interrupt)

    def report(done: int, **metrics: float) -> None:
        try:
            pipe.send((done, metrics))
        except OSError:
            # The launcher may have been killed; its runs must not continue without it.
            raise KeyboardInterrupt from None

    with output_to(log):
        try:
            from entrace.trainer.ablation.launch.job import describe_error, execute
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")
            return
        try:
            execute(pickle.loads(pickled), threads, report)
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGTERM)
        except Exception as error:
            pipe.send(describe_error(error))


@contextmanager
def output_to(log: Path) -> Iterator[None]:
    """Send the output of this process to a file while the block runs.

    Output of C libraries and child processes is included.
    """
    if isinstance(sys.stdout, TextIOWrapper):
        # A killed process loses what it has not written.
        sys.stdout.reconfigure(line_buffering=True)
    before = os.dup(1), os.dup(2)
    # A run whose folder cannot be written fails with a message of its own.
    with suppress(OSError):
        log.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in enumerate(before, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt
