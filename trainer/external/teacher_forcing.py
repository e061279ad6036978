"""Traces of rollouts that other trainers sampled: one teacher-forced pass over what they wrote down.

Whatever a pass over prompt and response can tell is recorded as in training: log-probability, entropy and gradient norm
of every token under one model, perplexity, categories, defects, group-relative advantages. What it cannot tell, such as
what an update did, is null, and ``unknown`` in ``run.json`` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from entrace.analysis.trace import InputError, TraceWriter, describe_machine, find_defects, read_manifest
from entrace.analysis.trace.parts import last_step, last_whole_step, listed_files
from entrace.trainer.algorithm.advantages import group_relative_advantage, place_in_group, ppl_z
from entrace.trainer.external.plain_rollouts import Counts, PlainRollouts
from entrace.trainer.external.rollout_rows import Rollout, ScoreSettings
from entrace.trainer.faults import TrainingError, memory_advice, translate_errors
from entrace.trainer.kernels.packing import cut_by_tokens
from entrace.trainer.kernels.token_stats import TokenStats, compute_token_stats, lm_head_grad_norm
from entrace.trainer.model.policy import Policy
from entrace.trainer.runs.recording import finalize_on_exit
from entrace.trainer.runs.run_folder import has_begun, hash_file, hash_weights

# Of tokens: scored together, as far as groups can be kept whole, and made durable together, as far as steps can.
CHUNK_TOKENS = 1 << 17
FLUSH_TOKENS = 1 << 20

STEPS_OF_UPDATE = ("loss", "kl", "clip_frac_low", "clip_frac_high", "clip_frac_dual", "grad_norm", "lr")
NO_UPDATE = "the rows hold what was sampled, not what an update did"
UNKNOWN = {
    "policy.entropy": "entropy is that of the model that scored, not of the policies that sampled",
    "rollouts.length_penalty": "the rows give one reward, and not what was deducted in it for length",
    "rollouts.drop_reason": NO_UPDATE,
    "rollouts.policy_step": "the rows do not say how many updates the sampling policy had received",
    "rollouts.answer_class": "the rows do not say which answers count as equal",
    "interventions": "a trace scored afterwards has no checkpoint to go on from",
    "evals": "the rows hold no held-out evaluation",
    **{f"tokens.{name}": NO_UPDATE for name in ("logprob_after", "entropy_after", "is_clipped")},
    **{f"steps.{name}": NO_UPDATE for name in STEPS_OF_UPDATE},
    "steps.is_shaped": NO_UPDATE,
    **{f"steps.{name}": "not timed" for name in ("rollout_s", "reward_s", "update_s", "record_s")},
}
# What hangs on fields that rows may have; where some have it, the others are null.
FROM_FIELDS = {
    "answer": ("rollouts.answer", "rollouts.has_answer", "steps.format_rate"),
    "is_truncated": ("rollouts.is_truncated",),
    "ground_truth": ("prompts.ground_truth",),
}


def score(
    rollouts: PlainRollouts,
    sources: Sequence[Path],
    settings: ScoreSettings,
    policy: Policy,
    run_dir: Path,
    *,
    resume: bool = False,
    on_step: Callable[..., None] = lambda done, note, **figures: None,
) -> None:
    """Records rollouts in ``run_dir``, every token scored by ``policy``.

    Args:
        rollouts: What was read of ``sources``.
        sources: Files, for ``run.json``.
        settings: How they were read, and are scored.
        policy: The model; log-probabilities and entropies are its own, whoever sampled.
        run_dir: Folder of the trace; its name is the run id.
        resume: Go on after the steps that the folder holds.
        on_step: Called with the number of responses done, the step, and figures to show.

    Raises:
        InputError: the folder cannot be used.
        TrainingError: memory or disk ran out, or the model gives no finite numbers.
    """
    with translate_errors(run_dir):
        writer, done = _open_trace(rollouts, _describe(rollouts, sources, settings), policy, run_dir, resume)
        with finalize_on_exit(writer):
            _score_steps(rollouts, settings, policy, writer, done, on_step)


def check_target(run_dir: Path, resume: bool) -> None:
    """Refuses a folder that holds something, before anything is read.

    Raises:
        InputError: it does, and is no trace that shall be gone on with.
    """
    is_used = run_dir.is_dir() and any(not path.name.startswith(".") for path in run_dir.iterdir())
    if is_used and not (resume and has_begun(run_dir)):
        raise InputError(f"{run_dir}: already holds files; choose another folder, or continue with --resume")


def _describe(rollouts: PlainRollouts, sources: Sequence[Path], settings: ScoreSettings) -> dict[str, Any]:
    """What ``run.json`` says of how the trace was made; equal for those that may be gone on with."""
    counts = rollouts.counts
    exact = counts.known["response_ids"]
    masked = f", without {counts.masked} outside loss_mask" if counts.masked else ""
    return {
        "files": {str(path): hash_file(path) for path in sources},
        "weights": hash_weights(settings.policy.path),
        "rows": counts.rows,
        "bad_rows": counts.bad_rows,
        "fields": dict(rollouts.fields),
        "advantage": "as given" if "advantage" in rollouts.fields else "group-relative, from rewards",
        "response_tokens": (
            f"as given{masked}" if exact == counts.rollouts else f"text tokenized anew, except {exact} rows{masked}"
        ),
        "settings": settings.model_dump(mode="json", exclude={"batch_tokens"}),
    }


def _open_trace(
    rollouts: PlainRollouts, scored: Mapping[str, Any], policy: Policy, run_dir: Path, resume: bool
) -> tuple[TraceWriter, int]:
    """A new trace, or the one to go on with; and the last step that it holds, -1 for none."""
    if resume and has_begun(run_dir):
        manifest = read_manifest(run_dir)
        before = manifest.get("scored")
        if before is None:
            raise InputError(f"{run_dir}: not a trace of entrace score; choose another folder")
        if before != scored:
            changed = ", ".join(key for key in {**before, **scored} if before.get(key) != scored.get(key))
            raise InputError(f"{run_dir}: scored with other {changed}; choose another folder")
        whole, damage = last_whole_step(run_dir, manifest)
        begins = any(last_step(name) <= whole for name in listed_files(run_dir, manifest).get("vocab", {}))
        if begins and (whole or not damage):
            return TraceWriter.resume(run_dir, whole), whole
    manifest = {
        "run_id": run_dir.name,
        "study": run_dir.resolve().parent.name,
        "model": policy.name,
        "task": " + ".join(dict.fromkeys(Path(path).stem for path in scored["files"])),
        "total_steps": len(rollouts.counts.steps),
        "config": {"score": scored["settings"]},
        "scored": scored,
        "unknown": _unknown(rollouts.counts),
        **describe_machine(),
    }
    return TraceWriter.create(run_dir, manifest, policy.vocab(), replace=resume), -1


def _unknown(counts: Counts) -> dict[str, str]:
    """Why columns are null, by table and column."""
    reasons = dict(UNKNOWN)
    for field, columns in FROM_FIELDS.items():
        missing = counts.rollouts - counts.known[field]
        if missing:
            rows = "the rows have" if missing == counts.rollouts else f"{missing} of {counts.rollouts} rows have"
            reasons |= dict.fromkeys(columns, f'{rows} no "{field}"')
    return reasons


def _score_steps(
    rollouts: PlainRollouts,
    settings: ScoreSettings,
    policy: Policy,
    writer: TraceWriter,
    done: int,
    on_step: Callable[..., None],
) -> None:
    num_done = buffered = 0
    prompts: set[str] = set()
    for step, of_step in groupby(rollouts.in_order(), key=lambda rollout: rollout.step):
        if step <= done:
            for rollout in of_step:
                prompts.add(rollout.prompt_id)
                num_done += 1
            continue
        sums = _StepSums()
        for chunk in _chunks(of_step):
            _record_prompts(writer, chunk, prompts)
            sums.add(chunk, _record_chunk(writer, chunk, settings, policy, first_rollout_id=num_done))
            num_done += len(chunk)
            on_step(num_done, f"step {step}", entropy=sums.entropy / sums.tokens)
        writer.append("steps", {"step": step, **sums.figures()})
        writer.end_step(step)
        buffered += sums.tokens
        if buffered >= FLUSH_TOKENS:
            writer.flush()
            buffered = 0
    writer.flush()


def _chunks(rollouts: Iterator[Rollout]) -> Iterator[list[Rollout]]:
    """Whole groups, of ``CHUNK_TOKENS`` together; a group of more is a chunk of its own."""
    chunk: list[Rollout] = []
    num_tokens = 0
    for _, of_group in groupby(rollouts, key=lambda rollout: rollout.group_id):
        group = list(of_group)
        of_this = sum(len(rollout.response_ids) for rollout in group)
        if chunk and num_tokens + of_this > CHUNK_TOKENS:
            yield chunk
            chunk, num_tokens = [], 0
        chunk += group
        num_tokens += of_this
    yield chunk


@dataclass
class _StepSums:
    """What a step's row of table ``steps`` is made of; ``answered`` of those of which it is known."""

    rollouts: int = 0
    reward: float = 0.0
    correct: int = 0
    known_answers: int = 0
    answered: int = 0
    tokens: int = 0
    entropy: float = 0.0
    groups: int = 0
    groups_kept: int = 0

    def add(self, chunk: Sequence[Rollout], scored: _Scored) -> None:
        """Adds one chunk."""
        self.rollouts += len(chunk)
        self.reward += sum(rollout.reward for rollout in chunk)
        self.correct += sum(rollout.is_correct for rollout in chunk)
        self.known_answers += sum(rollout.has_answer is not None for rollout in chunk)
        self.answered += sum(bool(rollout.has_answer) for rollout in chunk)
        self.tokens += len(scored.stats.entropy)
        self.entropy += float(scored.stats.entropy.double().sum())
        self.groups += len(scored.group_is_kept)
        self.groups_kept += int(scored.group_is_kept.sum())

    def figures(self) -> dict[str, Any]:
        """Columns of table ``steps``."""
        return {
            "reward_mean": self.reward / self.rollouts,
            "accuracy": self.correct / self.rollouts,
            "format_rate": self.answered / self.known_answers if self.known_answers else None,
            "entropy_token_mean": self.entropy / self.tokens,
            "tokens": self.tokens,
            "groups_kept": self.groups_kept,
            "groups_dropped": self.groups - self.groups_kept,
        }


