"""Batched sampling with a KV cache, recording the distribution that every token is drawn from."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from trainer.policy import Policy
from trainer.token_stats import TokenStats, distribution_stats

# Ended responses leave the batch once they make up this share of it: each time, the whole cache is copied.
ENDED_FRAC = 0.1


@dataclass(frozen=True)
class SamplingParams:
    """``max_tokens`` bounds a response; ``top_p`` below 1 cuts the distribution before anything is recorded of it."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass
class Samples:
    """Responses, one a row; on the CPU, padded to T; a value outside ``response_mask`` means nothing.

    Attributes:
        prompts: Prompt tokens of each response, B lists.
        tokens: (B, T) int64.
        response_mask: (B, T) bool, True at generated tokens, the end of sequence included.
        stats: ``logprob``, ``entropy``, ``sum_p2``, each (B, T), of the distribution sampled from.
        hidden_norm: Norm of the LM head's input, (B, T).
        is_truncated: (B,) bool, stopped by the length limit.
    """

    prompts: list[list[int]]
    tokens: Tensor
    response_mask: Tensor
    stats: TokenStats
    hidden_norm: Tensor
    is_truncated: Tensor

    @classmethod
    def empty(cls, prompts: list[list[int]], max_tokens: int) -> Samples:
        """Nothing sampled yet."""
        shape = (len(prompts), max_tokens)
        stats = TokenStats(*(torch.zeros(shape) for _ in fields(TokenStats)))
        return cls(
            prompts,
            torch.zeros(shape, dtype=torch.int64),
            torch.zeros(shape, dtype=torch.bool),
            stats,
            torch.zeros(shape),
            torch.ones(len(prompts), dtype=torch.bool),
        )

    @classmethod
    def concatenate(cls, parts: list[Samples]) -> Samples:
        """Rows of all parts, which share T."""
        return cls(
            [prompt for part in parts for prompt in part.prompts],
            torch.cat([part.tokens for part in parts]),
            torch.cat([part.response_mask for part in parts]),
            TokenStats(*(torch.cat([getattr(part.stats, f.name) for part in parts]) for f in fields(TokenStats))),
            torch.cat([part.hidden_norm for part in parts]),
            torch.cat([part.is_truncated for part in parts]),
        )

    @property
    def lengths(self) -> Tensor:
        """Response lengths in tokens, (B,)."""
        return self.response_mask.sum(1)

    @property
    def entropy_mean(self) -> Tensor:
        """Mean token entropy of each response, nats, (B,)."""
        return (self.stats.entropy * self.response_mask).sum(1) / self.lengths

    def responses(self) -> list[Tensor]:
        """Token ids of each response."""
        return [row[mask] for row, mask in zip(self.tokens, self.response_mask, strict=True)]

    def place(self, values: Tensor, rows: Tensor) -> Tensor:
        """Puts values (N,) of the tokens of ``rows``, end to end, at their places, (len(rows), T); 0 elsewhere."""
        mask = self.response_mask[rows]
        placed = torch.zeros(mask.shape, dtype=values.dtype)
        placed[mask] = values.cpu()
        return placed


def sample(
    policy: Policy, prompts: list[list[int]], num_samples: int, params: SamplingParams, rng: np.random.Generator
) -> Samples:
    """Draws ``num_samples`` responses to each prompt.

    Equal policies sampled with equal generators give equal responses; see ``sample_at``.

    Args:
        policy: The model.
        prompts: Token ids of each prompt, P lists.
        num_samples: Responses to each.
        params: Limits and temperature.
        rng: Source of the random numbers.

    Returns:
        ``Samples`` of P * num_samples rows, the responses of one prompt adjacent.
    """
    uniforms = rng.random((len(prompts) * num_samples, params.max_tokens), dtype=np.float32)
    return sample_at(policy, prompts, uniforms, [params.max_tokens] * len(prompts), params)


