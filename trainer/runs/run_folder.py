"""Write and check the manifest ``run.json`` of a run, and lock the run's folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache, reduce
from pathlib import Path
from typing import Any

from entrace.analysis.trace import InputError, describe_machine, flatten, read_manifest, write_manifest
from entrace.analysis.trace.digests import DIGEST_LENGTH, hash_file
from entrace.analysis.trace.lock import locked
from entrace.analysis.trace.manifest import MANIFEST, is_before_manifest, now
from entrace.analysis.trace.parts import FILES, last_whole_step, listed_files
from entrace.analysis.trace.schema import SCHEMA_VERSION
from entrace.trainer.config import CHANGEABLE_KEYS, Config, build_config
from entrace.trainer.parallel.ranks import ALONE, Ranks
from entrace.trainer.resources import find_model
from entrace.trainer.settings import merge, nest

WEIGHTS = "*.safetensors"
# Increased whenever equal seeds draw other prompts than before, so that such runs are never paired.
STREAMS = 2
FIRST_TASK_KEYS = {"name", "params", "num_heldout"}


def describe_run(config: Config, run_dir: Path, labels: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest of a new run: identity, full configuration, and machine."""
    common = {} if "common_random_numbers" in labels else {"common_random_numbers": common_random_numbers(config)}
    return {
        "run_id": run_dir.name,
        **labels,
        **common,
        "seed": config.seed,
        "config": config.model_dump(mode="json"),
        "model": config.policy.path,
        "task": " + ".join(config.task.sources),
        "total_steps": config.steps,
        **config.record.token_sampling.entry(),
        **describe_machine(),
    }


def common_random_numbers(config: Config) -> dict[str, str | None]:
    """Return fingerprints of what two runs share if the fingerprints are equal.

    Returns:
        ``base_policy``: of the model's weights; None if the model does not exist. ``prompts``: of everything that
        determines the prompts of both splits and their order, file contents included. ``evaluation``: of everything
        that determines the held-out prompts and the random numbers of their samples.
    """
    policy, rollout = config.policy, config.rollout
    # A key that is newer than a run must not change the run's fingerprint unless it is set.
    task = config.task.model_dump(mode="json", include=FIRST_TASK_KEYS)
    task |= config.task.model_dump(mode="json", exclude_defaults=True)
    if files := {path: hash_file(Path(path)) for source in config.task.sources.values() for path in source.files}:
        task["files"] = files
    prompts = {"seed": config.seed, "streams": STREAMS, **task}
    sampling = config.eval.model_dump(mode="json", exclude={"every"})
    # The shape in which random numbers are drawn: prompts per batch, and the length limit.
    shape = [rollout.prompts_per_step, rollout.max_response_tokens]
    return {
        "base_policy": hash_weights(policy.path),
        "prompts": _hash_json(prompts),
        "evaluation": _hash_json([prompts, sampling, shape]),
    }


def mark_failed(config: Config, run_dir: Path, labels: Mapping[str, Any], error: str) -> None:
    """Mark a run as failed in its manifest; write a manifest if the run has none."""
    if has_begun(run_dir):
        manifest = read_manifest(run_dir)
    else:
        run_dir.mkdir(parents=True, exist_ok=True)
        manifest = {"schema_version": SCHEMA_VERSION, "last_durable_step": 0, **describe_run(config, run_dir, labels)}
    write_manifest(run_dir, {**manifest, "status": "failed", "finished_at": now(), "error": error})


def is_complete(config: Config, run_dir: Path) -> bool:
    """Return whether a run to resume is already complete; False if it has not begun.

    A run can be extended to more steps if its learning rate does not depend on their number. A run with a damaged file
    is not complete, so that it can go back to the checkpoint before the damage.

    Raises:
        InputError: the folder is not a trace, or was made with another configuration.
    """
    if not run_dir.exists() or is_before_manifest(run_dir):
        return False
    manifest = read_manifest(run_dir)
    # A run that ran out of memory can resume with less, and any run with other dashboards.
    wanted = flatten(config.model_dump(mode="json"))
    free = reduce(merge, (nest(key, wanted[key]) for key in CHANGEABLE_KEYS), manifest["config"])
    free, is_extended = extend(free, config, run_dir)
    if changed := list(config_changes(free, config)):
        raise InputError(f"{run_dir}: made with another configuration, {', '.join(changed)}; not resumed")
    if manifest["status"] != "complete" or is_extended:
        return False
    # A table without a folder was removed on purpose.
    there = {table: files for table, files in listed_files(run_dir, manifest).items() if (run_dir / table).exists()}
    _, damage = last_whole_step(run_dir, {**manifest, FILES: there})
    return damage is None


