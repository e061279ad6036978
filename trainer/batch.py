"""One step's data: sampled responses, their rewards and group-relative advantages."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.advantage import group_relative_advantage, mixed_groups, overlong_penalty
from trainer.config import SAMPLING_MEMORY, Config
from trainer.distributed import ALONE, World
from trainer.faults import memory_advice
from trainer.policy import Policy
from trainer.rollout import Samples, SamplingParams, sample
from trainer.seeding import Stream, generator
from trainer.tasks import Prompt, Score, Task


@dataclass
class Batch:
    """All responses of a step, those of groups dropped by dynamic sampling included.

    Attributes:
        samples: The responses, B rows.
        prompts: Prompt of each response.
        new_prompts: Those that the run draws for the first time.
        completions: Decoded responses.
        scores: The verifier's verdicts.
        rewards: Score plus overlong penalty, (B,).
        group_ids: (B,), from 0 within the step.
        is_kept: (B,) bool, takes part in the update.
        is_own: (B,) bool, sampled by this process, which records it.
        advantages: Group-relative, (B,); 0 in groups of uniform reward.
        rollout_s: Seconds spent sampling.
        reward_s: Seconds spent scoring.
    """

    samples: Samples
    prompts: list[Prompt]
    new_prompts: list[Prompt]
    completions: list[str]
    scores: list[Score]
    rewards: Tensor
    group_ids: Tensor
    is_kept: Tensor
    is_own: Tensor
    advantages: Tensor
    rollout_s: float
    reward_s: float


class PromptSource:
    """Training prompts in order; ``position`` is all that a checkpoint needs to keep."""

    def __init__(self, task: Task, position: int = 0) -> None:
        """Starts at prompt ``position``."""
        self.task, self.position = task, 0
        self._drawn: set[str] = set()
        self.first_drawn(self.take(position))

    def take(self, count: int) -> list[Prompt]:
        """The next ``count`` prompts."""
        start, self.position = self.position, self.position + count
        return [self.task.train_prompt(index) for index in range(start, self.position)]

    def first_drawn(self, prompts: Iterable[Prompt]) -> list[Prompt]:
        """Those of ``prompts`` that were not drawn before: the rows of a file come back with every epoch."""
        new = {prompt.prompt_id: prompt for prompt in prompts if prompt.prompt_id not in self._drawn}
        self._drawn |= new.keys()
        return list(new.values())


def collect_batch(config: Config, policy: Policy, source: PromptSource, step: int, world: World = ALONE) -> Batch:
    """Samples and scores groups until ``prompts_per_step`` of them have mixed rewards, or the refills are used up.

    Dynamic sampling (DAPO, arXiv 2503.14476) with as many new prompts in each refill as groups are missing. Several
    processes share out the prompts of every refill, and all get the whole batch.
    """
    rollout = config.rollout
    rounds: list[list[_Part]] = []
    prompts: list[Prompt] = []
    missing = rollout.prompts_per_step
    for refill in range(1 + rollout.max_refills * rollout.dynamic_sampling):
        drawn = source.take(missing)
        prompts += [prompt for prompt in drawn for _ in range(rollout.group_size)]
        rounds.append(world.gather(_sample_part(config, policy, source.task, drawn, (step, refill), world)))
        rewards = torch.cat([part.rewards for part in rounds[-1]])
        missing -= int(mixed_groups(rewards, _group_ids(rewards, rollout.group_size)).sum())
        if missing == 0:
            break
    parts = [part for parts in rounds for part in parts]
    rewards = torch.cat([part.rewards for part in parts])
    group_ids = _group_ids(rewards, rollout.group_size)
    is_kept = mixed_groups(rewards, group_ids)[group_ids]
    return Batch(
        samples=Samples.concatenate([part.samples for part in parts]),
        prompts=prompts,
        new_prompts=source.first_drawn(prompts),
        completions=[text for part in parts for text in part.completions],
        scores=[score for part in parts for score in part.scores],
        rewards=rewards,
        group_ids=group_ids,
        is_kept=is_kept if rollout.dynamic_sampling else torch.ones_like(is_kept),
        is_own=torch.tensor([part.rank == world.rank for part in parts for _ in part.rewards]),
        advantages=group_relative_advantage(rewards, group_ids, config.loss.normalize_std),
        rollout_s=sum(max(part.rollout_s for part in parts) for parts in rounds),
        reward_s=sum(max(part.reward_s for part in parts) for parts in rounds),
    )


@dataclass
class _Part:
    """What one process adds to the batch in one generation round; fields as in ``Batch``."""

    rank: int
    samples: Samples
    completions: list[str]
    scores: list[Score]
    rewards: Tensor
    rollout_s: float
    reward_s: float


def _sample_part(
    config: Config, policy: Policy, task: Task, prompts: list[Prompt], place: tuple[int, int], world: World
) -> _Part:
    """Samples and scores ``group_size`` responses to each of this process's prompts; ``place`` is (step, refill)."""
    rollout = config.rollout
    own = world.share(len(prompts))
    started = time.perf_counter()
    with memory_advice(config, f"sampling at step {place[0]}", SAMPLING_MEMORY):
        samples = sample(
            policy,
            [policy.encode_prompt(prompt.question) for prompt in prompts],
            rollout.group_size,
            SamplingParams.of(rollout),
            generator(config.seed, Stream.ROLLOUT, *place),
            own,
        )
    sampled = time.perf_counter()
    completions = policy.decode([response.tolist() for response in samples.responses()])
    prompts = [prompt for prompt in prompts[own] for _ in range(rollout.group_size)]
    scores = [task.score(text, prompt) for text, prompt in zip(completions, prompts, strict=True)]
    penalty = overlong_penalty(
        samples.lengths, rollout.max_response_tokens, rollout.overlong_buffer_tokens, rollout.overlong_penalty
    )
    rewards = torch.tensor([score.score for score in scores]) + penalty
    scored = time.perf_counter()
    return _Part(world.rank, samples, completions, scores, rewards, sampled - started, scored - sampled)


def _group_ids(rewards: Tensor, group_size: int) -> Tensor:
    return torch.arange(len(rewards)) // group_size
