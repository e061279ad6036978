"""Sample responses in batches with a KV cache."""

from __future__ import annotations

import numpy as np
import torch

from entrace.trainer.model.policy import Policy
from entrace.trainer.sampling.backend import backend_of
from entrace.trainer.sampling.samples import Rollouts, SamplingParams
from entrace.trainer.sampling.token_sampler import TokenSampler


def sample(
    policy: Policy,
    prompts: list[list[int]],
    num_samples: int,
    params: SamplingParams,
    rng: np.random.Generator,
    part: slice = slice(None),
) -> Rollouts:
    """Draws ``num_samples`` responses to each prompt, or to each of a part of them.

    Equal policies sampled with equal generators give equal responses; see ``sample_at``.

    Args:
        policy: The model.
        prompts: Token ids of each prompt, P lists.
        num_samples: Responses to each.
        params: Limits and temperature.
        rng: Source of the random numbers, which are drawn for all prompts.
        part: The prompts that are answered here.

    Returns:
        ``Rollouts`` of ``num_samples`` rows a prompt of the part, the responses of one prompt adjacent.
    """
    uniforms = rng.random((len(prompts) * num_samples, params.max_tokens), dtype=np.float32)
    longest = max(len(prompt) for prompt in prompts) + params.max_tokens
    size = max(1, params.cache_tokens // (longest * num_samples))
    chosen = prompts[part]
    numbers = uniforms.reshape(len(prompts), num_samples, params.max_tokens)[part]
    drawn = [Rollouts.empty([], params.max_tokens)]
    with policy.unsharded():
        for start in range(0, len(chosen), size):
            some = slice(start, start + size)
            limits = [params.max_tokens] * len(chosen[some])
            some_numbers = numbers[some].reshape(-1, params.max_tokens)
            drawn.append(sample_at(policy, chosen[some], some_numbers, limits, params))
    return Rollouts.concatenate(drawn)


@torch.no_grad()
def sample_at(
    policy: Policy, prompts: list[list[int]], uniforms: np.ndarray, limits: list[int], params: SamplingParams
) -> Rollouts:
    """Draws responses at given random numbers.

    What responses have in common from the prompt on is computed once: they part where they differ, and leave where they
    end. Every token is drawn by inverting the distribution function at the random number of its response and position,
    so that what a response draws depends neither on its batch nor on when others end.

    Args:
        policy: The model.
        prompts: Token ids of each prompt, P lists.
        uniforms: Random numbers in [0, 1), (B, params.max_tokens) float32; B is a multiple of P.
        limits: Longest response to each prompt, at least 1 and at most ``params.max_tokens``, P numbers.
        params: Temperature and top-p.

    Returns:
        ``Rollouts`` of B rows, the responses of one prompt adjacent.
    """
    sampler = TokenSampler(policy, prompts, uniforms, limits, params)
    rows = torch.arange(len(uniforms))
    stands_at = rows // (len(uniforms) // len(prompts))
    # Weights that are cast are cast once for all tokens.
    with policy.autocast():
        decoder = backend_of(policy).decode(prompts, len(uniforms), params.max_tokens)
        while True:
            drawn, goes_on = sampler.draw(decoder.hidden, stands_at, rows)
            if not goes_on.any():
                return sampler.finish()
            # Responses that draw the same from the same go on together, or end together.
            is_left = torch.zeros_like(drawn.first, dtype=torch.bool).index_put((drawn.index,), goes_on)
            decoder.append(drawn.second[is_left], drawn.first[is_left])
            rows, stands_at = rows[goes_on], (is_left.cumsum(0) - 1)[drawn.index[goes_on]]
