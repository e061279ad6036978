"""Convert the batch of a step into rows of the trace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from entrace.analysis.trace import TraceWriter
from entrace.analysis.trace.rows import ResponseRows
from entrace.analysis.trace.sampling import TokenSampling, response_draws
from entrace.trainer.algorithm.advantages import mean_surprisal
from entrace.trainer.config import Config
from entrace.trainer.kernels.token_stats import lm_head_grad_norm
from entrace.trainer.learner import AfterUpdate, UpdateMetrics
from entrace.trainer.parallel.ranks import Ranks
from entrace.trainer.rollouts import Batch
from entrace.trainer.seeding import Stream, generator
from entrace.trainer.tasks import Prompt, Task, answer_classes


@dataclass(frozen=True)
class TokenSample:
    """Responses of a step with stored tokens, and those with after-update values.

    Attributes:
        is_stored: (B,) bool.
        captured: Rows to evaluate under the updated weights, (n,); none on a step without capture.
    """

    is_stored: Tensor
    captured: Tensor


def sample_tokens(
    config: Config, sampling: TokenSampling, batch: Batch, step: int, first_rollout_id: int
) -> TokenSample:
    """Choose the responses whose tokens and after-update values are stored.

    After-update values are captured only where tokens are stored. Single responses, not whole groups, are captured: the
    effect of an update varies more between prompts than within a prompt.
    """
    rollout_ids = first_rollout_id + np.arange(len(batch.prompts))
    draws = torch.from_numpy(response_draws(config.seed, step, rollout_ids))
    is_stored = draws < sampling.responses
    captured = torch.empty(0, dtype=torch.int64)
    if config.record.captures(step):
        kept = torch.nonzero(batch.is_kept).squeeze(1).numpy()
        chosen = generator(config.seed, Stream.CAPTURE, step).permutation(kept)[: config.record.after_update_responses]
        # Filtered last: a run that is sampled captures what is left of a full run once it is pruned.
        captured = torch.from_numpy(chosen[is_stored.numpy()[chosen]])
    if not len(captured) and not sampling.has_step(step, is_last=step == config.steps):
        is_stored = torch.zeros_like(is_stored)
    return TokenSample(is_stored, captured)


def record_prompts(writer: TraceWriter, prompts: list[Prompt]) -> None:
    """Add prompts that the trace does not hold yet."""
    columns = ("prompt_id", "split", "task", "ground_truth", "difficulty")
    rows = {name: [getattr(prompt, name) for prompt in prompts] for name in columns}
    writer.append("prompts", {**rows, "prompt": [prompt.text for prompt in prompts]})


def record_batch(
    writer: TraceWriter,
    batch: Batch,
    advantages: Tensor,
    shaped: Tensor,
    after: AfterUpdate | None,
    *,
    step: int,
    first_rollout_id: int,
    temperature: float,
    is_stored: Tensor | None = None,
    measured: Mapping[str, Tensor] | None = None,
) -> None:
    """Add the tokens and rollouts that this process sampled, and the step's prompts.

    Args:
        writer: The trace; rank 0 writes the prompts.
        batch: Responses of the step, dropped groups included.
        advantages: Group-relative advantages, (B,).
        shaped: Shaped advantages, (B, T).
        after: Effect of the update on the kept responses; None on steps without capture.
        step: Current step; the sampling policy had received ``step - 1`` updates.
        first_rollout_id: Id of the batch's first response.
        temperature: Sampling temperature.
        is_stored: Responses whose tokens are stored, (B,) bool (default: all).
        measured: Further columns of the stored tokens, (B, T) by name (default: none).
    """
    if writer.rank == 0:
        record_prompts(writer, batch.new_prompts)
    rollouts = batch.rollouts
    own = np.flatnonzero(batch.is_own.numpy())
    prompts, scores = [batch.prompts[row] for row in own], [batch.scores[row] for row in own]
    responses = ResponseRows(
        step=step,
        rollout_ids=first_rollout_id + own,
        groups=batch.group_ids.numpy()[own],
        prompt_ids=[prompt.prompt_id for prompt in prompts],
        lengths=rollouts.lengths.numpy()[own],
        is_correct=[score.is_correct for score in scores],
        is_kept=batch.is_kept.numpy()[own],
    )
    surprisal = mean_surprisal(rollouts.stats.logprob, rollouts.response_mask).numpy()[own]
    writer.append(
        "rollouts",
        {
            **responses.rollout_columns(
                [prompt.text for prompt in prompts],
                [batch.completions[row] for row in own],
                has_answer=[score.answer is not None for score in scores],
                is_truncated=rollouts.is_truncated.numpy()[own].tolist(),
            ),
            "temperature": temperature,
            "entropy_kind": "exact",
            "policy_step": step - 1,
            "advantage": advantages.numpy()[own],
            "answer": [score.answer for score in scores],
            "answer_class": _answer_classes(batch, own),
            "reward": pa.array(batch.rewards.numpy()[own], mask=~batch.has_verdict.numpy()[own]),
            "length_penalty": batch.length_penalties.numpy()[own],
            "drop_reason": [batch.drop_reasons[row] for row in own],
            **responses.generated_columns(
                responses.lengths, rollouts.entropy_mean.numpy()[own], surprisal, has_ppl_z=~np.isnan(surprisal)
            ),
        },
    )
    is_stored = batch.is_own if is_stored is None else batch.is_own & is_stored
    mask = (rollouts.response_mask & is_stored[:, None]).numpy()
    if not mask.any():
        return
    places = np.nonzero(mask[own])[0]
    rows, reported = own[places], rollouts.sampling_logprob
    grad_norm = lm_head_grad_norm(
        shaped, rollouts.stats.logprob, rollouts.stats.sum_p2, rollouts.hidden_norm, temperature
    )
    writer.append(
        "tokens",
        {
            **responses.token_columns(places),
            "token_id": rollouts.response_ids.numpy()[mask],
            "logprob": rollouts.stats.logprob.numpy()[mask],
            "entropy": rollouts.stats.entropy.numpy()[mask],
            "advantage": advantages.numpy()[rows],
            "shaped_advantage": shaped.numpy()[mask],
            "grad_norm": grad_norm.numpy()[mask],
            **({} if reported is None else {"sampling_logprob": reported.numpy()[mask]}),
            **{name: values.numpy()[mask] for name, values in (measured or {}).items()},
            **(_after_columns(batch, after, mask, rows) if after else {}),
        },
    )


def _after_columns(batch: Batch, after: AfterUpdate, mask: np.ndarray, rows: np.ndarray) -> dict[str, pa.Array]:
    """Return the after-update columns of tokens ``mask`` of responses ``rows``.

    Clipping is known for all responses in the update, probabilities only for those that were evaluated again.
    """
    is_kept, is_evaluated = batch.is_kept.numpy()[rows], after.is_evaluated.numpy()[rows]
    is_known = {"logprob_after": is_evaluated, "entropy_after": is_evaluated, "is_clipped": is_kept}
    return {name: pa.array(getattr(after, name).numpy()[mask], mask=~known) for name, known in is_known.items()}


def _answer_classes(batch: Batch, own: np.ndarray) -> list[str | None]:
    """Return the class of each own answer, group by group.

    One process holds all responses of a group.
    """
    classes: list[str | None] = []
    for _, rows in groupby(own, key=batch.group_ids.tolist().__getitem__):
        group = list(rows)
        classes += answer_classes(batch.prompts[group[0]], [batch.scores[row] for row in group])
    return classes


class StepRecorder:
    """Record each step and its evaluation, and keep the run's counts.

    Counts are in its manifest.
    """

    def __init__(self, task: Task, writer: TraceWriter, ranks: Ranks) -> None:
        """Start from the counts in the manifest."""
        self._task, self._writer, self._ranks = task, writer, ranks
        self._timeouts_before = writer.manifest.get("verifier_timeouts", 0)
        self._num_unjudged = writer.manifest.get("responses_without_verdict", 0)

    def record_evaluation(self, rows: dict[str, Any]) -> None:
        """Add the rows of an evaluation, which every rank holds."""
        if self._ranks.is_main:
            self._writer.append("evals", rows)

    def record_step(
        self, step: int, batch: Batch, metrics: UpdateMetrics, *, is_shaped: bool, lr: float, **seconds: float
    ) -> dict[str, Any]:
        """Add the row of a step, end the step on all ranks, and return the row.

        Args:
            step: The step.
            batch: Its responses.
            metrics: Metrics of the update.
            is_shaped: Whether any shaping method was on.
            lr: Learning rate of the update.
            **seconds: Durations of phases, as columns of table ``steps``.
        """
        row = {"step": step, "is_shaped": is_shaped, **summarize_step(batch, metrics, lr), **seconds}
        if self._ranks.is_main:
            self._writer.append("steps", row)
        manifest = self._writer.manifest
        if num_timeouts := sum(self._ranks.all_gather_object(self._task.num_timeouts)):
            manifest["verifier_timeouts"] = self._timeouts_before + num_timeouts
        self._num_unjudged += int((~batch.has_verdict).sum())
        if self._num_unjudged:
            manifest["responses_without_verdict"] = self._num_unjudged
        # The gather above has synchronized the ranks, so the step has ended on each of them.
        self._writer.end_step(step)
        return row


def summarize_step(batch: Batch, metrics: UpdateMetrics, lr: float) -> dict[str, Any]:
    """Return the columns of table ``steps`` that derive from a batch and its update."""
    mask = batch.rollouts.response_mask
    kept = int(batch.group_ids[batch.is_kept].unique().numel())
    return {
        "loss": metrics.loss,
        "reward_mean": float(batch.rewards[batch.has_verdict].mean()),
        "accuracy": sum(bool(score.is_correct) for score in batch.scores) / int(batch.has_verdict.sum()),
        "format_rate": sum(score.answer is not None for score in batch.scores) / len(batch.scores),
        "entropy_token_mean": float(batch.rollouts.stats.entropy[mask].mean()),
        "kl": metrics.kl,
        "clip_frac_low": metrics.clip_frac_low,
        "clip_frac_high": metrics.clip_frac_high,
        "clip_frac_dual": metrics.clip_frac_dual,
        "grad_norm": metrics.grad_norm,
        "lr": lr,
        "tokens": int(mask.sum()),
        "groups_kept": kept,
        "groups_dropped": int(batch.group_ids[-1]) + 1 - kept,
        "rollout_s": batch.rollout_s,
        "reward_s": batch.reward_s,
    }


def progress_metrics(row: dict[str, Any]) -> dict[str, float]:
    """Return the metrics that a progress line shows for a row of table ``steps``."""
    seconds = sum(row[name] for name in ("rollout_s", "reward_s", "update_s", "record_s"))
    return {
        "reward": row["reward_mean"],
        "accuracy": row["accuracy"],
        "entropy": row["entropy_token_mean"],
        "tokens_per_s": row["tokens"] / seconds,
    }
