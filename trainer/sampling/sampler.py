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
    """Sample ``num_samples`` responses to each prompt of a part.

    Equal policies and equal generators give equal responses; see ``sample_at``.

    Args:
        policy: The model.
        prompts: Token ids of each prompt, P lists.
        num_samples: Responses per prompt.
        params: Limits, temperature, and truncation.
        rng: Source of the random numbers, which are drawn for all prompts.
        part: Slice of the prompts that get responses.

    Returns:
        ``Rollouts`` with ``num_samples`` rows per prompt of the part; responses to one prompt are adjacent.
    """
    uniforms = rng.random((len(prompts) * num_samples, params.max_tokens), dtype=np.float32)
    longest = max(len(prompt) for prompt in prompts) + params.max_tokens
    size = max(1, params.cache_tokens // (longest * num_samples))
    chosen = prompts[part]
    numbers = uniforms.reshape(len(prompts), num_samples, params.max_tokens)[part]
    drawn = [Rollouts.empty([], params.max_tokens)]
    with policy.unsharded():
        if backend_of(policy).batched:
            # It divides the responses itself, by the memory that is free.
            size = max(1, len(chosen))
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
    """Sample responses with given random numbers.

    On a CPU, a shared prefix of responses is computed once: sequences branch where responses differ, and leave the
    batch where they end. On a GPU, only prompts are shared; see ``sampling.batched``. Each token is drawn by inverting
    the cumulative distribution at the random number of its response and position. A response therefore depends neither
    on its batch nor on the length of others.

    Args:
        policy: The model.
        prompts: Token ids of each prompt, P lists.
        uniforms: Random numbers in [0, 1), (B, params.max_tokens) float32; B is a multiple of P.
        limits: Length limit of responses to each prompt, from 1 to ``params.max_tokens``, P numbers.
        params: Limits, temperature, and truncation.

    Returns:
        ``Rollouts`` of B rows; responses to one prompt are adjacent.
    """
    backend = backend_of(policy)
    if backend.batched:
        return backend.batched.sample_at(prompts, uniforms, limits, params)
    sampler = TokenSampler(policy, prompts, uniforms, limits, params)
    rows = torch.arange(len(uniforms))
    sequences = rows // (len(uniforms) // len(prompts))
    # One autocast context, so that weights are cast once for all tokens.
    with policy.autocast():
        decoder = backend.decode(policy, prompts, len(uniforms), params.max_tokens)
        while True:
            drawn, continues = sampler.draw(decoder.hidden, sequences, rows)
            if not continues.any():
                return sampler.finish()
            # Responses that draw the same token from the same sequence continue together, or end together.
            is_left = torch.zeros_like(drawn.first, dtype=torch.bool).index_put((drawn.index,), continues)
            decoder.append(drawn.second[is_left], drawn.first[is_left])
            rows, sequences = rows[continues], (is_left.cumsum(0) - 1)[drawn.index[continues]]
