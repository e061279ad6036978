"""Runs a grid: what is there is kept, what is missing is carried out, failures stay in the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrace.analysis.trace import MANIFEST, InputError, read_manifest
from entrace.trainer.ablation.grid import RunSpec
from entrace.trainer.ablation.launch.job import Job, Launcher, ProgressListener
from entrace.trainer.runs.run_folder import config_changes, extend

CHANGES_SHOWN = 3


@dataclass(frozen=True)
class RunStatus:
    """What a study folder holds of one run; ``status`` is new, running (which is: interrupted), complete or failed."""

    status: str = "new"
    step: int = 0
    error: str | None = None

    def is_kept(self, retry_failed: bool) -> bool:
        """Whether a grid that is gone on with leaves the run as it is."""
        return self.status == "complete" or (self.status == "failed" and not retry_failed)


class NoListener:
    """A watcher that shows nothing."""

    def update(self, run_id: str, done: int, **figures: float) -> None:
        """Nothing."""

    def end(self, run_id: str, error: str | None) -> None:
        """Nothing."""


def survey(specs: Sequence[RunSpec], out: Path) -> dict[str, RunStatus]:
    """What ``out`` holds of every run of a grid.

    Raises:
        InputError: it holds a run that is not of this grid: an unknown one, or one with another configuration.
    """
    known = {spec.run_id: spec for spec in specs}
    found = dict.fromkeys(known, RunStatus())
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
        # A complete run to be extended counts as interrupted.
        status = "running" if is_extended and manifest["status"] == "complete" else manifest["status"]
        found[run_id] = RunStatus(status, manifest["last_durable_step"], manifest.get("error"))
    return found


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
    *,
    resume: bool = False,
    retry_failed: bool = False,
    watcher: ProgressListener | None = None,
) -> dict[str, str]:
    """Carries out every run of a grid, each in a folder of its own under ``out``.

    Args:
        specs: The runs.
        out: Folder of the study.
        launcher: Where they are carried out.
        resume: Keep complete and failed runs, go on with interrupted ones from their checkpoints.
        retry_failed: As ``resume``, and go on with failed runs too.
        watcher: Told how they get on.

    Returns:
        Error of each failed run, by run id, those of earlier calls included.

    Raises:
        InputError: ``out`` already holds files and shall not be gone on with, or was made from another grid, or the
            launcher cannot start runs; nothing has been written then.
    """
    watcher = watcher or NoListener()
    if not (resume or retry_failed) and out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: already holds files; choose another folder, or continue with --resume")
    found = survey(specs, out)
    works = [
        Job(spec.config, out.resolve() / spec.run_id, spec.labels(out))
        for spec in specs
        if not found[spec.run_id].is_kept(retry_failed)
    ]
    try:
        if works:
            launcher.connect()
        for run_id, state in found.items():
            if state.is_kept(retry_failed):
                watcher.end(run_id, state.error)
        if works:
            launcher.run(works, watcher)
    finally:
        launcher.close()
    return {run_id: state.error for run_id, state in survey(specs, out).items() if state.error}
