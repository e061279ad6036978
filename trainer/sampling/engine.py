"""Select what samples responses: the trainer itself, or vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np

from entrace.trainer.config import RolloutConfig
from entrace.trainer.model.policy import Policy
from entrace.trainer.sampling.sampler import sample
from entrace.trainer.sampling.samples import Rollouts, SamplingParams
from entrace.trainer.sampling.vllm_engine import VllmSampler


class Sampler(Protocol):
    """Sample responses from the current weights of a policy."""

    def sample(
        self,
        prompts: list[list[int]],
        num_samples: int,
        params: SamplingParams,
        rng: np.random.Generator,
        part: slice = slice(None),
    ) -> Rollouts:
        """Sample ``num_samples`` responses per prompt; see ``sampler.sample``."""
        ...


@dataclass(frozen=True)
class NativeSampler:
    """Sample with the trainer's own decoding."""

    policy: Policy

    def sample(
        self,
        prompts: list[list[int]],
        num_samples: int,
        params: SamplingParams,
        rng: np.random.Generator,
        part: slice = slice(None),
    ) -> Rollouts:
        """Sample ``num_samples`` responses per prompt; see ``sampler.sample``."""
        return sample(self.policy, prompts, num_samples, params, rng, part)


_ENGINES: WeakKeyDictionary[Policy, VllmSampler] = WeakKeyDictionary()


def sampler_of(policy: Policy, rollout: RolloutConfig) -> Sampler:
    """Return the sampler of ``rollout.engine``, started once per policy.

    Raises:
        InputError: vLLM is not installed, or cannot sample from the policy.
    """
    if rollout.engine == "native":
        return NativeSampler(policy)
    if policy not in _ENGINES:
        _ENGINES[policy] = VllmSampler(policy, rollout.vllm_memory)
    return _ENGINES[policy]
