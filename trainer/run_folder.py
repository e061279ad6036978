"""What ``run.json`` says of a run of this trainer, and what it tells of one made before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from analysis.trace import InputError, describe_machine, read_manifest, write_manifest
from analysis.trace.manifest import MANIFEST, now
from analysis.trace.schema import SCHEMA_VERSION
from trainer.config import Config


def describe_run(config: Config, run_dir: Path, labels: Mapping[str, str]) -> dict[str, Any]:
    """Manifest of a run about to start: identity, configuration in full, and the machine."""
    return {
        "run_id": run_dir.name,
        **labels,
        "seed": config.seed,
        "config": config.model_dump(mode="json"),
        "model": config.policy.path,
        "task": config.task.name,
        "total_steps": config.steps,
        **describe_machine(),
    }


def write_failure(config: Config, run_dir: Path, labels: Mapping[str, str], error: str) -> None:
    """Leaves a manifest for a run that failed before it could write its own."""
    run_dir.mkdir(parents=True, exist_ok=True)
    state = {"schema_version": SCHEMA_VERSION, "status": "failed", "last_durable_step": 0, "finished_at": now()}
    write_manifest(run_dir, {**describe_run(config, run_dir, labels), **state, "error": error})


def is_complete(config: Config, run_dir: Path) -> bool:
    """Whether a run that shall be resumed is done already; False where none has begun.

    Raises:
        InputError: the folder is no trace, or was made with another configuration.
    """
    if not run_dir.exists() or not any(run_dir.iterdir()):
        return False
    manifest = read_manifest(run_dir)
    found, wanted = manifest["config"], config.model_dump(mode="json")
    if found != wanted:
        changed = sorted(section for section in wanted if found.get(section) != wanted[section])
        raise InputError(f"{run_dir}: made with another configuration, differs in {', '.join(changed)}; not resumed")
    return manifest["status"] == "complete"


def error_of(run_dir: Path) -> str | None:
    """Error of a run whose process has ended; one that died without a word is marked failed here."""
    manifest = read_manifest(run_dir)
    if manifest["status"] == "running":
        manifest |= {"status": "failed", "error": "the process was killed", "finished_at": now()}
        write_manifest(run_dir, manifest)
    return manifest.get("error")


def has_begun(run_dir: Path) -> bool:
    """Whether the folder holds a manifest."""
    return (run_dir / MANIFEST).exists()
