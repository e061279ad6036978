"""Sampled responses and the parameters that they are sampled with."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from entrace.trainer.config import RolloutConfig
from entrace.trainer.kernels.token_stats import WHOLE, TokenStats, Truncation


@dataclass(frozen=True)
class SamplingParams:
    """Hold the parameters of the sampling distribution and of the end of a response.

    Attributes:
        max_tokens: Length limit of a response.
        temperature: Divides the logits.
        truncation: Applied before statistics are computed.
        stop: Texts that end a response; the token that completes one is the response's last.
        cache_tokens: Most tokens in the KV cache. Bounds memory; changes results by rounding only.
    """

    max_tokens: int
    temperature: float = 1.0
    truncation: Truncation = WHOLE
    stop: tuple[str, ...] = ()
    cache_tokens: int = sys.maxsize

    @classmethod
    def of(cls, config: RolloutConfig) -> SamplingParams:
        """Return the parameters of sampling in training."""
        truncation = Truncation(config.top_p, config.top_k)
        return cls(config.max_response_tokens, config.temperature, truncation, config.stop, config.cache_tokens)


@dataclass
class Rollouts:
    """Hold responses on the CPU, one per row, padded to T.

    Values outside ``response_mask`` are meaningless.

    Attributes:
        prompt_ids: Prompt tokens of each response, B lists.
        response_ids: Response tokens, (B, T) int64.
        response_mask: True at generated tokens, including the end of sequence, (B, T) bool.
        stats: Statistics of the sampling distribution, each (B, T).
        hidden_norm: Norm of the LM head's input, (B, T).
        is_truncated: Stopped by the length limit, (B,) bool.
        sampling_logprob: Log-probabilities that another engine reported, nats, (B, T); None if there was none.
    """

    prompt_ids: list[list[int]]
    response_ids: Tensor
    response_mask: Tensor
    stats: TokenStats
    hidden_norm: Tensor
    is_truncated: Tensor
    sampling_logprob: Tensor | None = None

    @classmethod
    def empty(cls, prompts: list[list[int]], max_tokens: int) -> Rollouts:
        """Return rollouts of given prompts without any token."""
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
    def concatenate(cls, parts: list[Rollouts]) -> Rollouts:
        """Concatenate rows of parts that share T."""
        reported = [part.sampling_logprob for part in parts if part.sampling_logprob is not None]
        return cls(
            [prompt for part in parts for prompt in part.prompt_ids],
            torch.cat([part.response_ids for part in parts]),
            torch.cat([part.response_mask for part in parts]),
            TokenStats(*(torch.cat([getattr(part.stats, f.name) for part in parts]) for f in fields(TokenStats))),
            torch.cat([part.hidden_norm for part in parts]),
            torch.cat([part.is_truncated for part in parts]),
            torch.cat(reported) if reported else None,
        )

    @property
    def old_logprobs(self) -> Tensor:
        """Return log-probabilities under the sampling policy, nats, (B, T)."""
        return self.stats.logprob

    @property
    def entropies(self) -> Tensor:
        """Return entropies of the sampling distributions, nats, (B, T)."""
        return self.stats.entropy

    @property
    def lengths(self) -> Tensor:
        """Return response lengths in tokens, (B,)."""
        return self.response_mask.sum(1)

    @property
    def entropy_mean(self) -> Tensor:
        """Return the mean token entropy of each response, nats, (B,)."""
        return (self.entropies * self.response_mask).sum(1) / self.lengths

    def responses(self, rows: Tensor | slice = slice(None)) -> list[Tensor]:
        """Return the token ids of each response, or of selected ones."""
        return list(self.response_ids[rows][self.response_mask[rows]].split(self.lengths[rows].tolist()))

    def place(self, values: Tensor, rows: Tensor) -> Tensor:
        """Return values of the tokens of ``rows`` on a grid, padded with 0.

        Values (N,) of concatenated tokens become (len(rows), T).
        """
        mask = self.response_mask[rows]
        placed = torch.zeros(mask.shape, dtype=values.dtype)
        placed[mask] = values.cpu()
        return placed
