"""One run of a grid, as every launcher executes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from entrace.analysis.trace import read_manifest
from entrace.analysis.trace.errors import with_kind
from entrace.trainer.config import Config
from entrace.trainer.runs.run_folder import has_begun, mark_failed, run_lock

KILLED = "the process was killed"


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


class ProgressListener(Protocol):
    """Receives the progress of the runs of a grid."""

    def update(self, run_id: str, done: int, **metrics: float) -> None:
        """Note that ``done`` steps of a run are complete; 0 when it starts."""

    def end(self, run_id: str, error: str | None) -> None:
        """Note that a run is complete, or failed with ``error``."""


class Launcher(Protocol):
    """Executes runs, up to ``slots`` at a time once it is connected."""

    slots: int

    def connect(self) -> None:
        """Check that runs can be started; write nothing. Raises InputError."""

    def run(self, jobs: Sequence[Job], listener: ProgressListener) -> None:
        """Execute all runs; an interrupt stops those that are running, which can be resumed."""

    def close(self) -> None:
        """Release what ``connect`` acquired."""


def execute(job: Job, threads: int, report: Callable[..., None]) -> None:
    """Train one run in this process, from its checkpoint if it has one; record a failure in its manifest.

    Args:
        job: The run.
        threads: CPU threads of torch.
        report: Called with the number of finished steps and the metrics of the last.
    """
    report(0)
    import torch

    torch.set_num_threads(threads)
    with run_lock(job.run_dir, waits=True):
        try:
            job.train(job.config, job.run_dir, job.labels, resume=True, on_step=report)
        except Exception as error:
            with suppress(OSError):
                mark_failed(job.config, job.run_dir, job.labels, with_kind(error))


def settle(job: Job, death: str = KILLED) -> str | None:
    """Return the error of a run whose process has ended, or None.

    A run whose manifest still says that it is running is marked failed with ``death``.
    """
    if has_begun(job.run_dir) and (manifest := read_manifest(job.run_dir))["status"] != "running":
        return manifest.get("error")
    # A full disk must not end the other runs.
    with suppress(OSError):
        mark_failed(job.config, job.run_dir, job.labels, death)
    return death
