"""Save and load checkpoints without pickle.

A checkpoint holds the policy as a Hugging Face folder, the optimizer, and the run's state. It lists the SHA-256 of each
of its files. It is complete and on disk before it gets its name, and loses its name before it is removed. A folder with
the name of a checkpoint is therefore complete unless it was damaged later.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from entrace.analysis.trace import InputError, reason_of
from entrace.analysis.trace.digests import sha256_of
from entrace.analysis.trace.manifest import sync_folder
from entrace.analysis.trace.verify import CHECKSUMS
from entrace.trainer.learner import Learner
from entrace.trainer.parallel.sharding import distribute_like, full_tensors

KEPT = 2
POLICY = "policy"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
NAME = re.compile(r"step-(\d+)")

log = logging.getLogger("entrace")


@dataclass
class RunState:
    """State of a run after ``step``.

    Random numbers are functions of seed and step, so none are stored.

    Attributes:
        step: Last finished step.
        prompt_position: Training prompts taken.
        next_rollout_id: Id of the next response.
        history: (entropy, accuracy) per step, input of the plateau detector.
    """

    step: int = 0
    prompt_position: int = 0
    next_rollout_id: int = 0
    history: list[tuple[float, float]] = field(default_factory=list)

    def advance(self, step: int, prompt_position: int, num_responses: int, history: list[tuple[float, float]]) -> None:
        """Move on to a step that has finished."""
        self.step, self.prompt_position, self.history = step, prompt_position, history
        self.next_rollout_id += num_responses


def save_checkpoint(run_dir: Path, learner: Learner, state: RunState) -> None:
    """Write a checkpoint, and keep only the latest few up to the current step.

    Rank 0 writes, and the other ranks wait. An error leaves the checkpoints unchanged.
    """
    weights, moments = learner.policy.weights(), full_tensors(_optimizer_tensors(learner))
    if learner.ranks.is_main:
        _save(run_dir, learner, state, weights, moments)
    learner.ranks.barrier()


def _save(
    run_dir: Path, learner: Learner, state: RunState, weights: dict[str, Tensor] | None, moments: dict[str, Tensor]
) -> None:
    folder = run_dir / "checkpoints"
    final = folder / f"step-{state.step:06d}"
    remove_unfinished(run_dir)
    temporary = folder / f".{final.name}.tmp"
    try:
        learner.policy.save(temporary / POLICY, weights)
        save_file(moments, temporary / OPTIMIZER)
        (temporary / STATE).write_text(json.dumps(asdict(state)), encoding="utf-8")
        _seal(temporary)
    except Exception:
        # On a full disk, the rest of the trace needs the space of a partial checkpoint.
        remove_unfinished(run_dir)
        raise
    if final.exists():
        _remove(final)
    temporary.rename(final)
    sync_folder(folder)
    remove_superseded(run_dir, state.step)


def load_checkpoint(checkpoint: Path, learner: Learner) -> RunState:
    """Restore weights and optimizer bit for bit; return the run's state."""
    learner.policy.restore(checkpoint / POLICY)
    parameters = dict(learner.policy.model.named_parameters())
    learner.optimizer.state.clear()
    for key, value in load_file(checkpoint / OPTIMIZER).items():
        name, _, part = key.rpartition(".")
        # A copy, because the tensors map a file that will be removed.
        learner.optimizer.state[parameters[name]][part] = distribute_like(value, parameters[name])
    return read_state(checkpoint)


