"""Import rollouts that another trainer sampled: one teacher-forced pass, recorded as a trace.

The pass yields the same columns as training: log-probability, entropy, and gradient norm of every token under one
model, perplexity, categories, defects, and group-relative advantages. Columns that need more than prompt and response,
such as the effect of an update, are null, and ``unknown`` in ``run.json`` gives the reason.
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
from entrace.analysis.trace.manifest import is_before_manifest
from entrace.analysis.trace.parts import last_step, last_whole_step, listed_files
from entrace.trainer.algorithm.advantages import group_relative_advantage, place_in_group, ppl_z
from entrace.trainer.external.plain_rollouts import Counts, PlainRollouts
from entrace.trainer.external.rollout_rows import ImportSettings, Rollout
from entrace.trainer.faults import TrainingError, memory_advice, translate_errors
from entrace.trainer.kernels.blocked_stats import compute_token_stats
from entrace.trainer.kernels.packing import cut_by_tokens
from entrace.trainer.kernels.token_stats import TokenStats, lm_head_grad_norm
from entrace.trainer.model.policy import Policy
from entrace.trainer.runs.recording import finalize_on_exit
from entrace.trainer.runs.run_folder import has_begun, hash_file, hash_weights

# Tokens per chunk, which holds whole groups, and tokens between two flushes, which come after whole steps.
CHUNK_TOKENS = 1 << 17
FLUSH_TOKENS = 1 << 20

STEPS_OF_UPDATE = ("loss", "kl", "clip_frac_low", "clip_frac_high", "clip_frac_dual", "grad_norm", "lr")
NO_UPDATE = "the rows hold what was sampled, not what an update did"
UNKNOWN = {
    "policy.entropy": "entropy is that of the importing model, not of the policies that sampled",
    "rollouts.length_penalty": "the rows give one reward, without the part deducted for length",
    "rollouts.drop_reason": NO_UPDATE,
    "rollouts.policy_step": "the rows do not say how many updates the sampling policy had received",
    "rollouts.answer_class": "the rows do not say which answers count as equal",
    "interventions": "an imported trace has no checkpoint to continue from",
    "evals": "the rows hold no held-out evaluation",
    **{f"tokens.{name}": NO_UPDATE for name in ("logprob_after", "entropy_after", "is_clipped")},
    **{f"steps.{name}": NO_UPDATE for name in STEPS_OF_UPDATE},
    "steps.is_shaped": NO_UPDATE,
    **{f"steps.{name}": "not timed" for name in ("rollout_s", "reward_s", "update_s", "record_s")},
}
# Columns that depend on optional fields; they are null for the rows without the field.
FROM_FIELDS = {
    "answer": ("rollouts.answer", "rollouts.has_answer", "steps.format_rate"),
    "is_truncated": ("rollouts.is_truncated",),
    "ground_truth": ("prompts.ground_truth",),
}


def import_rollouts(
    rollouts: PlainRollouts,
    sources: Sequence[Path],
    settings: ImportSettings,
    policy: Policy,
    run_dir: Path,
    *,
    resume: bool = False,
    on_step: Callable[..., None] = lambda done, note, **metrics: None,
) -> None:
    """Record rollouts in ``run_dir``, with the statistics of every token under ``policy``.

    Args:
        rollouts: Rollouts read from ``sources``.
        sources: Files, for ``run.json``.
        settings: Settings of the reader and of the pass.
        policy: The model that gives log-probabilities and entropies, whichever policy sampled.
        run_dir: Folder of the trace; its name is the run id.
        resume: Continue after the steps that the folder holds.
        on_step: Called with the number of finished responses, the step, and metrics to show.

    Raises:
        InputError: the folder cannot be used.
        TrainingError: memory or disk space ran out, or the model returned NaN or infinity.
    """
    with translate_errors(run_dir):
        writer, done = _open_trace(rollouts, _describe(rollouts, sources, settings), policy, run_dir, resume)
        with finalize_on_exit(writer):
            _import_steps(rollouts, settings, policy, writer, done, on_step)


def check_target(run_dir: Path, resume: bool) -> None:
    """Refuse a folder that already holds files, before anything is read.

    Raises:
        InputError: the folder holds files, and ``resume`` is not set or they are not a trace.
    """
    is_used = run_dir.is_dir() and any(not path.name.startswith(".") for path in run_dir.iterdir())
    if is_used and not (resume and (has_begun(run_dir) or is_before_manifest(run_dir))):
        raise InputError(f"{run_dir}: already holds files; choose another folder, or resume with --resume")


def _describe(rollouts: PlainRollouts, sources: Sequence[Path], settings: ImportSettings) -> dict[str, Any]:
    """Return what ``run.json`` says about how the trace was made; a trace resumes only if this is equal."""
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
    rollouts: PlainRollouts, description: Mapping[str, Any], policy: Policy, run_dir: Path, resume: bool
) -> tuple[TraceWriter, int]:
    """Return a new or resumed trace and the last step that it holds, -1 for none."""
    if resume and has_begun(run_dir):
        manifest = read_manifest(run_dir)
        before = manifest.get("scored")
        if before is None:
            raise InputError(f"{run_dir}: not a trace of entrace import; choose another folder")
        if before != description:
            keys = {**before, **description}
            changed = ", ".join(key for key in keys if before.get(key) != description.get(key))
            raise InputError(f"{run_dir}: imported with another value of {changed}; choose another folder")
        last, damage = last_whole_step(run_dir, manifest)
        has_vocab = any(last_step(name) <= last for name in listed_files(run_dir, manifest).get("vocab", {}))
        if has_vocab and (last or not damage):
            return TraceWriter.resume(run_dir, last), last
    manifest = {
        "run_id": run_dir.name,
        "study": run_dir.resolve().parent.name,
        "model": policy.name,
        "task": " + ".join(dict.fromkeys(Path(path).stem for path in description["files"])),
        "total_steps": len(rollouts.counts.steps),
        # The keys of entrace score, the former name of the command, so that its traces resume.
        "config": {"score": description["settings"]},
        "scored": description,
        "unknown": _unknown(rollouts.counts),
        **describe_machine(),
    }
    return TraceWriter.create(run_dir, manifest, policy.vocab(), replace=resume), -1


def _unknown(counts: Counts) -> dict[str, str]:
    """Return the reason why a column is null, by table and column."""
    reasons = dict(UNKNOWN)
    for field, columns in FROM_FIELDS.items():
        missing = counts.rollouts - counts.known[field]
        if missing:
            rows = "the rows have" if missing == counts.rollouts else f"{missing} of {counts.rollouts} rows have"
            reasons |= dict.fromkeys(columns, f'{rows} no "{field}"')
    return reasons


def _import_steps(
    rollouts: PlainRollouts,
    settings: ImportSettings,
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
        writer.append("steps", {"step": step, **sums.columns()})
        writer.end_step(step)
        buffered += sums.tokens
        if buffered >= FLUSH_TOKENS:
            writer.flush()
            buffered = 0
    writer.flush()


def _chunks(rollouts: Iterator[Rollout]) -> Iterator[list[Rollout]]:
    """Yield whole groups of up to ``CHUNK_TOKENS`` tokens together; a longer group is a chunk of its own."""
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
    """Sums behind the row of a step in table ``steps``; ``answered`` is out of ``known_answers``."""

    rollouts: int = 0
    reward: float = 0.0
    correct: int = 0
    known_answers: int = 0
    answered: int = 0
    tokens: int = 0
    entropy: float = 0.0
    groups: int = 0
    groups_kept: int = 0

    def add(self, chunk: Sequence[Rollout], measured: _Measured) -> None:
        """Add one chunk."""
        self.rollouts += len(chunk)
        self.reward += sum(rollout.reward for rollout in chunk)
        self.correct += sum(rollout.is_correct for rollout in chunk)
        self.known_answers += sum(rollout.has_answer is not None for rollout in chunk)
        self.answered += sum(bool(rollout.has_answer) for rollout in chunk)
        self.tokens += len(measured.stats.entropy)
        self.entropy += float(measured.stats.entropy.double().sum())
        self.groups += len(measured.group_is_kept)
        self.groups_kept += int(measured.group_is_kept.sum())

    def columns(self) -> dict[str, Any]:
        """Return columns of table ``steps``."""
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
class _Measured:
    """Values of a chunk: per token, concatenated over responses (N,), per response (B,), and per group (G,).

    A group counts as kept if any of its advantages is not 0: otherwise its gradient was 0.
    """

    stats: TokenStats
    hidden_norm: Tensor
    lengths: Tensor
    group_ids: Tensor
    advantages: Tensor
    group_is_kept: Tensor

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over the tokens of each response, (N,) -> (B,)."""
        rows = torch.arange(len(self.lengths)).repeat_interleave(self.lengths)
        sums = torch.zeros(len(self.lengths), dtype=torch.float64).index_add(0, rows, values.double())
        return (sums / self.lengths).float()


