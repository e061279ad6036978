"""Simulate ablations, written through the public ``TraceWriter``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from entrace.analysis.trace import TraceWriter
from tests.calibration.parameters import MethodWorld
from tests.calibration.simulate import VOCAB, append, append_steps

PROMPTS, SAMPLES = 200, 8
# Standard deviations over seeds of accuracy, relative length, and share of formal tokens.
SEED_ACCURACY, SEED_LENGTH, SEED_FORMAL = 0.01, 0.02, 0.01
STEPS, TRAIN_PROMPTS, TRAIN_TOKENS = 10, 8, 60
ARMS = ("none", "ppl_high", "ppl", "position")


def write_ablation(folder: Path, world: MethodWorld, rng: np.random.Generator) -> Path:
    """Record all arms; ppl and position have the gains of ``world``."""
    ability = rng.uniform(0.3, 0.75, PROMPTS)
    length = rng.lognormal(4, 0.4, PROMPTS)
    for seed in range(world.seeds):
        formal = np.clip(rng.normal(0.4, 0.1, (STEPS, TRAIN_PROMPTS)), 0, 0.85)
        for arm in ARMS:
            effect = world if arm in ("ppl", "position") else MethodWorld()
            spread = world.spread if arm == "ppl" else 1.0
            manifest = {"run_id": f"{arm}-{seed}", "arm": arm, "seed": seed, "baseline": "none", "total_steps": STEPS}
            writer = TraceWriter.create(folder / f"{arm}-{seed}", manifest, VOCAB)
            accuracy = ability + effect.accuracy + rng.normal(0, spread * SEED_ACCURACY)
            lengths = length * np.maximum(1 + effect.length + rng.normal(0, spread * SEED_LENGTH), 0.1)
            _append_evals(writer, world.last_steps, accuracy, lengths, rng)
            # Arms do not differ before training, and only the last evaluation of a benchmark counts.
            _append_evals(writer, [0] * len(world.last_steps), ability, length, rng)
            _append_training(writer, formal + effect.formal + rng.normal(0, spread * SEED_FORMAL), seed, rng)
            writer.flush(STEPS)
            writer.finish()
    return folder


def _append_evals(
    writer: TraceWriter, steps: Sequence[int], accuracy: np.ndarray, length: np.ndarray, rng: np.random.Generator
) -> None:
    """Append an evaluation of each benchmark.

    Prompts are divided evenly between benchmarks.
    """
    accuracy = accuracy + rng.uniform(-0.05, 0.05, PROMPTS)
    is_correct = rng.random((PROMPTS, SAMPLES)) < accuracy[:, None]
    tokens = np.maximum(rng.normal(length[:, None], 0.1 * length[:, None], (PROMPTS, SAMPLES)), 1)
    for i, step in enumerate(steps):
        prompts = np.arange(i, PROMPTS, len(steps))
        append(
            writer,
            "evals",
            {
                "step": step,
                "benchmark": f"benchmark-{i}",
                "prompt_id": np.repeat([f"h{prompt}" for prompt in prompts], SAMPLES),
                "sample_index": np.tile(np.arange(SAMPLES), len(prompts)),
                "is_correct": is_correct[prompts].ravel(),
                "response_length": tokens[prompts].ravel().round().astype(int),
                "temperature": 1.0,
            },
        )


def _append_training(writer: TraceWriter, formal: np.ndarray, seed: int, rng: np.random.Generator) -> None:
    """Append tokens of one response per prompt and step.

    ``formal`` holds shares, ``(STEPS, TRAIN_PROMPTS)``.
    """
    append_steps(writer, np.full(STEPS, 0.5), np.full(STEPS, 0.5), TRAIN_PROMPTS)
    size = STEPS * TRAIN_PROMPTS
    rollout = np.arange(size)
    is_formal = rng.random((size, TRAIN_TOKENS)) < formal.ravel()[:, None]
    zeros = dict.fromkeys(("logprob", "entropy", "advantage", "shaped_advantage", "grad_norm"), 0.0)
    append(
        writer,
        "tokens",
        {
            **zeros,
            "step": np.repeat(1 + rollout // TRAIN_PROMPTS, TRAIN_TOKENS),
            "prompt_id": np.repeat([f"{seed}-{i}" for i in rollout], TRAIN_TOKENS),
            "group_id": np.repeat(rollout, TRAIN_TOKENS),
            "rollout_id": np.repeat(rollout, TRAIN_TOKENS),
            "position": np.tile(np.arange(TRAIN_TOKENS), size),
            "response_length": TRAIN_TOKENS,
            "token_id": np.where(is_formal, 1, 7).ravel(),
            "is_correct": True,
            "is_kept": True,
        },
    )
