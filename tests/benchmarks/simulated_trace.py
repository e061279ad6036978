"""Write large traces with the shape of a real run, for timing.

All values are random, without a policy.

A step has 128 prompts x 8 responses of about 250 tokens; lengths are lognormal, at most 1,024. Words follow Zipf's law.
Most tokens are almost certain; uncertain ones change most in the update. Entropy falls and accuracy rises over the
first 30% of the steps, and both are almost constant afterwards. Every fifth step has after-update values.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from entrace.analysis.terminal.progress import Progress
from entrace.analysis.trace import Lexicon, TraceWriter

GROUP = 8
TRAIN_PROMPTS = 5000
KNEE = 0.3
AFTER_EVERY = 5
LISTED = ["<eos>", "</answer>", *"0123456789+-=()", " so", " then", " because", " if", " wait", " check", " maybe"]
DEFECTS = [[], ["format_violation"], ["format_violation", "truncated"], ["repetition"], ["irrelevant"]]
GRID = Path(__file__).parents[2] / "trainer" / "configs" / "tiny-ablation.toml"


@dataclass(frozen=True)
class Shape:
    """Size of a run: per step, per response, of the vocabulary, and in steps."""

    prompts: int = 128
    mean_length: int = 250
    max_length: int = 1024
    heldout: int = 200
    words: int = 2000
    eval_every: int = 20
    flush_every: int = 10
    interventions: int = 30

    @property
    def responses(self) -> int:
        """Return the number of responses per step."""
        return self.prompts * GROUP


LARGE = Shape()
# A run of the tiny ablation.
TINY = Shape(
    prompts=16, mean_length=35, max_length=64, heldout=100, words=40, eval_every=10, flush_every=20, interventions=0
)
TINY_STEPS = 60


@dataclass
class Simulation:
    """Draw the rows of consecutive steps."""

    rng: np.random.Generator
    steps: int
    shape: Shape = LARGE

    def __post_init__(self) -> None:
        words = self.shape.words
        self.vocab = LISTED + [f" word{i:04d}" for i in range(words - len(LISTED))]
        frequency = 1 / (1 + self.rng.permutation(words))
        self._cumulative = np.cumsum(frequency / frequency.sum())
        # Words differ in the entropy of the distributions that they are drawn from.
        self._openness = self.rng.gamma(2, 0.5, words).astype(np.float32)
        self._texts = pa.array(self.vocab)
        self._categories = pa.array(Lexicon.load().categorize(self.vocab), pa.string())
        self._prompt_ids = pa.array([f"train-{i:05d}" for i in range(TRAIN_PROMPTS)])
        self._ease = self.rng.normal(0, 1, TRAIN_PROMPTS)
        self._order = self.rng.permutation(TRAIN_PROMPTS)

    def progress(self, step: int) -> float:
        """Return the fraction of the total change at a step.

        Of the change, 95% happens before the knee.
        """
        done = step / self.steps
        return min(done / KNEE, 1) * 0.95 + 0.05 * done

    def responses(self, step: int) -> dict[str, Any]:
        """Draw the columns of responses that do not depend on tokens.

        There is one row per response.
        """
        rng, done, shape = self.rng, self.progress(step), self.shape
        prompts = self._order[np.arange((step - 1) * shape.prompts, step * shape.prompts) % TRAIN_PROMPTS]
        ease = np.repeat(self._ease[prompts], GROUP) + 3 * done - 1
        is_correct = rng.random(shape.responses) < 1 / (1 + np.exp(-ease))
        grouped = is_correct.reshape(shape.prompts, GROUP)
        std = grouped.std(1, keepdims=True)
        length = np.exp(rng.normal(np.log(shape.mean_length) - 0.17, 0.6, shape.responses)).astype(np.int32)
        return {
            "step": step,
            "prompt_id": self._prompt_ids.take(pa.array(np.repeat(prompts, GROUP))),
            "rollout_id": (step - 1) * shape.responses + np.arange(shape.responses),
            "group_id": (step - 1) * shape.prompts + np.repeat(np.arange(shape.prompts), GROUP),
            "is_correct": is_correct,
            "response_length": np.clip(length, 2, shape.max_length),
            "is_kept": np.repeat(std.ravel() > 0, GROUP),
            "advantage": ((grouped - grouped.mean(1, keepdims=True)) / np.where(std > 0, std, 1)).ravel(),
        }

    def tokens(self, responses: dict[str, Any]) -> dict[str, Any]:
        """Draw the tokens of ``responses``, one row per token."""
        rng, step, length = self.rng, responses["step"], responses["response_length"]
        row = np.repeat(np.arange(self.shape.responses), length)
        position = np.arange(len(row)) - np.repeat(np.cumsum(length) - length, length)
        advantage = responses["advantage"].astype(np.float32)
        shift_of_length = 0.3 * (2 * position / length[row] - 1) ** 2
        token_id = np.searchsorted(self._cumulative, rng.random(len(row), dtype=np.float32)).clip(
            max=self.shape.words - 1
        )
        level = np.where(responses["is_correct"], 0.35 - 0.05 * self.progress(step), 0.6 - 0.25 * self.progress(step))
        entropy = level[row] * (0.9 + shift_of_length) * self._openness[token_id]
        entropy = (entropy * rng.standard_gamma(0.3, len(row), dtype=np.float32) / 0.3).astype(np.float32)
        logprob = -entropy * rng.standard_exponential(len(row), dtype=np.float32)
        shaped = (advantage * rng.uniform(0.9, 1.1, self.shape.responses)).astype(np.float32)
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
        """Return the columns of table rollouts.

        They are ``responses`` and columns derived from tokens.
        """
        rng, step, length = self.rng, responses["step"], responses["response_length"]
        offsets = np.concatenate(([0], np.cumsum(length)))
        surprisal = -np.add.reduceat(tokens["logprob"], offsets[:-1], dtype=float) / length
        ln_ppl = surprisal.reshape(self.shape.prompts, GROUP)
        z = (ln_ppl - ln_ppl.mean(1, keepdims=True)) / (ln_ppl.std(1, keepdims=True) + 1e-6)
        words = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), self._texts.take(pa.array(tokens["token_id"])))
        bad = rng.random(self.shape.responses) < 0.4 - 0.3 * self.progress(step)
        defect = np.where(bad & ~responses["is_correct"], rng.integers(1, len(DEFECTS), self.shape.responses), 0)
        return {
            **responses,
            "sample_index": np.tile(np.arange(GROUP), self.shape.prompts),
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
        chosen = np.sort(rng.choice(len(tokens["position"]), self.shape.interventions, replace=False))
        row = tokens["rollout_id"][chosen] % self.shape.responses
        rank = rollouts["ppl"].reshape(self.shape.prompts, GROUP).argsort(1).argsort(1).ravel()
        names = ("prompt_id", "rollout_id", "position", "response_length", "token_id", "logprob", "entropy")
        original, alternative = rng.integers(0, 9, (2, len(chosen))) / 8
        return {
            **{name: _take(tokens[name], chosen) for name in names},
            "checkpoint_step": self.steps,
            "seed": 0,
            "step": rollouts["step"],
            "category": _take(self._categories, tokens["token_id"][chosen]),
            "alternative_id": rng.integers(0, self.shape.words, len(chosen)),
            "ppl": rollouts["ppl"][row],
            "ppl_tercile": 1 + rank[row] * 3 // GROUP,
            "is_correct": rollouts["is_correct"][row],
            "num_continuations": 8,
            "accuracy_original": original,
            "accuracy_alternative": alternative,
            "impact": original - alternative,
            "tokens": 16 * self.shape.mean_length,
        }

    def evals(self, step: int) -> dict[str, Any]:
        """Draw eight samples for every held-out prompt."""
        size = self.shape.heldout * GROUP
        is_correct = self.rng.random(size) < 0.3 + 0.4 * self.progress(step)
        return {
            "step": step,
            "benchmark": "simulated",
            "prompt_id": np.repeat([f"heldout-{i:03d}" for i in range(self.shape.heldout)], GROUP),
            "sample_index": np.tile(np.arange(GROUP), self.shape.heldout),
            "answer": np.where(is_correct, "42", "41"),
            "is_correct": is_correct,
            "response_length": self.rng.integers(2, self.shape.max_length, size),
            "entropy_mean": self.rng.gamma(4, 0.1, size),
            "temperature": 1.0,
        }


def write_trace(folder: Path, tokens: int, seed: int = 0) -> Path:
    """Write a run of about ``tokens`` generated tokens; return its folder.

    The run has at least 20 steps.
    """
    steps = max(20, math.ceil(tokens / (LARGE.responses * LARGE.mean_length)))
    manifest = {"run_id": folder.name, "study": "simulated", "arm": "none", "seed": seed}
    with Progress(f"write {folder.name}", steps) as bar:
        _write_run(folder, manifest, Simulation(np.random.default_rng(seed), steps), bar.update)
    return folder


def write_ablation(folder: Path) -> Path:
    """Write runs like those of the tiny ablation; return their folder.

    Arms, seeds, and sizes are equal; no arm has an effect.
    """
    grid = tomllib.loads(GRID.read_text())
    cells = [(arm, seed) for arm, table in grid["arms"].items() for seed in table.get("seeds", grid["seeds"])]
    with Progress(f"write {folder.name}", len(cells)) as bar:
        for done, (arm, seed) in enumerate(cells, start=1):
            name = f"{arm}-seed{seed}"
            manifest = {"run_id": name, "study": folder.name, "arm": arm, "seed": seed, "baseline": grid["baseline"]}
            _write_run(folder / name, manifest, Simulation(np.random.default_rng(done), TINY_STEPS, TINY))
            bar.update(done)
    return folder


def _write_run(
    folder: Path, manifest: dict[str, Any], simulation: Simulation, on_step: Callable[[int], None] = lambda step: None
) -> None:
    steps, shape = simulation.steps, simulation.shape
    writer = TraceWriter.create(folder, {**manifest, "total_steps": steps}, simulation.vocab)
    for split, size in (("train", TRAIN_PROMPTS), ("heldout", shape.heldout)):
        width = len(str(size - 1)) + (split == "train")
        ids = [f"{split}-{i:0{width}d}" for i in range(size)]
        row = {"split": split, "task": "simulated", "prompt": "6 * 7 =", "ground_truth": "42"}
        writer.append("prompts", {"prompt_id": ids, **row})
    writer.append("evals", simulation.evals(0))
    for step in range(1, steps + 1):
        _append_step(writer, simulation, step)
        if step % shape.flush_every == 0 or step == steps:
            writer.flush(step)
        on_step(step)
    writer.finish()


def write_study(folder: Path, runs: int) -> Path:
    """Write ``runs`` small runs of 25 steps; return their folder.

    They hold steps, evaluations, prompts, and vocabulary.
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
            writer.append(
                "steps", _step_row(step, accuracy=0.5, format_rate=1.0, entropy=1 / step, tokens=8, kept=2, dropped=126)
            )
        writer.flush(25)
        writer.finish()
    return folder