def _measure(chunk: Sequence[Rollout], settings: ImportSettings, policy: Policy) -> _Measured:
    _, ids = np.unique([rollout.group_id for rollout in chunk], return_inverse=True)
    group_ids = torch.from_numpy(ids)
    given = [rollout.advantage for rollout in chunk if rollout.advantage is not None]
    # The squares of other trainers' rewards may overflow float32.
    rewards = torch.tensor([rollout.reward for rollout in chunk], dtype=torch.float64)
    relative = group_relative_advantage(rewards, group_ids)
    advantages = torch.tensor(given) if given else relative.float()
    largest = torch.zeros(int(group_ids.max()) + 1).scatter_reduce(0, group_ids, advantages.abs(), "amax")
    with memory_advice(settings, f"importing step {chunk[0].step}", "batch_tokens"):
        stats, hidden_norm, lengths = _read(chunk, settings, policy)
    return _Measured(stats, hidden_norm, lengths, group_ids, advantages, largest > 0)


@torch.no_grad()
def _read(chunk: Sequence[Rollout], settings: ImportSettings, policy: Policy) -> tuple[TokenStats, Tensor, Tensor]:
    """Return statistics of generated tokens, norms of the LM head's inputs, and the number of tokens per response.

    A token outside ``loss_mask`` is context for later tokens and has no statistics.

    Returns:
        ``TokenStats`` and norms, concatenated over responses, (N,); lengths, (B,).
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
        raise TrainingError(f"{place}: {policy.name} gives this response a probability that is NaN or infinite")
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
    writer: TraceWriter, chunk: Sequence[Rollout], settings: ImportSettings, policy: Policy, first_rollout_id: int
) -> _Measured:
    """Add the rollouts and tokens of a chunk."""
    measured = _measure(chunk, settings, policy)
    stats, lengths = measured.stats, measured.lengths.numpy()
    rollout_ids = first_rollout_id + np.arange(len(chunk))
    prompt_ids = np.array([rollout.prompt_id for rollout in chunk], dtype=object)
    is_correct = np.array([rollout.is_correct for rollout in chunk])
    is_kept = measured.group_is_kept[measured.group_ids].numpy()
    # As in training, the first response of a group is its id.
    first_of_group = np.unique(measured.group_ids, return_index=True)[1]
    surprisal = measured.mean(-stats.logprob)
    as_read = ("completion", "answer", "reward", "has_answer", "is_truncated")
    writer.append(
        "rollouts",
        {
            "step": chunk[0].step,
            "prompt_id": prompt_ids,
            "rollout_id": rollout_ids,
            "group_id": rollout_ids[first_of_group][measured.group_ids],
            "sample_index": place_in_group(measured.group_ids).numpy(),
            **{name: [getattr(rollout, name) for rollout in chunk] for name in as_read},
            "is_correct": is_correct,
            "defects": [
                find_defects(r.prompt, r.completion, has_answer=r.has_answer, is_truncated=r.is_truncated)
                for r in chunk
            ],
            "response_length": lengths,
            "is_kept": is_kept,
            "entropy_mean": measured.mean(stats.entropy).numpy(),
            "surprisal_mean": surprisal.numpy(),
            "ppl": surprisal.exp().numpy(),
            "ppl_z": ppl_z(-surprisal[:, None], measured.lengths[:, None] > 0, measured.group_ids).numpy(),
            "advantage": measured.advantages.numpy(),
            "temperature": settings.temperature,
            "entropy_kind": "exact",
        },
    )
    rows = np.repeat(np.arange(len(chunk)), lengths)
    advantages = measured.advantages[rows]
    grad_norm = lm_head_grad_norm(advantages, stats.logprob, stats.sum_p2, measured.hidden_norm, settings.temperature)
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
    return measured
