"""Run a grid: keep finished runs, resume or start others, report failures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrace.analysis.trace import MANIFEST, InputError, read_manifest
from entrace.analysis.trace.places import check_folder
from entrace.trainer.ablation.grid import RunSpec
from entrace.trainer.ablation.launch.job import Job, Launcher, ProgressListener
from entrace.trainer.runs.run_folder import config_changes, extend

CHANGES_SHOWN = 3


@dataclass(frozen=True)
class RunStatus:
    """State of one run in a study folder.

    Attributes:
        status: new, running (that is, interrupted), complete, or failed.
        step: Last durable step.
        error: Error of a failed run.
    """

    status: str = "new"
    step: int = 0
    error: str | None = None

    def is_kept(self, retry_failed: bool) -> bool:
        """Return whether a resumed grid leaves the run unchanged."""
        return self.status == "complete" or (self.status == "failed" and not retry_failed)


class NoListener:
    """A listener that ignores all events."""

    def update(self, run_id: str, done: int, **metrics: float) -> None:
        """Do nothing."""

    def end(self, run_id: str, error: str | None) -> None:
        """Do nothing."""


class Errors:
    """A listener that collects errors and passes all events on.

    Errors of runs whose folder cannot be written are included.
    """

    def __init__(self, listener: ProgressListener) -> None:
        """Start without errors."""
        self.found: dict[str, str] = {}
        self._listener = listener
        self.update = listener.update

    def end(self, run_id: str, error: str | None) -> None:
        """Note the error of a run."""
        if error:
            self.found[run_id] = error
        self._listener.end(run_id, error)


def survey(specs: Sequence[RunSpec], out: Path) -> dict[str, RunStatus]:
    """Return the state of every run of a grid in the folder ``out``, by run id.

    Raises:
        InputError: the folder holds a run of another grid: an unknown run, or one with another configuration.
    """
    known = {spec.run_id: spec for spec in specs}
    statuses = dict.fromkeys(known, RunStatus())
    for path in sorted(out.glob(f"*/{MANIFEST}")):
        run_id, manifest = path.parent.name, read_manifest(path.parent)
        if run_id not in known:
            place = f'arm "{manifest.get("arm")}", seed {manifest.get("seed")}'
            raise InputError(f"{out}: made from another grid: it holds {run_id} ({place}), this grid does not")
        there, is_extended = extend(manifest["config"], known[run_id].config, path.parent)
        if changes := _differences({**manifest, "config": there}, known[run_id]):
            more = f" and {len(changes) - CHANGES_SHOWN} more" if len(changes) > CHANGES_SHOWN else ""
            shown = ", ".join(changes[:CHANGES_SHOWN])
            raise InputError(f"{out}: made from another grid: of {run_id}, {shown}{more}")
        # A complete run that gets more steps counts as interrupted.
        status = "running" if is_extended and manifest["status"] == "complete" else manifest["status"]
        statuses[run_id] = RunStatus(status, manifest["last_durable_step"], manifest.get("error"))
    return statuses


def _differences(manifest: dict[str, Any], spec: RunSpec) -> list[str]:
    changes = list(config_changes(manifest["config"], spec.config))
    labels = {"arm": spec.arm, "baseline": spec.baseline}
    return changes + [
        f'{key} is "{manifest[key]}" there, "{value}" here'
        for key, value in labels.items()
        if manifest.get(key, value) != value
    ]


def run_grid(
    specs: Sequence[RunSpec],
    out: Path,
    launcher: Launcher,
    train: Callable[..., None],
    *,
    resume: bool = False,
    retry_failed: bool = False,
    listener: ProgressListener | None = None,
) -> dict[str, str]:
    """Execute every run of a grid, each in its own folder under ``out``.

    Args:
        specs: The runs.
        out: Folder of the study.
        launcher: Starts the processes.
        train: The training loop; see ``Job``.
        resume: Keep complete and failed runs, and resume interrupted ones from their checkpoints.
        retry_failed: As ``resume``, and resume failed runs too.
        listener: Receives the progress of the runs.

    Returns:
        Error of each failed run by run id, failures of earlier calls included.

    Raises:
        InputError: ``out`` is a file, holds files although neither flag is set, or was made from another grid; or the
            launcher cannot start runs. Nothing has been written then.
    """
    errors = Errors(listener or NoListener())
    check_folder(out)
    if not (resume or retry_failed) and out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: already holds files; choose another folder, or resume with --resume")
    statuses = survey(specs, out)
    jobs = [
        Job(spec.config, out.resolve() / spec.run_id, spec.labels(out), train)
        for spec in specs
        if not statuses[spec.run_id].is_kept(retry_failed)
    ]
    try:
        if jobs:
            launcher.connect()
        for run_id, status in statuses.items():
            if status.is_kept(retry_failed):
                errors.end(run_id, status.error)
        if jobs:
            launcher.run(jobs, errors)
    finally:
        launcher.close()
    return {run_id: errors.found[run_id] for run_id in statuses if run_id in errors.found}
