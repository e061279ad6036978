"""Simulated runs with known truth and realistic nesting, written through the public ``TraceWriter``.

Tokens share what their response is like, responses what their prompt is like, and all prompts of a step the state of
the policy, which drifts from step to step as a first-order autoregression.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analysis.trace import TraceWriter
from tests.calibration.worlds import GROUP, GROUPS, LENGTHS, STEPS, World, path

VOCAB = ["<eos>", "1", "+", " so", " then", " wait", " the", " dog", " sun", " of"]
NUM_REASONING, NUM_SEMANTIC = 5, 4
SPECIAL_SHARE = 0.05
AUTOCORRELATION = 0.5
CAPTURE_EVERY = 5
NUM_INTERVENTIONS, CONTINUATIONS = 800, 8
# Half of all normally distributed movements of this size are below .01.
NULL_MOVEMENT = 0.01 / 0.67449


@dataclass
class Step:
    """One step's responses: arrays of shape (B,) and, of tokens, (B, T) with ``mask``."""

    step: int
    prompt: np.ndarray
    is_correct: np.ndarray
    advantage: np.ndarray
    length: np.ndarray
    mask: np.ndarray
    entropy: np.ndarray
    is_reasoning: np.ndarray
    is_defective: np.ndarray
    surprisal: np.ndarray
    tercile: np.ndarray
    movement: np.ndarray
    grad_norm: np.ndarray


def simulate_run(world: World, rng: np.random.Generator) -> list[Step]:
    """Draws all steps of one run."""
    states = {name: drift(rng) for name in ("accuracy", "entropy", "reasoning", "defects", "movement")}
    means = {
        name: path(getattr(world, name), world)
        for name in ("accuracy", "negative_entropy", "positive_entropy", "reasoning", "defects")
    }
    return [
        _simulate_step(
            world,
            i + 1,
            {name: float(values[i]) for name, values in means.items()},
            {name: float(values[i]) for name, values in states.items()},
            rng,
        )
        for i in range(STEPS)
    ]


def drift(rng: np.random.Generator) -> np.ndarray:
    """State of the policy that one step hands on to the next: mean 0, variance 1, shape ``(STEPS,)``."""
    noise = rng.normal(size=STEPS)
    state = np.empty(STEPS)
    state[0] = noise[0]
    for i in range(1, STEPS):
        state[i] = AUTOCORRELATION * state[i - 1] + np.sqrt(1 - AUTOCORRELATION**2) * noise[i]
    return state