def read_state(checkpoint: Path) -> RunState:
    """Return the run's state at a checkpoint."""
    fields = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    return RunState(**{**fields, "history": [tuple(pair) for pair in fields["history"]]})


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first, damaged ones included."""
    folders = [path for path in (run_dir / "checkpoints").glob("step-*") if NAME.fullmatch(path.name)]
    return sorted(folders, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """Return the step of a checkpoint, from its name."""
    return int(checkpoint.name.removeprefix("step-"))


def find_checkpoint(run_dir: Path, step: int | None = None) -> Path:
    """Return the checkpoint of a step, or the latest intact one.

    Raises:
        InputError: the run has no checkpoint, none of that step, or that one is damaged.
    """
    steps = {checkpoint_step(path): path for path in list_checkpoints(run_dir)}
    if step is None:
        if latest := find_intact(run_dir):
            return latest
        raise InputError(f"{run_dir}: this run has no checkpoint")
    if step not in steps:
        there = f"; available: {', '.join(map(str, steps))}" if steps else " or any other"
        raise InputError(f"{run_dir}: no checkpoint of step {step}{there}")
    if damage := find_damage(steps[step]):
        raise InputError(f"{run_dir}: checkpoint of step {step} is damaged ({damage}); restore it or choose another")
    return steps[step]


def find_intact(run_dir: Path, at_most: int | None = None) -> Path | None:
    """Return the latest intact checkpoint, and log why later ones were skipped.

    Args:
        run_dir: The run.
        at_most: Last step that the trace holds, if the run is to be resumed; later checkpoints are skipped.

    Returns:
        None if the run has no checkpoint.

    Raises:
        InputError: every checkpoint of the run was skipped.
    """
    passed_over = []
    for checkpoint in reversed(list_checkpoints(run_dir)):
        step = checkpoint_step(checkpoint)
        if at_most is not None and step > at_most:
            reason = f"is beyond the trace, which is complete up to step {at_most}"
        elif damage := find_damage(checkpoint):
            reason = f"is damaged ({damage})"
        else:
            for passed in passed_over:
                log.warning("%s: %s; continuing from step %d", run_dir, passed, step)
            return checkpoint
        passed_over.append(f"checkpoint of step {step} {reason}")
    if passed_over:
        advice = "restore the files, or remove the folder to start again; nothing was changed"
        raise InputError(f"{run_dir}: no checkpoint to resume from: {', '.join(passed_over)}; {advice}")
    return None


def find_damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, None if every file has its checksum."""
    name = CHECKSUMS
    try:
        checksums = json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8"))
        if not isinstance(checksums, dict) or not {OPTIMIZER, STATE} < checksums.keys():
            return f"{CHECKSUMS}: expected the checksum of every file"
        for name, checksum in checksums.items():
            if sha256_of(checkpoint / name) != checksum:
                return f"{name}: checksum differs"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name}: {reason_of(error)}"
    except (ValueError, RecursionError):
        return f"{CHECKSUMS}: not JSON"
    return None


def remove_unfinished(run_dir: Path) -> None:
    """Remove the temporary folders of an interrupted ``save_checkpoint``."""
    for path in (run_dir / "checkpoints").glob(".step-*"):
        shutil.rmtree(path)


def remove_superseded(run_dir: Path, step: int) -> None:
    """Remove checkpoints beyond ``step``, and all others except the latest few."""
    kept = [path for path in list_checkpoints(run_dir) if checkpoint_step(path) <= step][-KEPT:]
    for path in list_checkpoints(run_dir):
        if path not in kept:
            _remove(path)


def _optimizer_tensors(learner: Learner) -> dict[str, Tensor]:
    """Return AdamW's state by parameter name.

    Its settings are in the run's configuration.
    """
    states = learner.optimizer.state
    named = learner.policy.model.named_parameters()
    return {
        f"{name}.{part}": value.contiguous()
        for name, parameter in named
        for part, value in states.get(parameter, {}).items()
    }


def _seal(folder: Path) -> None:
    """Add the checksums of all files, and sync the folder with its contents to disk."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    checksums = {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}
    (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=1), encoding="utf-8")
    for path in [*files, folder / CHECKSUMS]:
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    for path in (folder / POLICY, folder):
        sync_folder(path)


def _remove(checkpoint: Path) -> None:
    leftover = checkpoint.with_name(f".{checkpoint.name}.old")
    checkpoint.rename(leftover)
    shutil.rmtree(leftover)
