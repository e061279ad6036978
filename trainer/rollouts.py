"""Collect the batch of a step: sample responses and score them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from entrace.analysis.trace.schema import NO_VERDICT, TRUNCATED, UNIFORM_GROUP
from entrace.trainer.algorithm.advantages import mixed_groups, overlong_penalty
from entrace.trainer.algorithm.method import RolloutView
from entrace.trainer.config import Config, sampling_memory
from entrace.trainer.faults import TrainingError, memory_advice
from entrace.trainer.model.policy import Policy
from entrace.trainer.parallel.ranks import ALONE, Ranks
from entrace.trainer.sampling.engine import sampler_of
from entrace.trainer.sampling.samples import Rollouts, SamplingParams
from entrace.trainer.seeding import Stream, generator
from entrace.trainer.tasks import Prompt, Score, Task

# Consecutive rounds of dynamic sampling without any usable group after which sampling stops.
MAX_ROUNDS_IN_VAIN = 100


@dataclass
class Batch:
    """All responses of a step, including groups dropped by dynamic sampling.

    Attributes:
        rollouts: The responses, B rows.
        prompts: Prompt of each response.
        new_prompts: Prompts that the run draws for the first time.
        completions: Decoded responses.
        scores: The verifier's verdicts.
        rewards: Scores on the scale of ``task.reward_values``, (B,); 0 without a verdict.
        length_penalties: Added to the rewards for length, (B,), at most 0.
        group_ids: (B,), from 0 within the step.
        has_verdict: Responses with a verdict, (B,) bool.
        drop_reasons: Reason to exclude a response from the update, one of ``DROP_REASONS``; None if included.
        is_own: Responses sampled, and recorded, by this process, (B,) bool.
        rollout_s: Seconds spent sampling.
        reward_s: Seconds spent scoring.
    """

    rollouts: Rollouts
    prompts: list[Prompt]
    new_prompts: list[Prompt]
    completions: list[str]
    scores: list[Score]
    rewards: Tensor
    length_penalties: Tensor
    group_ids: Tensor
    has_verdict: Tensor
    drop_reasons: list[str | None]
    is_own: Tensor
    rollout_s: float
    reward_s: float

    @property
    def total_rewards(self) -> Tensor:
        """Rewards plus length penalties, (B,)."""
        return self.rewards + self.length_penalties

    @cached_property
    def is_kept(self) -> Tensor:
        """Responses in the update, (B,) bool."""
        return torch.tensor([reason is None for reason in self.drop_reasons])


def view_rollouts(batch: Batch, seed: int, stream: Stream, step: int) -> RolloutView:
    """Return the view of a batch that methods receive.

    Its random numbers depend on seed, purpose, and step.
    """
    rollouts = batch.rollouts
    return RolloutView(
        rollouts.old_logprobs,
        rollouts.entropies,
        torch.tensor([bool(score.is_correct) for score in batch.scores]),
        rollouts.response_mask,
        batch.group_ids,
        torch.where(batch.has_verdict, batch.total_rewards, torch.nan),
        generator(seed, stream, step),
    )


class PromptSource:
    """Training prompts in order; a checkpoint only needs to keep ``position``."""

    def __init__(self, task: Task, position: int = 0) -> None:
        """Start at prompt ``position``."""
        self.task, self.position = task, 0
        self._drawn: set[str] = set()
        self.first_drawn(self.take(position))

    def take(self, count: int) -> list[Prompt]:
        """Return the next ``count`` prompts."""
        start, self.position = self.position, self.position + count
        return [self.task.train_prompt(index) for index in range(start, self.position)]

    def first_drawn(self, prompts: Iterable[Prompt]) -> list[Prompt]:
        """Return the prompts not drawn before; rows of a file recur in every epoch."""
        new = {prompt.prompt_id: prompt for prompt in prompts if prompt.prompt_id not in self._drawn}
        self._drawn |= new.keys()
        return list(new.values())


def collect_batch(config: Config, policy: Policy, source: PromptSource, step: int, ranks: Ranks = ALONE) -> Batch:
    """Sample and score a step's groups.

    Dynamic sampling (DAPO, arXiv 2503.14476) draws further rounds until ``prompts_per_step`` groups differ in
    ``rollout.filter_metric``, with as many new prompts per round as groups are missing. Several processes divide the
    prompts of every round, and each receives the whole batch.

    Raises:
        TrainingError: no response has a verdict, or groups are missing and ``rollout.when_short`` is an error.
    """
    rollout = config.rollout
    rounds: list[list[_Part]] = []
    mixed: list[Tensor] = []
    prompts: list[Prompt] = []
    missing, in_vain = rollout.prompts_per_step, 0
    while missing:
        drawn = source.take(missing)
        prompts += [prompt for prompt in drawn for _ in range(rollout.group_size)]
        rounds.append(
            ranks.all_gather_object(_sample_part(config, policy, source.task, drawn, (step, len(rounds)), ranks))
        )
        mixed.append(_mixed(config, rounds[-1]))
        found = int(mixed[-1].sum())
        missing, in_vain = missing - found, 0 if found else in_vain + 1
        if not rollout.dynamic_sampling or (len(rounds) > rollout.max_refills and rollout.when_short == "fewer"):
            break
        is_last = len(rounds) > rollout.max_refills and rollout.when_short == "error"
        if missing and (is_last or in_vain == MAX_ROUNDS_IN_VAIN):
            have = rollout.prompts_per_step - missing
            raise TrainingError(
                f"step {step}: after {len(rounds)} rounds, {have} of {rollout.prompts_per_step} groups differ in "
                f'{rollout.filter_metric}; choose easier or harder prompts, or set rollout.when_short = "fewer"'
            )
    parts = [part for parts in rounds for part in parts]
    scores = [score for part in parts for score in part.scores]
    rollouts = Rollouts.concatenate([part.rollouts for part in parts])
    rewards, penalties = (torch.cat([getattr(part, name) for part in parts]) for name in ("rewards", "penalties"))
    group_ids = _group_ids(len(rewards), rollout.group_size)
    has_verdict = _has_verdict(scores)
    if not has_verdict.any():
        raise TrainingError(f"step {step}: the verifier gave no verdict on any of {len(scores)} responses")
    is_mixed = torch.cat(mixed)[group_ids]
    return Batch(
        rollouts=rollouts,
        prompts=prompts,
        new_prompts=source.first_drawn(prompts),
        completions=[text for part in parts for text in part.completions],
        scores=scores,
        rewards=rewards,
        length_penalties=penalties,
        group_ids=group_ids,
        has_verdict=has_verdict,
        drop_reasons=_drop_reasons(config, has_verdict, is_mixed, rollouts.is_truncated),
        is_own=torch.tensor([part.rank == ranks.rank for part in parts for _ in part.rewards]),
        rollout_s=sum(max(part.rollout_s for part in parts) for parts in rounds),
        reward_s=sum(max(part.reward_s for part in parts) for parts in rounds),
    )


@dataclass
class _Part:
    """Responses of one process in one sampling round; fields as in ``Batch``."""

    rank: int
    rollouts: Rollouts
    completions: list[str]
    scores: list[Score]
    rewards: Tensor
    penalties: Tensor
    rollout_s: float
    reward_s: float


def _sample_part(
    config: Config, policy: Policy, task: Task, prompts: list[Prompt], place: tuple[int, int], ranks: Ranks
) -> _Part:
    """Sample and score ``group_size`` responses per prompt of this process.

    ``place`` is (step, round).
    """
    rollout = config.rollout
    own = ranks.shard(len(prompts))
    started = time.perf_counter()
    with memory_advice(config, f"sampling at step {place[0]}", sampling_memory(rollout)):
        rollouts = sampler_of(policy, rollout).sample(
            [policy.encode_prompt(prompt.question) for prompt in prompts],
            rollout.group_size,
            SamplingParams.of(rollout),
            generator(config.seed, Stream.ROLLOUT, *place),
            own,
        )
    sampled = time.perf_counter()
    completions = policy.decode([response.tolist() for response in rollouts.responses()])
    prompts = [prompt for prompt in prompts[own] for _ in range(rollout.group_size)]
    scores = [task.score(text, prompt) for text, prompt in zip(completions, prompts, strict=True)]
    penalties = overlong_penalty(
        rollouts.lengths, rollout.max_response_tokens, rollout.overlong_buffer_tokens, config.overlong_penalty
    )
    rewards = torch.tensor([score.reward(config.task.reward_values) or 0.0 for score in scores])
    scored = time.perf_counter()
    return _Part(ranks.rank, rollouts, completions, scores, rewards, penalties, sampled - started, scored - sampled)


def _mixed(config: Config, parts: list[_Part]) -> Tensor:
    """Return the groups of a round that differ in ``filter_metric``, (groups,) bool."""
    scores = [score for part in parts for score in part.scores]
    if config.rollout.filter_metric == "acc":
        values = torch.tensor([bool(score.is_correct) for score in scores])
    else:
        values = torch.cat([part.rewards + part.penalties for part in parts])
    return mixed_groups(values, _group_ids(len(values), config.rollout.group_size), _has_verdict(scores))


def _drop_reasons(config: Config, has_verdict: Tensor, is_mixed: Tensor, is_truncated: Tensor) -> list[str | None]:
    reasons: list[str | None] = []
    drops_uniform, drops_truncated = config.rollout.dynamic_sampling, config.loss.mask_truncated
    for judged, mixed, truncated in zip(*(x.tolist() for x in (has_verdict, is_mixed, is_truncated)), strict=True):
        if not judged:
            reasons.append(NO_VERDICT)
        elif drops_uniform and not mixed:
            reasons.append(UNIFORM_GROUP)
        else:
            reasons.append(TRUNCATED if drops_truncated and truncated else None)
    return reasons


def _has_verdict(scores: Sequence[Score]) -> Tensor:
    return torch.tensor([score.score is not None for score in scores])


def _group_ids(num_responses: int, group_size: int) -> Tensor:
    return torch.arange(num_responses) // group_size
