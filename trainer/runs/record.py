"""Turns a step's batch into rows of the trace."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from entrace.analysis.trace import TraceWriter, find_defects
from entrace.trainer.algorithm.advantages import mean_surprisal, ppl_z
from entrace.trainer.kernels.token_stats import lm_head_grad_norm
from entrace.trainer.learner import AfterUpdate
from entrace.trainer.rollouts import Batch
from entrace.trainer.tasks import Prompt, answer_classes


def record_prompts(writer: TraceWriter, prompts: list[Prompt]) -> None:
    """Adds prompts that the trace has not seen yet."""
    columns = ("prompt_id", "split", "task", "ground_truth", "difficulty")
    rows = {name: [getattr(prompt, name) for prompt in prompts] for name in columns}
    writer.append("prompts", {**rows, "prompt": [prompt.text for prompt in prompts]})


def record_batch(
    writer: TraceWriter,
    batch: Batch,
    shaped: Tensor,
    after: AfterUpdate | None,
    *,
    step: int,
    first_rollout_id: int,
    temperature: float,
) -> None:
    """Adds one step's tokens and rollouts, of these the process's own, and its prompts.

    Args:
        writer: The trace; that of rank 0 takes the prompts.
        batch: The step's responses, dropped groups included.
        shaped: Shaped advantages, (B, T).
        after: What the update did to the kept responses; None on steps where it is not captured.
        step: Current step; the policy that sampled had received ``step - 1`` updates.
        first_rollout_id: Id of the batch's first response.
        temperature: Sampling temperature.
    """
    num_samples = len(batch.prompts) // int(batch.group_ids[-1] + 1)
    if writer.rank == 0:
        record_prompts(writer, batch.new_prompts)
    own = np.flatnonzero(batch.is_own.numpy())
    rollout_ids = first_rollout_id + np.arange(len(batch.prompts))
    prompt_ids = pa.array([prompt.prompt_id for prompt in batch.prompts])
    is_correct = pa.array([score.is_correct for score in batch.scores], pa.bool_())
    writer.append(
        "rollouts",
        {
            "step": step,
            "prompt_id": prompt_ids.take(pa.array(own)),
            "rollout_id": rollout_ids[own],
            # Its first response identifies a group within the run.
            "group_id": first_rollout_id + num_samples * batch.group_ids.numpy()[own],
            "sample_index": own % num_samples,
            "is_correct": is_correct.take(pa.array(own)),
            "temperature": temperature,
            "entropy_kind": "exact",
            "policy_step": step - 1,
            **_response_columns(batch, own),
        },
    )
    samples = batch.rollouts
    mask = (samples.response_mask & batch.is_own[:, None]).numpy()
    lengths = samples.lengths.numpy()
    rows, positions = np.nonzero(mask)
    grad_norm = lm_head_grad_norm(shaped, samples.stats.logprob, samples.stats.sum_p2, samples.hidden_norm, temperature)
    writer.append(
        "tokens",
        {
            "step": step,
            "prompt_id": prompt_ids.take(pa.array(rows)),
            "rollout_id": rollout_ids[rows],
            "position": positions,
            "response_length": lengths[rows],
            "token_id": samples.response_ids.numpy()[mask],
            "logprob": samples.stats.logprob.numpy()[mask],
            "entropy": samples.stats.entropy.numpy()[mask],
            "advantage": batch.advantages.numpy()[rows],
            "shaped_advantage": shaped.numpy()[mask],
            "grad_norm": grad_norm.numpy()[mask],
            "is_correct": is_correct.take(pa.array(rows)),
            "is_kept": batch.is_kept.numpy()[rows],
            **(_after_columns(batch, after, mask, rows) if after else {}),
        },
    )


def _after_columns(batch: Batch, after: AfterUpdate, mask: np.ndarray, rows: np.ndarray) -> dict[str, pa.Array]:
    """After-update columns of the tokens in ``mask``, of the responses ``rows``.

    Clipping is known wherever the response took part in the update, probabilities only where it was scored again.
    """
    is_kept, is_scored = batch.is_kept.numpy()[rows], after.is_scored.numpy()[rows]
    is_known = {"logprob_after": is_scored, "entropy_after": is_scored, "is_clipped": is_kept}
    return {name: pa.array(getattr(after, name).numpy()[mask], mask=~known) for name, known in is_known.items()}


def _response_columns(batch: Batch, own: np.ndarray) -> dict[str, Any]:
    samples = batch.rollouts
    surprisal = mean_surprisal(samples.stats.logprob, samples.response_mask)
    z = ppl_z(samples.stats.logprob, samples.response_mask, batch.group_ids)
    completions, scores = [batch.completions[row] for row in own], [batch.scores[row] for row in own]
    prompts, is_truncated = [batch.prompts[row] for row in own], samples.is_truncated.numpy()[own]
    defects = [
        find_defects(prompt.text, text, has_answer=score.answer is not None, is_truncated=bool(is_cut))
        for prompt, text, score, is_cut in zip(prompts, completions, scores, is_truncated, strict=True)
    ]
    return {
        "completion": completions,
        "answer": [score.answer for score in scores],
        "answer_class": _answer_classes(batch, own),
        "reward": pa.array(batch.rewards.numpy()[own], mask=~batch.has_verdict.numpy()[own]),
        "length_penalty": batch.length_penalties.numpy()[own],
        "has_answer": [score.answer is not None for score in scores],
        "defects": defects,
        "response_length": samples.lengths.numpy()[own],
        "is_truncated": is_truncated,
        "is_kept": batch.is_kept.numpy()[own],
        "drop_reason": [batch.drop_reasons[row] for row in own],
        "entropy_mean": samples.entropy_mean.numpy()[own],
        "surprisal_mean": surprisal.numpy()[own],
        "ppl": surprisal.exp().numpy()[own],
        "ppl_z": z.numpy()[own],
        "advantage": batch.advantages.numpy()[own],
    }


def _answer_classes(batch: Batch, own: np.ndarray) -> list[str | None]:
    """Return the class of each own answer, found group by group; the responses to one prompt have one process."""
    classes: list[str | None] = []
    for _, rows in groupby(own, key=batch.group_ids.tolist().__getitem__):
        group = list(rows)
        classes += answer_classes(batch.prompts[group[0]], [batch.scores[row] for row in group])
    return classes