def _simulate_step(
    world: World, step: int, mean: dict[str, float], state: dict[str, float], rng: np.random.Generator
) -> Step:
    size = GROUPS * GROUP
    # One right and one wrong response at least in every group, so that all take part in the update.
    ability = (8 * mean["accuracy"] - 1) / 6 + 0.02 * state["accuracy"] + rng.uniform(-0.2, 0.2, GROUPS)
    num_right = 1 + rng.binomial(GROUP - 2, np.clip(ability, 0, 1))
    is_correct = rng.permuted(np.arange(GROUP) < num_right[:, None], axis=1)
    share = num_right[:, None] / GROUP
    advantage = ((is_correct - share) / np.sqrt(share * (1 - share))).ravel()
    is_correct = is_correct.ravel()
    surprisal = 0.4 + rng.normal(0, 0.05, (GROUPS, 1)) + rng.normal(0, 0.05, (GROUPS, GROUP))
    surprisal += world.wrong_surprisal * ~is_correct.reshape(GROUPS, GROUP)
    rank = surprisal.argsort(1).argsort(1)
    # Thirds as ntile(3) cuts eight responses: 3, 3, 2.
    tercile = (rank // 3 + 1).ravel()
    length = rng.choice(LENGTHS, size)
    position = np.arange(LENGTHS[-1])
    mask = position < length[:, None]
    level = np.where(is_correct, mean["positive_entropy"], mean["negative_entropy"]) * (1 + 0.04 * state["entropy"])
    level = level * _mean_one(rng, (GROUPS, 1)).repeat(GROUP) * _mean_one(rng, size)
    entropy = level[:, None] * _profile(world, length, mask) * rng.gamma(0.8, 1 / 0.8, mask.shape)
    reasoning = mean["reasoning"] + 0.01 * state["reasoning"] + rng.uniform(-0.1, 0.1, GROUPS).repeat(GROUP)
    reasoning = reasoning + world.reasoning_by_ppl / 2 * (2 - tercile)
    defects = np.clip(mean["defects"] + 0.02 * state["defects"] + rng.uniform(-0.1, 0.1, GROUPS), 0, 1).repeat(GROUP)
    movement, grad_norm = _move(world, entropy, mask, position / length[:, None], advantage, state["movement"], rng)
    return Step(
        step=step,
        prompt=(step - 1) * GROUPS + np.arange(GROUPS).repeat(GROUP),
        is_correct=is_correct,
        advantage=advantage,
        length=length,
        mask=mask,
        entropy=entropy,
        is_reasoning=rng.random(mask.shape) < reasoning[:, None],
        is_defective=rng.random(size) < defects,
        surprisal=surprisal.ravel(),
        tercile=tercile,
        movement=movement,
        grad_norm=grad_norm,
    )


def _mean_one(rng: np.random.Generator, shape: Any) -> np.ndarray:
    return rng.lognormal(-0.02, 0.2, shape)


def _profile(world: World, length: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Entropy by position relative to the response's mean, (B, T)."""
    fifth = np.arange(mask.shape[1]) * 5 // length[:, None]
    shape = np.where(fifth == 0, world.ends[0], np.where(fifth == 4, world.ends[1], 1.0))
    return shape / np.average(shape, axis=1, weights=mask)[:, None]


def _move(
    world: World,
    entropy: np.ndarray,
    mask: np.ndarray,
    relative_position: np.ndarray,
    advantage: np.ndarray,
    state: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Change of each token's probability by the update, and its gradient norm."""
    prompt = rng.normal(size=(GROUPS, 1)).repeat(GROUP, axis=0)
    z = np.sqrt(0.9) * rng.normal(size=mask.shape) + np.sqrt(0.05) * prompt + np.sqrt(0.05) * state
    grad_norm = np.abs(advantage)[:, None] * rng.lognormal(0, 0.5, mask.shape)
    if not world.is_concentrated:
        return NULL_MOVEMENT * z, grad_norm
    is_high = entropy >= np.quantile(entropy[mask], 0.8)
    is_mover = rng.random(mask.shape) < np.where(is_high, 0.6, 0.05)
    at_end = np.where(is_high & (relative_position >= 0.8), 1.4, 1.0)
    moved = 0.06 * at_end * z + 0.02 * np.sign(advantage)[:, None]
    return np.where(is_mover, moved, 0.004 * z), grad_norm * np.where(is_mover, 3, 1) * at_end


def write_run(folder: Path, steps: list[Step], world: World, rng: np.random.Generator) -> Path:
    """Records a simulated run with interventions on its last ten steps."""
    writer = TraceWriter.create(folder, {"run_id": folder.name, "arm": "none", "seed": 0, "total_steps": STEPS}, VOCAB)
    for step in steps:
        _append_tokens(writer, step, rng)
        _append_rollouts(writer, step)
        writer.append("steps", step_row(step.step, step.entropy[step.mask].mean(), step.is_correct.mean()))
    _append_interventions(writer, steps[-10:], world, rng)
    writer.flush(STEPS)
    writer.finish()
    return folder


def _append_tokens(writer: TraceWriter, step: Step, rng: np.random.Generator) -> None:
    rows, position = np.nonzero(step.mask)
    reasoning = rng.integers(1, 1 + NUM_REASONING, len(rows))
    other = rng.integers(1 + NUM_REASONING, 1 + NUM_REASONING + NUM_SEMANTIC, len(rows))
    other[rng.random(len(rows)) < SPECIAL_SHARE] = 0
    p = rng.uniform(0.4, 0.6, len(rows))
    columns = {
        "step": step.step,
        "prompt_id": np.array([f"p{i}" for i in step.prompt], dtype=object)[rows],
        "rollout_id": ((step.step - 1) * len(step.length) + np.arange(len(step.length)))[rows],
        "position": position,
        "response_length": step.length[rows],
        "token_id": np.where(step.is_reasoning[step.mask], reasoning, other),
        "logprob": np.log(p),
        "entropy": step.entropy[step.mask],
        "advantage": step.advantage[rows],
        "shaped_advantage": step.advantage[rows],
        "grad_norm": step.grad_norm[step.mask],
        "is_correct": step.is_correct[rows],
    }
    if step.step % CAPTURE_EVERY == 0:
        columns["logprob_after"] = np.log(np.clip(p + step.movement[step.mask], 1e-6, 1))
        columns |= {"entropy_after": columns["entropy"], "is_clipped": False}
    writer.append("tokens", columns)


def _append_rollouts(writer: TraceWriter, step: Step) -> None:
    size = len(step.length)
    writer.append(
        "rollouts",
        {
            "step": step.step,
            "prompt_id": [f"p{i}" for i in step.prompt],
            "rollout_id": (step.step - 1) * size + np.arange(size),
            "sample_index": np.arange(size) % GROUP,
            "completion": "so 1 + 1 = 2",
            "reward": step.is_correct.astype(float),
            "is_correct": step.is_correct,
            "has_answer": ~step.is_defective,
            "defects": [["format_violation"] if bad else [] for bad in step.is_defective],
            "response_length": step.length,
            "is_truncated": False,
            "is_kept": True,
            "entropy_mean": (step.entropy * step.mask).sum(1) / step.length,
            "surprisal_mean": step.surprisal,
            "ppl": np.exp(step.surprisal),
            "ppl_z": 0.0,
            "advantage": step.advantage,
            "temperature": 1.0,
            "entropy_kind": "exact",
            "policy_step": step.step - 1,
        },
    )


def step_row(step: int, entropy: float, accuracy: float) -> dict[str, Any]:
    """Row of table steps; what no claim looks at is 0."""
    zeros = ("loss", "clip_frac_low", "clip_frac_high", "grad_norm", "lr", "rollout_s", "reward_s", "update_s")
    return {
        **dict.fromkeys((*zeros, "record_s"), 0.0),
        "step": step,
        "reward_mean": accuracy,
        "accuracy": accuracy,
        "format_rate": 1.0,
        "entropy_token_mean": entropy,
        "tokens": 0,
        "groups_kept": GROUPS,
        "groups_dropped": 0,
        "is_shaped": False,
    }


def _append_interventions(writer: TraceWriter, steps: list[Step], world: World, rng: np.random.Generator) -> None:
    """Replacements at places drawn evenly from the responses of ``steps``."""
    size = len(steps[0].length)
    ids = rng.choice(len(steps) * size, NUM_INTERVENTIONS, replace=False)
    fields = {
        name: np.concatenate([getattr(step, name) for step in steps])[ids]
        for name in ("prompt", "is_correct", "length", "tercile", "surprisal")
    }
    position = rng.integers(0, fields["length"])
    ease = {prompt: rng.uniform(-0.1, 0.1) for prompt in np.unique(fields["prompt"])}
    right = np.where(fields["is_correct"], 0.85, 0.4) + np.array([ease[prompt] for prompt in fields["prompt"]])
    loss = 0.3 + world.impact_by_ppl / 2 * (fields["tercile"] - 2)
    loss = loss + world.impact_slope * (position / fields["length"] - 0.5)
    original = rng.binomial(CONTINUATIONS, np.clip(right, 0, 1)) / CONTINUATIONS
    alternative = rng.binomial(CONTINUATIONS, np.clip(right - loss, 0, 1)) / CONTINUATIONS
    writer.append(
        "interventions",
        {
            "checkpoint_step": STEPS,
            "seed": 0,
            "step": STEPS - len(steps) + 1 + ids // size,
            "prompt_id": [f"p{i}" for i in fields["prompt"]],
            "rollout_id": (STEPS - len(steps)) * size + ids,
            "position": position,
            "response_length": fields["length"],
            "token_id": 1,
            "category": "formal_reasoning",
            "alternative_id": 2,
            "logprob": -0.5,
            "entropy": 0.5,
            "ppl": np.exp(fields["surprisal"]),
            "ppl_tercile": fields["tercile"],
            "is_correct": fields["is_correct"],
            "num_continuations": CONTINUATIONS,
            "accuracy_original": original,
            "accuracy_alternative": alternative,
            "impact": original - alternative,
            "tokens": 0,
        },
    )