@torch.no_grad()
def sample_at(
    policy: Policy, prompts: list[list[int]], uniforms: np.ndarray, limits: list[int], params: SamplingParams
) -> Samples:
    """Draws responses at given random numbers.

    A prompt is read once and its cache shared out to its responses; responses that have ended leave the batch. Every
    token is drawn by inverting the distribution function at the random number of its response and position, so that
    what a response draws depends neither on its batch nor on when others end.

    Args:
        policy: The model.
        prompts: Token ids of each prompt, P lists.
        uniforms: Random numbers in [0, 1), (B, params.max_tokens) float32; B is a multiple of P.
        limits: Longest response to each prompt, at least 1 and at most ``params.max_tokens``, P numbers.
        params: Temperature and top-p.

    Returns:
        ``Samples`` of B rows, the responses of one prompt adjacent.
    """
    num_samples = len(uniforms) // len(prompts)
    samples = Samples.empty([prompt for prompt in prompts for _ in range(num_samples)], params.max_tokens)
    numbers = torch.from_numpy(uniforms)
    row_limits = torch.tensor(limits).repeat_interleave(num_samples)
    stop_ids = policy.stop_ids
    hidden, cache, mask = read_prompts(policy, prompts, num_samples)
    rows = torch.arange(len(samples.prompts))
    live = torch.ones(len(rows), dtype=torch.bool)
    lengths = torch.tensor([len(prompt) for prompt in samples.prompts])
    for t in range(params.max_tokens):
        logits = policy.head.logits(hidden) / params.temperature
        logp, entropy, sum_p2 = distribution_stats(_keep_top_p(logits, params.top_p))
        tokens = invert_cdf(logp.exp(), numbers[rows, t].to(policy.device))
        samples.tokens[rows, t] = tokens.cpu()
        samples.response_mask[rows, t] = live
        samples.stats.logprob[rows, t] = logp.gather(1, tokens[:, None]).squeeze(1).cpu()
        samples.stats.entropy[rows, t] = entropy.cpu()
        samples.stats.sum_p2[rows, t] = sum_p2.cpu()
        samples.hidden_norm[rows, t] = hidden.float().norm(dim=-1).cpu()
        has_ended = live & torch.isin(samples.tokens[rows, t], stop_ids)
        samples.is_truncated[rows[has_ended]] = False
        live &= ~has_ended & (t + 1 < row_limits[rows])
        if not live.any():
            break
        if live.float().mean() <= 1 - ENDED_FRAC:
            kept = torch.nonzero(live).squeeze(1)
            rows, live = rows[kept], live[kept]
            kept = kept.to(policy.device)
            tokens, mask = tokens[kept], mask[kept]
            cache.batch_select_indices(kept)
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
        hidden = policy.hidden_states(
            tokens[:, None],
            # A mask of four dimensions is used as it is; one of two would be expanded by the model at every step.
            attention_mask=None if mask.all() else mask[:, None, None, :],
            position_ids=(lengths[rows] + t)[:, None].to(policy.device),
            past_key_values=cache,
            use_cache=True,
        )[:, -1]
    return samples


def read_prompts(policy: Policy, prompts: list[list[int]], num_samples: int) -> tuple[Tensor, DynamicCache, Tensor]:
    """Last hidden state (P * num_samples, H), cache and key mask after the prompts, padded on the left."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=policy.device)
    places = torch.arange(width)
    padding = torch.tensor([width - len(prompt) for prompt in prompts])
    mask = places >= padding[:, None]
    cache = DynamicCache(config=policy.model.config)
    hidden = policy.hidden_states(
        ids,
        attention_mask=mask.to(policy.device),
        position_ids=(places - padding[:, None]).clamp(min=0).to(policy.device),
        past_key_values=cache,
        use_cache=True,
    )[:, -1]
    cache.batch_repeat_interleave(num_samples)
    return (
        hidden.repeat_interleave(num_samples, dim=0),
        cache,
        mask.repeat_interleave(num_samples, dim=0).to(policy.device),
    )


def _keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Logits (N, V) with all but the smallest set of tokens of total probability >= ``top_p`` at -inf."""
    if top_p >= 1:
        return logits
    ordered, order = logits.sort(descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    return logits.masked_fill(torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, before >= top_p), -torch.inf)


def invert_cdf(p: Tensor, uniforms: Tensor) -> Tensor:
    """Token (N,) whose cumulative probability first exceeds the uniform number; p (N, V), uniforms (N,) in [0, 1)."""
    cdf = p.cumsum(-1)
    # Scaled to the rounded total, and kept below it, so that no token of probability 0 can be drawn.
    target = torch.minimum(uniforms * cdf[:, -1], cdf[:, -1].nextafter(torch.zeros((), device=p.device)))
    return torch.searchsorted(cdf, target[:, None], right=True).squeeze(1)
