"""One run of a grid, as every launcher executes it."""

from __future__ import annotations

import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from entrace.analysis.trace import read_manifest
from entrace.analysis.trace.errors import describe_fault, with_kind
from entrace.analysis.trace.plain import plain
from entrace.trainer.config import Config
from entrace.trainer.runs.run_folder import has_begun, mark_failed, run_lock

# Folder of the output of runs, beside the runs.
LOGS = ".logs"
# Lines of output that a failure quotes, and the longest line, in characters.
LINES_QUOTED, LINE_LENGTH = 3, 200


@dataclass(frozen=True)
class Job:
    """A run to start or resume.

    Attributes:
        config: The run.
        run_dir: Its folder, absolute and the same on every machine.
        labels: Its place in the study, for the manifest.
        train: The training loop, with the signature of ``train.train``; other processes import it by name.
    """

    config: Config
    run_dir: Path
    labels: dict[str, Any]
    train: Callable[..., None]

    @property
    def run_id(self) -> str:
        """Return the name of the run's folder."""
        return self.run_dir.name

    @property
    def log(self) -> Path:
        """Return the file of what its process prints."""
        return self.run_dir.parent / LOGS / f"{self.run_id}.log"


class ProgressListener(Protocol):
    """Receive the progress of the runs of a grid."""

    def update(self, run_id: str, done: int, **metrics: float) -> None:
        """Note that ``done`` steps of a run are complete; 0 when it starts."""

    def end(self, run_id: str, error: str | None) -> None:
        """Note that a run is complete, or failed with ``error``."""


class Launcher(Protocol):
    """Execute runs, up to ``slots`` at a time once connected."""

    slots: int

    def connect(self) -> None:
        """Check that runs can be started; write nothing. Raises InputError."""

    def run(self, jobs: Sequence[Job], listener: ProgressListener) -> None:
        """Execute all runs.

        An interrupt stops runs in progress, which can be resumed.
        """

    def close(self) -> None:
        """Release what ``connect`` acquired."""


def execute(job: Job, threads: int, report: Callable[..., None]) -> None:
    """Train one run in this process, from its checkpoint if it has one.

    A failure is recorded in the run's manifest.

    Args:
        job: The run.
        threads: CPU threads of torch.
        report: Called with the number of finished steps and the metrics of the last.
    """
    report(0)
    with ExitStack() as stack:
        try:
            stack.enter_context(run_lock(job.run_dir, waits=True))
            import torch

            torch.set_num_threads(threads)
            job.train(job.config, job.run_dir, job.labels, resume=True, on_step=report)
        except Exception as error:
            try:
                mark_failed(job.config, job.run_dir, job.labels, describe_error(error))
            except OSError:
                raise error from None


def describe_error(error: BaseException) -> str:
    """Return an error in one line, as a manifest records it."""
    return describe_fault(error) or with_kind(error)


class Output:
    """Show what the process of a run prints on stderr, and quote the end of it."""

    def __init__(self, job: Job) -> None:
        """Remove the output of an earlier attempt."""
        self._job, self._read = job, 0
        self._last: deque[str] = deque(maxlen=LINES_QUOTED)
        with suppress(OSError):
            job.log.unlink(missing_ok=True)

    def show(self, *, is_final: bool = False) -> None:
        """Print the lines that are new since the last call.

        An unfinished line waits unless ``is_final``.
        """
        try:
            with open(self._job.log, "rb") as file:
                # A run that Ray retries starts its file again.
                self._read = self._read if os.fstat(file.fileno()).st_size >= self._read else 0
                file.seek(self._read)
                text = file.read()
        except OSError:
            return
        text = text if is_final else text[: text.rfind(b"\n") + 1]
        self._read += len(text)
        for line in text.decode(errors="replace").splitlines():
            if line.strip():
                self._last.append(plain(line.strip(), LINE_LENGTH))
                print(f"{self._job.run_id}: {plain(line)}", file=sys.stderr, flush=True)

    def quote(self) -> str:
        """Return the last lines, as a suffix to the reason why the process ended."""
        self.show(is_final=True)
        return f"; its last output: {' | '.join(self._last)}" if self._last else ""


def describe_exit(code: int) -> str:
    """Describe how a process ended, from its ``multiprocessing`` exit code.

    Negative codes are signals.
    """
    number = -code if code < 0 else code - 128
    name = signal.Signals(number).name if number in set(signal.Signals) else ""
    if code >= 0:
        return f"the process ended with exit code {code}{f' ({name})' if name else ''}"
    reason = ", often for lack of memory" if number == signal.SIGKILL else ""
    return f"the process was killed by signal {number}{f' ({name})' if name else ''}{reason}"


def settle(job: Job, death: str) -> str | None:
    """Return the error of a run whose process has ended, or None.

    A run whose manifest still says that it is running is marked failed with ``death``.
    """
    if has_begun(job.run_dir) and (manifest := read_manifest(job.run_dir))["status"] != "running":
        return manifest.get("error")
    # A full disk must not end the other runs.
    with suppress(OSError):
        mark_failed(job.config, job.run_dir, job.labels, death)
    return death
