"""One step's data: sampled responses, their rewards and group-relative advantages."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.advantage import group_relative_advantage, mixed_groups, overlong_penalty
from trainer.config import Config
from trainer.policy import Policy
from trainer.rollout import Samples, SamplingParams, sample
from trainer.seeding import Stream, generator
from trainer.tasks import Prompt, ReasoningGymTask, Score


@dataclass
class Batch:
    """All responses of a step, those of groups dropped by dynamic sampling included.

    Attributes:
        samples: The responses, B rows.
        prompts: Prompt of each response.
        completions: Decoded responses.
        scores: The verifier's verdicts.
        rewards: Score plus overlong penalty, (B,).
        group_ids: (B,), from 0 within the step.
        is_kept: (B,) bool, takes part in the update.
        advantages: Group-relative, (B,); 0 in groups of uniform reward.
        rollout_s: Seconds spent sampling.
        reward_s: Seconds spent scoring.
    """

    samples: Samples
    prompts: list[Prompt]
    completions: list[str]
    scores: list[Score]
    rewards: Tensor
    group_ids: Tensor
    is_kept: Tensor
    advantages: Tensor
    rollout_s: float
    reward_s: float


class PromptSource:
    """Training prompts in order; ``position`` is all that a checkpoint needs to keep."""

    def __init__(self, task: ReasoningGymTask, position: int = 0) -> None:
        """Starts at prompt ``position``."""
        self.task, self.position = task, position

    def take(self, count: int) -> list[Prompt]:
        """The next ``count`` prompts."""
        start, self.position = self.position, self.position + count
        return [self.task.train_prompt(index) for index in range(start, self.position)]


def collect_batch(config: Config, policy: Policy, source: PromptSource, step: int) -> Batch:
    """Samples and scores groups until ``prompts_per_step`` of them have mixed rewards, or the refills are used up.

    Dynamic sampling (DAPO, arXiv 2503.14476) with as many new prompts in each refill as groups are missing.
    """
    rollout = config.rollout
    params = SamplingParams(rollout.max_response_tokens, rollout.temperature)
    parts: list[Samples] = []
    prompts: list[Prompt] = []
    scores: list[Score] = []
    completions: list[str] = []
    rewards = torch.zeros(0)
    missing = rollout.prompts_per_step
    rollout_s = reward_s = 0.0
    for refill in range(1 + rollout.max_refills * rollout.dynamic_sampling):
        started = time.perf_counter()
        drawn = source.take(missing)
        encoded = [policy.encode_prompt(prompt.text) for prompt in drawn]
        rng = generator(config.seed, Stream.ROLLOUT, step, refill)
        parts.append(sample(policy, encoded, rollout.group_size, params, rng))
        sampled = time.perf_counter()
        texts = policy.decode([response.tolist() for response in parts[-1].responses()])
        drawn = [prompt for prompt in drawn for _ in range(rollout.group_size)]
        verdicts = [source.task.score(text, prompt) for text, prompt in zip(texts, drawn, strict=True)]
        penalty = overlong_penalty(
            parts[-1].lengths, params.max_tokens, rollout.overlong_buffer_tokens, rollout.overlong_penalty
        )
        rewards = torch.cat((rewards, torch.tensor([verdict.score for verdict in verdicts]) + penalty))
        prompts, completions, scores = prompts + drawn, completions + texts, scores + verdicts
        group_ids = torch.arange(len(rewards)) // rollout.group_size
        is_mixed = mixed_groups(rewards, group_ids)
        missing = rollout.prompts_per_step - int(is_mixed.sum())
        rollout_s, reward_s = rollout_s + sampled - started, reward_s + time.perf_counter() - sampled
        if missing == 0:
            break
    return Batch(
        samples=Samples.concatenate(parts),
        prompts=prompts,
        completions=completions,
        scores=scores,
        rewards=rewards,
        group_ids=group_ids,
        is_kept=is_mixed[group_ids] if rollout.dynamic_sampling else torch.ones(len(rewards), dtype=torch.bool),
        advantages=group_relative_advantage(rewards, group_ids, config.loss.normalize_std),
        rollout_s=rollout_s,
        reward_s=reward_s,
    )