def _append_step(writer: TraceWriter, simulation: Simulation, step: int) -> None:
    responses = simulation.responses(step)
    tokens = simulation.tokens(responses)
    rollouts = simulation.complete(responses, tokens)
    writer.append("tokens", tokens)
    writer.append("rollouts", rollouts)
    if simulation.shape.interventions:
        writer.append("interventions", simulation.interventions(rollouts, tokens))
    if step % simulation.shape.eval_every == 0 or step == simulation.steps:
        writer.append("evals", simulation.evals(step))
    accuracy = float(responses["is_correct"].mean())
    row = _step_row(
        step,
        accuracy=accuracy,
        format_rate=float(rollouts["has_answer"].mean()),
        entropy=float(tokens["entropy"].mean(dtype=float)),
        tokens=len(tokens["position"]),
        kept=int(responses["is_kept"].sum()) // GROUP,
        dropped=int((~responses["is_kept"]).sum()) // GROUP,
    )
    writer.append("steps", row)


def _step_row(
    step: int, *, accuracy: float, format_rate: float, entropy: float, tokens: int, kept: int, dropped: int
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
        "groups_dropped": dropped,
        "is_shaped": False,
    }


def _take(values: Any, rows: np.ndarray) -> Any:
    return values.take(pa.array(rows)) if isinstance(values, pa.Array) else values[rows]
