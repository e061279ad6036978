"""Provide a trace small enough to check by hand, and a synthetic study."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from entrace.analysis.runs import Runs, open_runs
from entrace.analysis.terminal.export import write
from entrace.analysis.trace import SCHEMA_VERSION, TraceWriter, write_manifest
from tests.analysis.synthetic import Planted, write_run

VOCAB = ["<eos>", "1", " so", " dog"]
BOUNDARY = 10

# rollout_id, step, prompt, is_correct, is_kept, token entropies, ppl, defects. Steps 1 to 5 are the phase "start" and
# 6 to 10 the phase "end" of a rising stage that ends at step 10.
RESPONSES = [
    (1, 1, "a", True, True, [1, 3], 1.5, []),
    (2, 1, "a", False, True, [4, 4], 2.0, ["format_violation"]),
    (3, 1, "b", True, True, [1, 1], 3.0, []),
    (4, 1, "b", False, True, [2, 2], 2.5, ["format_violation", "truncated"]),
    (5, 10, "a", True, True, [1, 1], 1.25, []),
    (6, 10, "a", False, True, [2, 0], 1.5, []),
    (7, 20, "a", True, True, [1, 0.5, 0.5, 0.5, 1], 1.1, []),
    (8, 20, "a", False, True, [2, 1, 1, 1, 0.5], 1.3, []),
    (9, 20, "b", False, True, [1, 1, 1, 1, 1], 1.1, []),
    (10, 20, "b", True, True, [0.5, 0.5, 0.5, 0.5, 0.5], 1.2, []),
    (11, 20, "c", True, False, [0.25] * 5, 1.0, []),
    (12, 20, "c", True, False, [0.25] * 5, 1.0, []),
]
# Every token has probability 1/2 before the update. rollout_id -> its change by the update; steps 1 and responses not
# in the update have none.
MOVED = {
    5: [0.1, 0.1],
    6: [-0.1, 0],
    7: [0.2, 0, 0, 0, 0.1],
    8: [-0.2, 0, 0, 0, -0.1],
    9: [-0.1, 0, 0, 0, 0],
    10: [0.1, 0, 0, 0, 0],
}
# rollout_id -> change of each token's entropy by the update.
ENTROPY_CHANGES = {
    5: [-0.2, 0.1],
    6: [0.1, 0],
    7: [-0.3, 0.1, 0, 0.2, -0.1],
    8: [0.2, -0.1, 0, 0.1, 0],
    9: [0, 0.1, -0.2, 0, 0],
    10: [0.1, 0, 0, -0.1, 0.1],
}
# rollout_id -> entropies under the reference policy.
REFERENCE_ENTROPIES = {
    7: [1, 0.25, 0.25, 0.25, 1],
    8: [0.5, 2, 1, 0.5, 0.5],
    9: [0.5] * 5,
    10: [2, 0.5, 0.5, 0.5, 0.5],
}
# Sums over the other vocabulary entries, at the first token; twice as much at the second, and so on.
VOCABULARY_SUMS = {"sum_p2_others": 0.02, "sum_p2_logp_others": -0.05}
# rollout_id -> positions of clipped tokens.
CLIPPED = {7: [4], 9: [1, 2]}
# rollout_id -> probabilities according to the inference engine.
ENGINE = {7: [0.4, 0.5, 0.5, 0.5, 0.5], 8: [0.5] * 5, 9: [0.5, 0.5, 0.5, 0.5, 0.2]}
# rollout_id -> gradient norms other than 1 (0 where the advantage is).
GRAD_NORMS = {6: [2, 1], 7: [2, 1, 1, 1, 2], 8: [4, 1, 1, 1, 1], 11: [0] * 5, 12: [0] * 5}
# rollout_id -> token ids other than "1" followed by " dog".
TOKEN_IDS = {5: [1, 2], 6: [1, 1]}
# rollout_id, position, ppl_tercile, accuracy with the original token, with the alternative; four continuations each.
INTERVENTIONS = [
    (7, 0, 1, 1.0, 0.5),
    (7, 4, 1, 1.0, 0.75),
    (8, 0, 3, 0.25, 0.5),
    (9, 2, 1, 0.0, 0.0),
    (10, 0, 3, 0.75, 0.25),
    (10, 4, 3, 1.0, 0.0),
]
# step, prompt, answers, is_correct
EVALS = [
    (0, "h1", ["1", "2"], [True, False]),
    (0, "h2", [None, "3"], [False, False]),
    (24, "h1", ["1", "1"], [True, True]),
    (24, "h2", ["3", "4"], [False, True]),
]


def written(frame: pl.DataFrame, form: str, *, is_safe: bool = False) -> bytes:
    """Return the output of ``entrace sql --format``, in parts of three rows."""
    out = io.BytesIO()
    write([frame.clear(), *frame.iter_slices(3)], form, out, is_safe=is_safe)
    return out.getvalue()


def write_tiny(folder: Path) -> Path:
    manifest = {"run_id": folder.name, "arm": "none", "seed": 0, "study": "hand", "total_steps": 24}
    writer = TraceWriter.create(folder, manifest, VOCAB)
    for step, prompt, answers, is_correct in EVALS:
        columns = {"step": step, "benchmark": "held", "prompt_id": prompt, "sample_index": [0, 1], "answer": answers}
        measures = {"is_correct": is_correct, "response_length": [4, 6], "entropy_mean": 0.5, "temperature": 1.0}
        writer.append("evals", columns | measures)
    for row in RESPONSES:
        _append_response(writer, *row)
    for row in INTERVENTIONS:
        _append_intervention(writer, *row)
    for step in range(1, 25):
        done = min(step, BOUNDARY) / BOUNDARY
        writer.append("steps", step_row(step, entropy=2 - 1.5 * done, accuracy=0.25 + 0.5 * done))
    writer.flush(24)
    writer.finish()
    return folder


def step_row(step: int, *, entropy: float, accuracy: float) -> dict[str, object]:
    zeros = ["loss", "clip_frac_low", "clip_frac_high", "grad_norm", "rollout_s", "reward_s", "update_s", "record_s"]
    figures = {"reward_mean": accuracy, "accuracy": accuracy, "format_rate": 1.0, "entropy_token_mean": entropy}
    counts = {"tokens": 8, "groups_kept": 2, "groups_dropped": 0, "is_shaped": False, "lr": 0.1}
    return {**dict.fromkeys(zeros, 0.0), **figures, **counts, "step": step}


def write_steps(folder: Path, steps: Sequence[int] = range(1, 25)) -> Path:
    """Write a run of which only ``steps`` are recorded.

    Its report has two figures and is quick.
    """
    writer = TraceWriter.create(folder, {"run_id": folder.name, "arm": "none", "seed": 0, "study": "s"}, ["a"])
    for step in steps:
        writer.append("steps", step_row(step, entropy=1 / step, accuracy=1 - 0.5 / step))
        writer.end_step(step)
    writer.flush()
    writer.finish()
    return folder


def _append_response(
    writer: TraceWriter,
    rollout_id: int,
    step: int,
    prompt: str,
    is_correct: bool,
    is_kept: bool,
    entropies: list[float],
    ppl: float,
    defects: list[str],
) -> None:
    advantage = (1.0 if is_correct else -1.0) if is_kept else 0.0
    length = len(entropies)
    common = {"step": step, "prompt_id": prompt, "rollout_id": rollout_id, "is_correct": is_correct}
    common |= {"advantage": advantage, "response_length": length, "is_kept": is_kept}
    tokens = {"position": np.arange(length), "entropy": entropies, "logprob": np.log(0.5)}
    tokens["token_id"] = TOKEN_IDS.get(rollout_id, [1] + [3] * (length - 1))
    tokens["grad_norm"] = GRAD_NORMS.get(rollout_id, 1.0)
    if rollout_id in MOVED:
        tokens["logprob_after"] = np.log(0.5 + np.array(MOVED[rollout_id]))
        tokens |= {"entropy_after": np.add(entropies, ENTROPY_CHANGES[rollout_id])}
        tokens |= {name: factor * np.arange(1, length + 1) for name, factor in VOCABULARY_SUMS.items()}
        tokens["is_clipped"] = np.isin(np.arange(length), CLIPPED.get(rollout_id, []))
    if rollout_id in REFERENCE_ENTROPIES:
        tokens["reference_entropy"] = REFERENCE_ENTROPIES[rollout_id]
    if rollout_id in ENGINE:
        tokens["sampling_logprob"] = np.log(ENGINE[rollout_id])
    writer.append("tokens", {**common, **tokens, "shaped_advantage": advantage})
    writer.append(
        "rollouts",
        {
            **common,
            "group_id": (rollout_id - 1) // 2,
            "sample_index": rollout_id % 2,
            "completion": "so 1",
            "answer": None if "format_violation" in defects else "1",
            "reward": float(is_correct),
            "has_answer": "format_violation" not in defects,
            "defects": [defects],
            "is_truncated": "truncated" in defects,
            "entropy_mean": float(np.mean(entropies)),
            "surprisal_mean": float(np.log(ppl)),
            "ppl": ppl,
            "ppl_z": 0.0,
            "temperature": 1.0,
            "entropy_kind": "exact",
            "policy_step": step - 1,
        },
    )


def _append_intervention(
    writer: TraceWriter, rollout_id: int, position: int, ppl_tercile: int, original: float, alternative: float
) -> None:
    _, step, prompt, is_correct, _, entropies, ppl, _ = next(row for row in RESPONSES if row[0] == rollout_id)
    writer.append(
        "interventions",
        {
            "checkpoint_step": 24,
            "seed": 0,
            "selection": "entropy 0-1, position 0-1, ppl_tercile 1,2,3",
            "temperature": 1.0,
            "step": step,
            "prompt_id": prompt,
            "rollout_id": rollout_id,
            "position": position,
            "response_length": len(entropies),
            "token_id": 1 if position == 0 else 3,
            "category": "formal_reasoning" if position == 0 else "semantic_support",
            "alternative_id": 2,
            "logprob": np.log(0.5),
            "entropy": entropies[position],
            "ppl": ppl,
            "ppl_tercile": ppl_tercile,
            "is_correct": is_correct,
            "num_continuations": 4,
            "accuracy_original": original,
            "accuracy_alternative": alternative,
            "impact": original - alternative,
            "tokens": 8,
        },
    )


def write_failed(folder: Path, error: str = "step 3: loss is nan") -> Path:
    """Write a run that failed before any step was durable."""
    folder.mkdir(parents=True)
    manifest = {"schema_version": SCHEMA_VERSION, "run_id": folder.name, "arm": "broken", "seed": 0, "status": "failed"}
    write_manifest(folder, {**manifest, "error": error})
    return folder


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("hand") / "tiny")


@pytest.fixture(scope="session")
def tiny(tiny_path: Path) -> Runs:
    return open_runs(tiny_path)


@pytest.fixture(scope="session")
def study_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Arms none and ppl (better, longer), three seeds of each, and a failed run."""
    root = tmp_path_factory.mktemp("runs") / "study"
    for seed in range(3):
        write_run(root / f"none-seed{seed}", seed=seed)
        better = Planted(eval_accuracy=0.9, eval_length=24, formal_share=0.6)
        write_run(root / f"ppl-seed{seed}", arm="ppl", seed=seed, planted=better)
    write_failed(root / "broken-seed0")
    return root


@pytest.fixture(scope="session")
def study(study_path: Path) -> Runs:
    return open_runs(study_path)
