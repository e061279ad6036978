"""What ``run.json`` says of a run of this trainer, and what it tells of one made before."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, reduce
from pathlib import Path
from typing import Any

from entrace.analysis.trace import InputError, describe_machine, flatten, read_manifest, write_manifest
from entrace.analysis.trace.manifest import MANIFEST, now
from entrace.analysis.trace.schema import SCHEMA_VERSION
from entrace.trainer.config import MEMORY_KEYS, Config, build_config
from entrace.trainer.parallel.ranks import ALONE, Ranks
from entrace.trainer.resources import find_model
from entrace.trainer.settings import merge, nest

# A folder that can be locked is one that no second process works in.
LOCKS = ".locks"
WEIGHTS = "*.safetensors"
DIGEST_LENGTH = 16
# Raised when equal seeds draw other prompts than before, so that runs of either kind are never compared as pairs.
STREAMS = 2
FIRST_TASK_KEYS = {"name", "params", "num_heldout"}


def describe_run(config: Config, run_dir: Path, labels: Mapping[str, Any]) -> dict[str, Any]:
    """Manifest of a run about to start: identity, configuration in full, and the machine."""
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
        **describe_machine(),
    }


def common_random_numbers(config: Config) -> dict[str, str | None]:
    """Fingerprints of what runs may have in common: where two runs' are equal, they share it.

    Returns:
        ``base_policy``: of its weights; None where there is no such model. ``prompts``: of all that decides the
        prompts of both splits and their order, contents of files included. ``evaluation``: of all that decides the
        held-out prompts and the random numbers that each of their samples is drawn with.
    """
    policy, rollout = config.policy, config.rollout
    # A key that a run made before does not know leaves its fingerprint as it was, unless it is set.
    task = config.task.model_dump(mode="json", include=FIRST_TASK_KEYS)
    task |= config.task.model_dump(mode="json", exclude_defaults=True)
    if files := {path: hash_file(Path(path)) for source in config.task.sources.values() for path in source.files}:
        task["files"] = files
    prompts = {"seed": config.seed, "streams": STREAMS, **task}
    sampling = config.eval.model_dump(mode="json", exclude={"every"})
    # Random numbers are drawn for so many prompts at a time, each as long as the longest response.
    shape = [rollout.prompts_per_step, rollout.max_response_tokens]
    return {
        "base_policy": hash_weights(policy.path),
        "prompts": _hash_json(prompts),
        "evaluation": _hash_json([prompts, sampling, shape]),
    }


def mark_failed(config: Config, run_dir: Path, labels: Mapping[str, Any], error: str) -> None:
    """Says in a run's manifest that it failed; one that could not write its own gets one."""
    if has_begun(run_dir):
        manifest = read_manifest(run_dir)
    else:
        run_dir.mkdir(parents=True, exist_ok=True)
        manifest = {"schema_version": SCHEMA_VERSION, "last_durable_step": 0, **describe_run(config, run_dir, labels)}
    write_manifest(run_dir, {**manifest, "status": "failed", "finished_at": now(), "error": error})


def is_complete(config: Config, run_dir: Path) -> bool:
    """Return whether a run to resume is done already; False where none has begun.

    A run may be extended to more steps where its learning rate does not depend on their number.

    Raises:
        InputError: the folder is not a trace, or was made with another configuration.
    """
    # A process killed while it wrote its first manifest leaves that file's temporary name.
    if not run_dir.exists() or {path.name for path in run_dir.iterdir()} <= {f".{MANIFEST}.tmp"}:
        return False
    manifest = read_manifest(run_dir)
    # They decide how much memory a run takes, and nothing else but rounding: one short of it goes on with less.
    wanted = flatten(config.model_dump(mode="json"))
    free = reduce(merge, (nest(key, wanted[key]) for key in MEMORY_KEYS), manifest["config"])
    free, is_extended = extend(free, config, run_dir)
    if changed := list(config_changes(free, config)):
        raise InputError(f"{run_dir}: made with another configuration, {', '.join(changed)}; not resumed")
    return manifest["status"] == "complete" and not is_extended


def extend(found: Mapping[str, Any], config: Config, run_dir: Path) -> tuple[Mapping[str, Any], bool]:
    """Return a run's configuration with the steps of ``config``, where these are more, and whether they are.

    Raises:
        InputError: more steps would change the learning rates of those that the run has made.
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


def check_prompts(config: Config, run_dir: Path) -> None:
    """Refuses to go on with a run whose prompts would be others from here on.

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
    """Where a manifest's configuration differs: ``key is this there, that here``.

    A key that the manifest lacks, because it is newer than the run, counts as its default.
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
    """Keeps other processes out of a run's folder, where the system and its file system know locks.

    Args:
        run_dir: The run, begun or not.
        waits: For a process that works there, such as one that outlives its launcher by a step.
        ranks: The processes that work there together, by the lock of rank 0.

    Raises:
        InputError: another process works there.
    """
    with ranks.together():
        file = _lock(run_dir.resolve(), waits) if ranks.is_main else None
        ranks.barrier()
    try:
        yield
    finally:
        if file is not None:
            os.close(file)


def _lock(run_dir: Path, waits: bool) -> int | None:
    folder = run_dir.parent / LOCKS
    # Windows has no such locks, some shared file systems know none; there, the launchers' own order has to do. A folder
    # that cannot be written is for who writes there to explain.
    with suppress(ImportError, OSError):
        import fcntl

        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / run_dir.name, os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except OSError as error:
            os.close(file)
            if isinstance(error, BlockingIOError):
                raise InputError(
                    f"{run_dir}: another process records this run; stop it first, or wait for it"
                ) from None
            raise
        return file
    return None


def has_begun(run_dir: Path) -> bool:
    """Whether the folder holds a manifest."""
    return (run_dir / MANIFEST).exists()


@cache
def hash_weights(name: str) -> str | None:
    """Fingerprint of a model's weights; None where there is no such model."""
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


def hash_file(path: Path) -> str | None:
    """Fingerprint of a file; None where there is none: what reads it says so."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:DIGEST_LENGTH]


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:DIGEST_LENGTH]