def extend(found: Mapping[str, Any], config: Config, run_dir: Path) -> tuple[Mapping[str, Any], bool]:
    """Return a run's configuration, extended to ``config.steps`` if these are more.

    Also return whether it was extended.

    Raises:
        InputError: more steps would change the learning rates of finished steps.
    """
    steps = found.get("steps", config.steps)
    if config.steps <= steps:
        return found, False
    if config.optim.schedule != "constant" and config.optim.schedule_steps is None:
        raise InputError(
            f"{run_dir}: cannot be extended from {steps} to {config.steps} steps, its learning rate falls to 0 at the "
            "last one; a run to extend later needs optim.schedule_steps"
        )
    return merge(found, {"steps": config.steps}), True


def load_sampling_config(run_dir: Path) -> Config:
    """Return the configuration of a recorded run with default shaping and loss.

    Sampling needs neither, and the module of a user's own method need not be importable.

    Raises:
        InputError: the folder is not a trace of the trainer, or its configuration is invalid.
    """
    values = read_manifest(run_dir)["config"]
    return build_config({key: values[key] for key in values if key not in ("shaping", "loss")}, source=str(run_dir))


def check_prompts(config: Config, run_dir: Path) -> None:
    """Refuse to resume a run whose prompts would change.

    Raises:
        InputError: files of the task have changed since the run began.
    """
    found = read_manifest(run_dir).get("common_random_numbers", {}).get("prompts")
    if found and found != common_random_numbers(config)["prompts"]:
        files = ", ".join(path for source in config.task.sources.values() for path in source.files)
        raise InputError(
            f"{run_dir}: not resumed, its prompts would change midway; has {files} changed since it began?"
        )


def config_changes(found: Mapping[str, Any], config: Config) -> Iterator[str]:
    """Yield differences from a manifest's configuration.

    Each has the form ``key is OLD there, NEW here``. A key that the manifest lacks, because it is newer than the run,
    counts as its default.
    """
    wanted = flatten(config.model_dump(mode="json"))
    try:
        there = flatten(build_config(found, "").model_dump(mode="json"))
    except InputError:
        there = flatten(found)
    for key in sorted(wanted.keys() | there.keys()):
        if (old := there.get(key)) != (new := wanted.get(key)):
            yield f"{key} is {json.dumps(old)} there, {json.dumps(new)} here"


@contextmanager
def run_lock(run_dir: Path, *, waits: bool, ranks: Ranks = ALONE) -> Iterator[None]:
    """Lock a run's folder against other processes, if the file system can.

    Args:
        run_dir: The run, begun or not.
        waits: Wait for the lock, which a process that outlives its launcher may hold for a step, instead of raising.
        ranks: The ranks of the run; rank 0 holds the lock for all.

    Raises:
        InputError: another process holds the lock.
    """
    with ExitStack() as stack:
        with ranks.together():
            if ranks.is_main:
                stack.enter_context(locked(run_dir, waits=waits))
            ranks.barrier()
        yield


def has_begun(run_dir: Path) -> bool:
    """Return whether the folder holds a manifest."""
    return (run_dir / MANIFEST).exists()


@cache
def hash_weights(name: str) -> str | None:
    """Return the fingerprint of a model's weights; None if the model does not exist."""
    try:
        found = find_model(name)
    except InputError:
        return None
    paths = sorted(found.glob(WEIGHTS)) if found.is_dir() else [found]
    if not paths:
        return None
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:DIGEST_LENGTH]


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:DIGEST_LENGTH]
