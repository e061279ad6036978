"""One run of a grid, as every launcher carries it out."""

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
    """A run to be carried out, new or begun; ``run_dir`` is absolute and the same on every machine."""

    config: Config
    run_dir: Path
    labels: dict[str, Any]

    @property
    def run_id(self) -> str:
        """Name of the run's folder."""
        return self.run_dir.name


class ProgressListener(Protocol):
    """Who is told how the runs of a grid get on."""

    def update(self, run_id: str, done: int, **figures: float) -> None:
        """``done`` steps of the run are complete, 0 as it starts."""

    def end(self, run_id: str, error: str | None) -> None:
        """The run is complete, or failed with ``error``."""


class Launcher(Protocol):
    """Carries out runs, as many as ``slots`` at a time once it is connected."""

    slots: int

    def connect(self) -> None:
        """Makes sure that runs can be started; writes nothing. Raises InputError."""

    def run(self, works: Sequence[Job], watcher: ProgressListener) -> None:
        """Carries out all runs; interrupted, it stops those that are running, and they can be gone on with."""

    def close(self) -> None:
        """Lets go of what ``connect`` took."""


def carry_out(work: Job, threads: int, report: Callable[..., None]) -> None:
    """Trains one run in this process, from its checkpoint if it has one; a failure is left in its manifest."""
    report(0)
    import torch

    from entrace.trainer.train import train

    torch.set_num_threads(threads)
    with run_lock(work.run_dir, waits=True):
        try:
            train(work.config, work.run_dir, work.labels, resume=True, on_step=report)
        except Exception as error:
            with suppress(OSError):
                mark_failed(work.config, work.run_dir, work.labels, with_kind(error))


def settle(work: Job, death: str = KILLED) -> str | None:
    """Error of a run whose process has ended; one that ended without a word is marked failed with ``death``."""
    if has_begun(work.run_dir) and (manifest := read_manifest(work.run_dir))["status"] != "running":
        return manifest.get("error")
    # A full disk ends the run that meets it, not the others.
    with suppress(OSError):
        mark_failed(work.config, work.run_dir, work.labels, death)
    return death
