"""Simulated ablations and runs without stages, written through the public ``TraceWriter``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from analysis.trace import TraceWriter
from tests.calibration.simulate import VOCAB, drift, step_row
from tests.calibration.worlds import STEPS, MethodWorld

SEEDS, PROMPTS, SAMPLES = 5, 200, 8
# Two runs of one arm differ by this much of accuracy, length and share: standard deviations over seeds.
SEED_ACCURACY, SEED_LENGTH, SEED_FORMAL = 0.01, 0.02, 0.01
LAST_STEPS, TRAIN_PROMPTS, TRAIN_TOKENS = 10, 8, 60


def write_flat_run(folder: Path, rng: np.random.Generator) -> Path:
    """A run in which entropy and accuracy drift, and nothing else."""
    writer = TraceWriter.create(folder, {"run_id": folder.name, "arm": "none", "seed": 0}, VOCAB)
    entropy, accuracy = 0.7 + 0.03 * drift(rng), 0.5 + 0.02 * drift(rng)
    for i in range(STEPS):
        writer.append("steps", step_row(i + 1, entropy[i], rng.binomial(256, accuracy[i]) / 256))
    writer.flush(STEPS)
    writer.finish()
    return folder


def write_ablation(folder: Path, world: MethodWorld, rng: np.random.Generator) -> Path:
    """Arms none, ppl_high, ppl and position over ``SEEDS`` seeds; the last two differ by what ``world`` says."""
    ability = rng.uniform(0.3, 0.75, PROMPTS)
    length = rng.lognormal(4, 0.4, PROMPTS)
    for seed in range(SEEDS):
        formal = np.clip(rng.normal(0.4, 0.1, (LAST_STEPS, TRAIN_PROMPTS)), 0, 0.85)
        for arm in ("none", "ppl_high", "ppl", "position"):
            effect = world if arm in ("ppl", "position") else MethodWorld()
            manifest = {"run_id": f"{arm}-{seed}", "arm": arm, "seed": seed, "baseline": "none"}
            writer = TraceWriter.create(folder / f"{arm}-{seed}", manifest, VOCAB)
            accuracy = ability + effect.accuracy + rng.normal(0, SEED_ACCURACY)
            accuracy = accuracy + rng.uniform(-0.05, 0.05, PROMPTS)
            _append_evals(writer, accuracy, length * (1 + effect.length + rng.normal(0, SEED_LENGTH)), rng)
            _append_training(writer, formal + effect.formal + rng.normal(0, SEED_FORMAL), seed, rng)
            writer.flush(LAST_STEPS)
            writer.finish()
    return folder


def _append_evals(writer: TraceWriter, accuracy: np.ndarray, length: np.ndarray, rng: np.random.Generator) -> None:
    is_correct = rng.random((PROMPTS, SAMPLES)) < accuracy[:, None]
    tokens = np.maximum(rng.normal(length[:, None], 0.1 * length[:, None], (PROMPTS, SAMPLES)), 1)
    writer.append(
        "evals",
        {
            "step": LAST_STEPS,
            "benchmark": "heldout",
            "prompt_id": np.repeat([f"h{i}" for i in range(PROMPTS)], SAMPLES),
            "sample_index": np.tile(np.arange(SAMPLES), PROMPTS),
            "is_correct": is_correct.ravel(),
            "response_length": tokens.ravel().round().astype(int),
            "temperature": 1.0,
        },
    )


def _append_training(writer: TraceWriter, formal: np.ndarray, seed: int, rng: np.random.Generator) -> None:
    for step, shares in enumerate(formal, start=1):
        writer.append("steps", step_row(step, 0.5, 0.5))
        ids = np.where(rng.random((TRAIN_PROMPTS, TRAIN_TOKENS)) < shares[:, None], 1, 7)
        names = [f"{seed}-{step}-{i}" for i in range(TRAIN_PROMPTS)]
        zeros = dict.fromkeys(("logprob", "entropy", "advantage", "shaped_advantage", "grad_norm"), 0.0)
        writer.append(
            "tokens",
            {
                **zeros,
                "step": step,
                "prompt_id": np.repeat(names, TRAIN_TOKENS),
                "rollout_id": np.repeat(step * TRAIN_PROMPTS + np.arange(TRAIN_PROMPTS), TRAIN_TOKENS),
                "position": np.tile(np.arange(TRAIN_TOKENS), TRAIN_PROMPTS),
                "response_length": TRAIN_TOKENS,
                "token_id": ids.ravel(),
                "is_correct": True,
            },
        )
