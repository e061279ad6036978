"""Write large traces with the shape of a real run, for timing.

All values are random, without a policy. A step has 128 prompts x 8 responses of about 250 tokens; lengths are
lognormal, at most 1,024. Words follow Zipf's law. Most tokens are almost certain; uncertain ones change most in the
update. Entropy falls and accuracy rises over the first 30% of the steps, and both are almost constant afterwards. Every
fifth step has after-update values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from entrace.analysis.terminal.progress import Progress
from entrace.analysis.trace import Lexicon, TraceWriter

PROMPTS, GROUP = 128, 8
RESPONSES = PROMPTS * GROUP
MEAN_LENGTH, MAX_LENGTH = 250, 1024
TRAIN_PROMPTS, HELDOUT_PROMPTS = 5000, 200
WORDS = 2000
KNEE = 0.3
AFTER_EVERY, EVAL_EVERY, FLUSH_EVERY = 5, 20, 10
INTERVENTIONS_PER_STEP = 30
LISTED = ["<eos>", "</answer>", *"0123456789+-=()", " so", " then", " because", " if", " wait", " check", " maybe"]
DEFECTS = [[], ["format_violation"], ["format_violation", "truncated"], ["repetition"], ["irrelevant"]]


@dataclass
class Simulation:
    """Draw the rows of consecutive steps."""

    rng: np.random.Generator
    steps: int

    def __post_init__(self) -> None:
        self.vocab = LISTED + [f" word{i:04d}" for i in range(WORDS - len(LISTED))]
        frequency = 1 / (1 + self.rng.permutation(WORDS))
        self._cumulative = np.cumsum(frequency / frequency.sum())
        # Words differ in the entropy of the distributions that they are drawn from.
        self._openness = self.rng.gamma(2, 0.5, WORDS).astype(np.float32)
        self._texts = pa.array(self.vocab)
        self._categories = pa.array(Lexicon.load().categorize(self.vocab), pa.string())
        self._prompt_ids = pa.array([f"train-{i:05d}" for i in range(TRAIN_PROMPTS)])
        self._ease = self.rng.normal(0, 1, TRAIN_PROMPTS)
        self._order = self.rng.permutation(TRAIN_PROMPTS)

    def progress(self, step: int) -> float:
        """Return the fraction of the total change at a step.

        95% of the change happens before the knee.
        """
        done = step / self.steps
        return min(done / KNEE, 1) * 0.95 + 0.05 * done

    def responses(self, step: int) -> dict[str, Any]:
        """Draw columns of responses that do not depend on tokens.

        There is one row per response.
        """
        rng, done = self.rng, self.progress(step)
        prompts = self._order[np.arange((step - 1) * PROMPTS, step * PROMPTS) % TRAIN_PROMPTS]
        ease = np.repeat(self._ease[prompts], GROUP) + 3 * done - 1
        is_correct = rng.random(RESPONSES) < 1 / (1 + np.exp(-ease))
        grouped = is_correct.reshape(PROMPTS, GROUP)
        std = grouped.std(1, keepdims=True)
        length = np.exp(rng.normal(np.log(MEAN_LENGTH) - 0.17, 0.6, RESPONSES)).astype(np.int32)
        return {
            "step": step,
            "prompt_id": self._prompt_ids.take(pa.array(np.repeat(prompts, GROUP))),
            "rollout_id": (step - 1) * RESPONSES + np.arange(RESPONSES),
            "group_id": (step - 1) * PROMPTS + np.repeat(np.arange(PROMPTS), GROUP),
            "is_correct": is_correct,
            "response_length": np.clip(length, 2, MAX_LENGTH),
            "is_kept": np.repeat(std.ravel() > 0, GROUP),
            "advantage": ((grouped - grouped.mean(1, keepdims=True)) / np.where(std > 0, std, 1)).ravel(),
        }

    def tokens(self, responses: dict[str, Any]) -> dict[str, Any]:
        """Draw the tokens of ``responses``, one row per token."""
        rng, step, length = self.rng, responses["step"], responses["response_length"]
        row = np.repeat(np.arange(RESPONSES), length)
        position = np.arange(len(row)) - np.repeat(np.cumsum(length) - length, length)
        advantage = responses["advantage"].astype(np.float32)
        shift_of_length = 0.3 * (2 * position / length[row] - 1) ** 2
        token_id = np.searchsorted(self._cumulative, rng.random(len(row), dtype=np.float32)).clip(max=WORDS - 1)
        level = np.where(responses["is_correct"], 0.35 - 0.05 * self.progress(step), 0.6 - 0.25 * self.progress(step))
        entropy = level[row] * (0.9 + shift_of_length) * self._openness[token_id]
        entropy = (entropy * rng.standard_gamma(0.3, len(row), dtype=np.float32) / 0.3).astype(np.float32)
        logprob = -entropy * rng.standard_exponential(len(row), dtype=np.float32)
        shaped = (advantage * rng.uniform(0.9, 1.1, RESPONSES)).astype(np.float32)
        spread = np.sqrt(np.maximum(1 - 2 * np.exp(logprob) + np.exp(-entropy), 0))
        columns = {name: _take(responses[name], row) for name in ("prompt_id", "rollout_id", "is_correct", "is_kept")}
        columns |= {
            "step": step,
            "position": position,
            "response_length": length[row],
            "token_id": token_id,
            "logprob": logprob,
            "entropy": entropy,
            "advantage": advantage[row],
            "shaped_advantage": shaped[row],
            "grad_norm": np.abs(shaped[row]) * spread * 10,
        }
        if step % AFTER_EVERY == 0:
            change = 0.05 * advantage[row] * entropy * rng.standard_normal(len(row), dtype=np.float32) ** 2
            columns["logprob_after"] = np.minimum(logprob + change, 0)
            columns["entropy_after"] = entropy * np.exp(-0.1 * np.abs(change))
            columns["is_clipped"] = np.abs(change) > 0.2
        return columns

    def complete(self, responses: dict[str, Any], tokens: dict[str, Any]) -> dict[str, Any]:
        """Return table rollouts: ``responses``, and columns derived from tokens."""
        rng, step, length = self.rng, responses["step"], responses["response_length"]
        offsets = np.concatenate(([0], np.cumsum(length)))
        surprisal = -np.add.reduceat(tokens["logprob"], offsets[:-1], dtype=float) / length
        ln_ppl = surprisal.reshape(PROMPTS, GROUP)
        z = (ln_ppl - ln_ppl.mean(1, keepdims=True)) / (ln_ppl.std(1, keepdims=True) + 1e-6)
        words = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), self._texts.take(pa.array(tokens["token_id"])))
        bad = rng.random(RESPONSES) < 0.4 - 0.3 * self.progress(step)
        defect = np.where(bad & ~responses["is_correct"], rng.integers(1, len(DEFECTS), RESPONSES), 0)
        return {
            **responses,
            "sample_index": np.tile(np.arange(GROUP), PROMPTS),
            "completion": pc.binary_join(words, ""),  # pyright: ignore[reportAttributeAccessIssue]
            "answer": [None if kind in (1, 2) else "42" for kind in defect],
            "reward": responses["is_correct"].astype(np.float32),
            "has_answer": ~np.isin(defect, (1, 2)),
            "defects": [DEFECTS[kind] for kind in defect],
            "is_truncated": defect == 2,
            "entropy_mean": np.add.reduceat(tokens["entropy"], offsets[:-1], dtype=float) / length,
            "surprisal_mean": surprisal,
            "ppl": np.exp(surprisal),
            "ppl_z": z.ravel(),
            "temperature": 1.0,
            "entropy_kind": "exact",
            "policy_step": step - 1,
        }

    def interventions(self, rollouts: dict[str, Any], tokens: dict[str, Any]) -> dict[str, Any]:
        """Draw interventions on a few tokens of the step."""
        rng = self.rng
        chosen = np.sort(rng.choice(len(tokens["position"]), INTERVENTIONS_PER_STEP, replace=False))
        row = tokens["rollout_id"][chosen] % RESPONSES
        rank = rollouts["ppl"].reshape(PROMPTS, GROUP).argsort(1).argsort(1).ravel()
        names = ("prompt_id", "rollout_id", "position", "response_length", "token_id", "logprob", "entropy")
        original, alternative = rng.integers(0, 9, (2, len(chosen))) / 8
        return {
            **{name: _take(tokens[name], chosen) for name in names},
            "checkpoint_step": self.steps,
            "seed": 0,
            "step": rollouts["step"],
            "category": _take(self._categories, tokens["token_id"][chosen]),
            "alternative_id": rng.integers(0, WORDS, len(chosen)),
            "ppl": rollouts["ppl"][row],
            "ppl_tercile": 1 + rank[row] * 3 // GROUP,
            "is_correct": rollouts["is_correct"][row],
            "num_continuations": 8,
            "accuracy_original": original,
            "accuracy_alternative": alternative,
            "impact": original - alternative,
            "tokens": 16 * MEAN_LENGTH,
        }

    def evals(self, step: int) -> dict[str, Any]:
        """Draw eight samples for every held-out prompt."""
        size = HELDOUT_PROMPTS * GROUP
        is_correct = self.rng.random(size) < 0.3 + 0.4 * self.progress(step)
        return {
            "step": step,
            "benchmark": "simulated",
            "prompt_id": np.repeat([f"heldout-{i:03d}" for i in range(HELDOUT_PROMPTS)], GROUP),
            "sample_index": np.tile(np.arange(GROUP), HELDOUT_PROMPTS),
            "answer": np.where(is_correct, "42", "41"),
            "is_correct": is_correct,
            "response_length": self.rng.integers(2, MAX_LENGTH, size),
            "entropy_mean": self.rng.gamma(4, 0.1, size),
            "temperature": 1.0,
        }


def write_trace(folder: Path, tokens: int, seed: int = 0) -> Path:
    """Write a run of about ``tokens`` generated tokens; return its folder.

    The run has at least 20 steps.
    """
    steps = max(20, math.ceil(tokens / (RESPONSES * MEAN_LENGTH)))
    simulation = Simulation(np.random.default_rng(seed), steps)
    manifest = {"run_id": folder.name, "study": "simulated", "arm": "none", "seed": seed, "total_steps": steps}
    writer = TraceWriter.create(folder, manifest, simulation.vocab)
    for split, size in (("train", TRAIN_PROMPTS), ("heldout", HELDOUT_PROMPTS)):
        width = len(str(size - 1)) + (split == "train")
        ids = [f"{split}-{i:0{width}d}" for i in range(size)]
        row = {"split": split, "task": "simulated", "prompt": "6 * 7 =", "ground_truth": "42"}
        writer.append("prompts", {"prompt_id": ids, **row})
    writer.append("evals", simulation.evals(0))
    with Progress(f"write {folder.name}", steps) as bar:
        for step in range(1, steps + 1):
            _append_step(writer, simulation, step)
            if step % FLUSH_EVERY == 0 or step == steps:
                writer.flush(step)
            bar.update(step)
    writer.finish()
    return folder


def write_study(folder: Path, runs: int) -> Path:
    """Write ``runs`` small runs of 25 steps; return their folder.

    The runs have steps, evaluations, prompts, and vocabulary.
    """
    simulation = Simulation(np.random.default_rng(0), 25)
    evals = simulation.evals(0)
    for seed in range(runs):
        name = f"none-seed{seed}"
        manifest = {"run_id": name, "study": folder.name, "arm": "none", "seed": seed, "total_steps": 25}
        writer = TraceWriter.create(folder / name, manifest, simulation.vocab)
        prompt = {
            "prompt_id": ["train-0"],
            "split": "train",
            "task": "simulated",
            "prompt": "6 * 7 =",
            "ground_truth": "42",
        }
        writer.append("prompts", prompt)
        writer.append("evals", evals)
        for step in range(1, 26):
            writer.append("steps", _step_row(step, accuracy=0.5, format_rate=1.0, entropy=1 / step, tokens=8, kept=2))
        writer.flush(25)
        writer.finish()
    return folder


def _append_step(writer: TraceWriter, simulation: Simulation, step: int) -> None:
    responses = simulation.responses(step)
    tokens = simulation.tokens(responses)
    rollouts = simulation.complete(responses, tokens)
    writer.append("tokens", tokens)
    writer.append("rollouts", rollouts)
    writer.append("interventions", simulation.interventions(rollouts, tokens))
    if step % EVAL_EVERY == 0 or step == simulation.steps:
        writer.append("evals", simulation.evals(step))
    accuracy = float(responses["is_correct"].mean())
    row = _step_row(
        step,
        accuracy=accuracy,
        format_rate=float(rollouts["has_answer"].mean()),
        entropy=float(tokens["entropy"].mean(dtype=float)),
        tokens=len(tokens["position"]),
        kept=int(responses["is_kept"].sum()) // GROUP,
    )
    writer.append("steps", row)


def _step_row(
    step: int, *, accuracy: float, format_rate: float, entropy: float, tokens: int, kept: int
) -> dict[str, Any]:
    zeros = ("loss", "clip_frac_low", "clip_frac_high", "rollout_s", "reward_s", "update_s", "record_s")
    return dict.fromkeys(zeros, 0.0) | {
        "step": step,
        "reward_mean": accuracy,
        "accuracy": accuracy,
        "format_rate": format_rate,
        "entropy_token_mean": entropy,
        "grad_norm": 1.0,
        "lr": 1e-6,
        "tokens": tokens,
        "groups_kept": kept,
        "groups_dropped": PROMPTS - kept,
        "is_shaped": False,
    }


def _take(values: Any, rows: np.ndarray) -> Any:
    return values.take(pa.array(rows)) if isinstance(values, pa.Array) else values[rows]