@dataclass(frozen=True)
class _Scored:
    """A chunk's numbers: of tokens, end to end (N,), of responses (B,), and of groups (G,).

    A group is kept if any of its advantages is not 0: only then had it a gradient, whatever its trainer did with it.
    """

    stats: TokenStats
    hidden_norm: Tensor
    lengths: Tensor
    group_ids: Tensor
    advantages: Tensor
    group_is_kept: Tensor

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the tokens of each response, (N,) -> (B,)."""
        rows = torch.arange(len(self.lengths)).repeat_interleave(self.lengths)
        sums = torch.zeros(len(self.lengths), dtype=torch.float64).index_add(0, rows, values.double())
        return (sums / self.lengths).float()


def _score_chunk(chunk: Sequence[Rollout], settings: ScoreSettings, policy: Policy) -> _Scored:
    _, ids = np.unique([rollout.group_id for rollout in chunk], return_inverse=True)
    group_ids = torch.from_numpy(ids)
    given = [rollout.advantage for rollout in chunk if rollout.advantage is not None]
    # In float64: what rewards of other trainers are squared to may not fit into less.
    rewards = torch.tensor([rollout.reward for rollout in chunk], dtype=torch.float64)
    relative = group_relative_advantage(rewards, group_ids)
    advantages = torch.tensor(given) if given else relative.float()
    largest = torch.zeros(int(group_ids.max()) + 1).scatter_reduce(0, group_ids, advantages.abs(), "amax")
    with memory_advice(settings, f"scoring step {chunk[0].step}", "batch_tokens"):
        stats, hidden_norm, lengths = _read(chunk, settings, policy)
    return _Scored(stats, hidden_norm, lengths, group_ids, advantages, largest > 0)


@torch.no_grad()
def _read(chunk: Sequence[Rollout], settings: ScoreSettings, policy: Policy) -> tuple[TokenStats, Tensor, Tensor]:
    """Return statistics of generated tokens, norms of the LM head's inputs, and the number of tokens per response.

    A token outside ``loss_mask`` is read by those after it, and otherwise left out.

    Returns:
        ``TokenStats`` and norms, end to end, (N,); lengths, (B,).
    """
    lengths = torch.tensor([len(rollout.response_ids) for rollout in chunk])
    starts = lengths.cumsum(0) - lengths
    values = torch.empty(4, int(lengths.sum()))
    whole = lengths + torch.tensor([len(rollout.prompt_ids) for rollout in chunk])
    for part in cut_by_tokens(whole, settings.batch_tokens, is_padded=not policy.uses_packing):
        chosen = [chunk[i] for i in part.tolist()]
        responses = [torch.tensor(rollout.response_ids) for rollout in chosen]
        hidden, targets, index = policy.forward_unique([rollout.prompt_ids for rollout in chosen], responses)
        stats = compute_token_stats(hidden, policy.head, targets, settings.temperature)
        places = torch.cat([torch.arange(len(r)) + start for r, start in zip(responses, starts[part], strict=True)])
        distinct = torch.stack([*vars(stats).values(), hidden.float().norm(dim=-1)])
        values[:, places] = distinct[:, index].cpu()
    if not values.isfinite().all():
        first = int((~values.isfinite()).any(0).nonzero()[0])
        place = chunk[int(torch.searchsorted(starts, first, right=True)) - 1].place
        raise TrainingError(f"{place}: {policy.name} gives no finite probabilities to this response")
    marks = [torch.tensor(rollout.is_generated) for rollout in chunk]
    values = values[:, torch.cat(marks)]
    return TokenStats(*values[:3]), values[3], torch.stack([mark.sum() for mark in marks])


def _record_prompts(writer: TraceWriter, chunk: Sequence[Rollout], known: set[str]) -> None:
    new = {rollout.prompt_id: rollout for rollout in reversed(chunk) if rollout.prompt_id not in known}
    known.update(new)
    columns = ("prompt_id", "task", "prompt", "ground_truth")
    rows = {name: [getattr(rollout, name) for rollout in new.values()] for name in columns}
    writer.append("prompts", {"split": "train", **rows})


def _record_chunk(
    writer: TraceWriter, chunk: Sequence[Rollout], settings: ScoreSettings, policy: Policy, first_rollout_id: int
) -> _Scored:
    """Adds a chunk's rollouts and tokens."""
    scored = _score_chunk(chunk, settings, policy)
    stats, lengths = scored.stats, scored.lengths.numpy()
    rollout_ids = first_rollout_id + np.arange(len(chunk))
    prompt_ids = np.array([rollout.prompt_id for rollout in chunk], dtype=object)
    is_correct = np.array([rollout.is_correct for rollout in chunk])
    is_kept = scored.group_is_kept[scored.group_ids].numpy()
    # A group's first response identifies it, as in training.
    first_of_group = np.unique(scored.group_ids, return_index=True)[1]
    surprisal = scored.mean(-stats.logprob)
    as_read = ("completion", "answer", "reward", "has_answer", "is_truncated")
    writer.append(
        "rollouts",
        {
            "step": chunk[0].step,
            "prompt_id": prompt_ids,
            "rollout_id": rollout_ids,
            "group_id": rollout_ids[first_of_group][scored.group_ids],
            "sample_index": place_in_group(scored.group_ids).numpy(),
            **{name: [getattr(rollout, name) for rollout in chunk] for name in as_read},
            "is_correct": is_correct,
            "defects": [
                find_defects(r.prompt, r.completion, has_answer=r.has_answer, is_truncated=r.is_truncated)
                for r in chunk
            ],
            "response_length": lengths,
            "is_kept": is_kept,
            "entropy_mean": scored.mean(stats.entropy).numpy(),
            "surprisal_mean": surprisal.numpy(),
            "ppl": surprisal.exp().numpy(),
            "ppl_z": ppl_z(-surprisal[:, None], scored.lengths[:, None] > 0, scored.group_ids).numpy(),
            "advantage": scored.advantages.numpy(),
            "temperature": settings.temperature,
            "entropy_kind": "exact",
        },
    )
    rows = np.repeat(np.arange(len(chunk)), lengths)
    advantages = scored.advantages[rows]
    grad_norm = lm_head_grad_norm(advantages, stats.logprob, stats.sum_p2, scored.hidden_norm, settings.temperature)
    writer.append(
        "tokens",
        {
            "step": chunk[0].step,
            "prompt_id": prompt_ids[rows],
            "rollout_id": rollout_ids[rows],
            "position": np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths),
            "response_length": lengths[rows],
            "token_id": np.concatenate([rollout.generated_ids for rollout in chunk]),
            "logprob": stats.logprob.numpy(),
            "entropy": stats.entropy.numpy(),
            "advantage": advantages.numpy(),
            "shaped_advantage": advantages.numpy(),
            "grad_norm": grad_norm.numpy(),
            "is_correct": is_correct[rows],
            "is_kept": is_kept[rows],
        },
    )
    return scored
