"""Checkpoints: the policy as a Hugging Face folder, the optimiser, and where the run stands."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_model

from analysis.trace import InputError
from trainer.update import Learner

KEPT = 2


@dataclass
class RunState:
    """Where a run stands after ``step``; random numbers are functions of seed and step, so none are kept.

    Attributes:
        step: Last finished step.
        prompt_position: Training prompts taken.
        next_rollout_id: Id of the next response.
        history: (entropy, accuracy) of every step, from which the plateau is detected.
    """

    step: int = 0
    prompt_position: int = 0
    next_rollout_id: int = 0
    history: list[tuple[float, float]] = field(default_factory=list)


def save_checkpoint(run_dir: Path, learner: Learner, state: RunState) -> None:
    """Writes a checkpoint under a temporary name, renames it, and removes all but the latest few."""
    folder = run_dir / "checkpoints"
    final = folder / f"step-{state.step:06d}"
    temporary = folder / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    policy = learner.policy
    policy.model.save_pretrained(temporary / "policy")
    policy.tokenizer.save_pretrained(temporary / "policy")
    torch.save(learner.optimizer.state_dict(), temporary / "optimizer.pt")
    (temporary / "state.json").write_text(json.dumps(asdict(state)))
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    for old in list_checkpoints(run_dir)[:-KEPT]:
        shutil.rmtree(old)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first."""
    return sorted((run_dir / "checkpoints").glob("step-*"))


def find_checkpoint(run_dir: Path, step: int | None = None) -> Path:
    """The checkpoint of a step, or the latest.

    Raises:
        InputError: the run has none, or none of that step.
    """
    steps = {int(path.name.removeprefix("step-")): path for path in list_checkpoints(run_dir)}
    if not steps:
        raise InputError(f"{run_dir}: this run has no checkpoint")
    if step is None:
        return steps[max(steps)]
    if step not in steps:
        raise InputError(f"{run_dir}: no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
    return steps[step]


def read_state(checkpoint: Path) -> RunState:
    """Where the run stood at a checkpoint."""
    fields = json.loads((checkpoint / "state.json").read_text())
    return RunState(**{**fields, "history": [tuple(pair) for pair in fields["history"]]})


def load_checkpoint(checkpoint: Path, learner: Learner) -> RunState:
    """Restores weights and optimiser into ``learner`` and returns where the run stood."""
    load_model(learner.policy.model, checkpoint / "policy" / "model.safetensors", strict=False)
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True, map_location=learner.policy.device)
    learner.optimizer.load_state_dict(optimizer)
    return read_state(checkpoint)
