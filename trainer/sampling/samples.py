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
    """What tokens are drawn from, and what ends a response besides the stop tokens.

    ``truncation`` cuts the distribution before anything is recorded of it. ``stop`` holds texts: the token that
    completes one of them is the response's last. ``cache_tokens`` bounds memory; it changes what is
    drawn by rounding at most.
    """

    max_tokens: int
    temperature: float = 1.0
    truncation: Truncation = WHOLE
    stop: tuple[str, ...] = ()
    cache_tokens: int = sys.maxsize

    @classmethod
    def of(cls, config: RolloutConfig) -> SamplingParams:
        """Those of a training step."""
        truncation = Truncation(config.top_p, config.top_k)
        return cls(config.max_response_tokens, config.temperature, truncation, config.stop, config.cache_tokens)


@dataclass
class Rollouts:
    """Responses, one a row; on the CPU, padded to T; a value outside ``response_mask`` means nothing.

    Attributes:
        prompt_ids: Prompt tokens of each response, B lists.
        response_ids: (B, T) int64.
        response_mask: (B, T) bool, True at generated tokens, the end of sequence included.
        stats: ``logprob``, ``entropy``, ``sum_p2``, each (B, T), of the distribution sampled from.
        hidden_norm: Norm of the LM head's input, (B, T).
        is_truncated: (B,) bool, stopped by the length limit.
    """

    prompt_ids: list[list[int]]
    response_ids: Tensor
    response_mask: Tensor
    stats: TokenStats
    hidden_norm: Tensor
    is_truncated: Tensor

    @classmethod
    def empty(cls, prompts: list[list[int]], max_tokens: int) -> Rollouts:
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
    def concatenate(cls, parts: list[Rollouts]) -> Rollouts:
        """Rows of all parts, which share T."""
        return cls(
            [prompt for part in parts for prompt in part.prompt_ids],
            torch.cat([part.response_ids for part in parts]),
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

    def responses(self, rows: Tensor | slice = slice(None)) -> list[Tensor]:
        """Token ids of each response, or of each of some."""
        return list(self.response_ids[rows][self.response_mask[rows]].split(self.lengths[rows].tolist()))

    def place(self, values: Tensor, rows: Tensor) -> Tensor:
        """Puts values (N,) of the tokens of ``rows``, end to end, at their places, (len(rows), T); 0 elsewhere."""
        mask = self.response_mask[rows]
        placed = torch.zeros(mask.shape, dtype=values.dtype)
        placed[mask] = values.cpu()
        return placed
