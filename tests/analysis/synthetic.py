"""Write traces with known truth: effects are planted or left out one by one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from entrace.analysis.trace import TraceWriter

VOCAB = [
    "<eos>",
    "<answer>",
    "</answer>",
    *"0123456789",
    "+",
    "-",
    "=",
    " so",
    " then",
    " wait",
    " check",
    " the",
    " dog",
]
GROUP = 8
LENGTH = 20
BOUNDARY = 24


@dataclass(frozen=True)
class Planted:
    """Select the claims that hold in a synthetic run."""

    two_stages: bool = True
    negative_falls: bool = True
    defects_fall: bool = True
    ppl_orders: bool = True
    ends_high: bool = True
    eval_accuracy: float = 0.7
    eval_length: int = LENGTH
    formal_share: float = 0.4


NOTHING = Planted(False, False, False, False, False)


def write_run(
    folder: Path, *, arm: str = "none", seed: int = 0, planted: Planted | None = None, steps: int = 60, groups: int = 8
) -> Path:
    """Write one complete run, and return its folder."""
    planted = planted or Planted()
    rng = np.random.default_rng([seed, *arm.encode()])
    manifest = {
        "run_id": folder.name,
        "study": folder.parent.name,
        "arm": arm,
        "seed": seed,
        "config": {"shaping": {"name": arm}, "steps": steps},
        "model": "data/base-policy",
        "task": "chain_sum",
        "total_steps": steps,
        "versions": {"python": "3.12"},
        "hardware": {"cpu": "test", "cores": 2},
        "git_commit": "0" * 40,
    }
    writer = TraceWriter.create(folder, manifest, VOCAB)
    for split in ("train", "heldout"):
        ids = [f"{split}-{i}" for i in range(40)]
        texts = {"prompt": [f"{i} + 1 =" for i in range(40)], "ground_truth": [str(i + 1) for i in range(40)]}
        writer.append("prompts", {"prompt_id": ids, "split": split, "task": "chain_sum", **texts})
    _append_eval(writer, 0, 0.35, LENGTH, rng)
    for step in range(1, steps + 1):
        _append_step(writer, step, progress(step, steps, two_stages=planted.two_stages), planted, groups, rng)
        if step == steps:
            _append_eval(writer, step, planted.eval_accuracy, planted.eval_length, rng)
            _append_interventions(writer, steps, groups, rng)
        if step % 20 == 0 or step == steps:
            writer.flush(step)
    writer.finish()
    return folder


def progress(step: int, steps: int, *, two_stages: bool) -> float:
    """Return the progress from 0 to 1 after ``step`` of ``steps``.

    Progress is even, or with two stages fast until BOUNDARY and slow afterwards.
    """
    even = step / steps
    if not two_stages:
        return even
    return min(step / BOUNDARY, 1) * 0.95 + 0.05 * even


def _append_step(
    writer: TraceWriter, step: int, done: float, planted: Planted, groups: int, rng: np.random.Generator
) -> None:
    size = groups * GROUP
    prompt_ids = np.repeat([f"train-{i}" for i in rng.choice(40, groups, replace=False)], GROUP)
    accuracy = 0.3 + 0.5 * done
    is_correct = rng.random(size) < accuracy
    grouped = is_correct.reshape(groups, GROUP)
    std = grouped.std(1, keepdims=True)
    advantage = ((grouped - grouped.mean(1, keepdims=True)) / np.where(std > 0, std, 1)).ravel()
    is_kept = np.repeat(std.ravel() > 0, GROUP)
    falling = 0.9 - 0.7 * done
    steady = np.full(size, 0.25) if planted.negative_falls else np.full(size, falling)
    level = np.where(is_correct, steady, falling)
    entropy, surprisal = _token_measures(level, is_correct, planted, rng)
    defective = rng.random(size) < (0.5 - 0.4 * done if planted.defects_fall else 0.3)
    ids = (step - 1) * size + np.arange(size)
    common = {"step": step, "prompt_id": prompt_ids, "rollout_id": ids, "is_correct": is_correct, "is_kept": is_kept}
    other_ids = rng.integers(VOCAB.index(" so"), len(VOCAB), (size, LENGTH))
    token_ids = np.where(rng.random((size, LENGTH)) < planted.formal_share, 5, other_ids)
    writer.append(
        "tokens",
        {
            **{name: np.repeat(value, LENGTH) for name, value in common.items() if name != "step"},
            "step": step,
            "position": np.tile(np.arange(LENGTH), size),
            "response_length": LENGTH,
            "token_id": token_ids.ravel(),
            "logprob": -surprisal.ravel(),
            "sampling_logprob": -1.02 * surprisal.ravel(),
            "entropy": entropy.ravel(),
            # That of the next token of the response in part, so that ranks agree and differ.
            "reference_entropy": (entropy + 0.5 * np.roll(entropy, -1, 1)).ravel(),
            "advantage": np.repeat(advantage, LENGTH),
            "shaped_advantage": np.repeat(advantage, LENGTH),
            "grad_norm": rng.lognormal(0, 0.5, size * LENGTH),
            **(_after_update(surprisal.ravel(), entropy.ravel(), rng) if step % 5 == 0 else {}),
        },
    )
    writer.append(
        "rollouts",
        {
            **common,
            "group_id": ids // GROUP * GROUP,
            "sample_index": np.tile(np.arange(GROUP), groups),
            "completion": "so 1 + 1 = 2",
            "answer": [None if bad else "2" for bad in defective],
            "reward": is_correct.astype(float),
            "has_answer": ~defective,
            "defects": [["format_violation"] if bad else [] for bad in defective],
            "response_length": LENGTH,
            "is_truncated": False,
            "entropy_mean": entropy.mean(1),
            "surprisal_mean": surprisal.mean(1),
            "ppl": np.exp(surprisal.mean(1)),
            "ppl_z": 0.0,
            "advantage": advantage,
            "temperature": 1.0,
            "entropy_kind": "exact",
            "policy_step": step - 1,
        },
    )
    writer.append("steps", _step_row(step, is_correct, defective, entropy, std))


def _after_update(surprisal: np.ndarray, entropy: np.ndarray, rng: np.random.Generator) -> dict[str, object]:
    moved = rng.normal(0, 0.05, surprisal.size) ** 3 * 100
    after = np.log(np.clip(np.exp(-surprisal) + moved, 1e-4, 1))
    is_clipped = np.arange(surprisal.size) % 20 == 0
    # No quantity predicts the change of entropy, its own former value included.
    entropy_after = entropy * rng.uniform(0.8, 1.2, entropy.size)
    return {"logprob_after": after, "entropy_after": entropy_after, "is_clipped": is_clipped}


def _append_interventions(writer: TraceWriter, steps: int, groups: int, rng: np.random.Generator) -> None:
    """Replace one token in every response of the last step."""
    size = groups * GROUP
    original, alternative = rng.binomial(8, 0.8, size) / 8, rng.binomial(8, 0.5, size) / 8
    writer.append(
        "interventions",
        {
            "checkpoint_step": steps,
            "seed": 0,
            "selection": "entropy 0-1, position 0-1, ppl_tercile 1,2,3",
            "temperature": 1.0,
            "step": steps,
            "prompt_id": np.repeat([f"train-{i}" for i in range(groups)], GROUP),
            "rollout_id": (steps - 1) * size + np.arange(size),
            "position": rng.integers(0, LENGTH, size),
            "response_length": LENGTH,
            "token_id": 5,
            "category": "formal_reasoning",
            "alternative_id": 6,
            "logprob": -0.5,
            "entropy": 0.5,
            "ppl": 1.5,
            "ppl_tercile": 1 + np.arange(size) % 3,
            "is_correct": rng.random(size) < 0.6,
            "num_continuations": 8,
            "accuracy_original": original,
            "accuracy_alternative": alternative,
            "impact": original - alternative,
            "tokens": 100,
        },
    )


def _token_measures(
    level: np.ndarray, is_correct: np.ndarray, planted: Planted, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    shape = np.ones(LENGTH)
    if planted.ends_high:
        shape[: LENGTH // 5] = shape[-LENGTH // 5 :] = 1.6
    noise = rng.gamma(4, 0.25, (len(level), LENGTH))
    entropy = level[:, None] * shape / shape.mean() * noise
    mean = rng.normal(0.4, 0.05, len(level)) + (0.1 * ~is_correct if planted.ppl_orders else 0)
    return entropy, np.abs(rng.normal(mean[:, None], 0.05, (len(level), LENGTH)))


def _step_row(
    step: int, is_correct: np.ndarray, defective: np.ndarray, entropy: np.ndarray, std: np.ndarray
) -> dict[str, object]:
    zeros = dict.fromkeys(
        ("loss", "clip_frac_low", "clip_frac_high", "rollout_s", "reward_s", "update_s", "record_s"), 0.0
    )
    return {
        **zeros,
        "step": step,
        "reward_mean": is_correct.mean(),
        "accuracy": is_correct.mean(),
        "format_rate": 1 - defective.mean(),
        "entropy_token_mean": entropy.mean(),
        "grad_norm": 1.0,
        "lr": 1e-4,
        "tokens": entropy.size,
        "groups_kept": int((std > 0).sum()),
        "groups_dropped": int((std == 0).sum()),
        "is_shaped": False,
    }


def _append_eval(writer: TraceWriter, step: int, accuracy: float, length: int, rng: np.random.Generator) -> None:
    size = 40 * GROUP
    is_correct = rng.random(size) < accuracy
    writer.append(
        "evals",
        {
            "step": step,
            "benchmark": "heldout",
            "prompt_id": np.repeat([f"heldout-{i}" for i in range(40)], GROUP),
            "sample_index": np.tile(np.arange(GROUP), 40),
            "answer": ["2" if right else "3" for right in is_correct],
            "is_correct": is_correct,
            "response_length": length,
            "entropy_mean": 0.3,
            "temperature": 1.0,
        },
    )
