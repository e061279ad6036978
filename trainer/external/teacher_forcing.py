"""Evaluate given responses with one teacher-forced pass of a model.

The pass yields the columns that training records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from entrace.analysis.importers.rollout import Rollout
from entrace.trainer.config import PolicyConfig
from entrace.trainer.faults import TrainingError, memory_advice
from entrace.trainer.kernels.blocked_stats import compute_token_stats
from entrace.trainer.kernels.packing import cut_by_tokens
from entrace.trainer.kernels.token_stats import TokenStats, lm_head_grad_norm
from entrace.trainer.model.policy import Policy
from entrace.trainer.settings import AboveZero, BaseConfig, Positive


class PassSettings(BaseConfig):
    """Settings of the pass.

    ``batch_tokens`` bounds the tokens of a forward pass, including padding.
    """

    policy: PolicyConfig
    temperature: AboveZero = 1.0
    batch_tokens: Positive = 8192


@dataclass(frozen=True)
class PassValues:
    """Statistics of concatenated response tokens, (N,); see ``tables.TokenValues``."""

    stats: TokenStats
    hidden_norm: Tensor
    temperature: float

    @property
    def logprob(self) -> np.ndarray:
        """Return log-probabilities, (N,) float32."""
        return self.stats.logprob.numpy()

    @property
    def entropy(self) -> np.ndarray:
        """Return entropies, (N,) float32."""
        return self.stats.entropy.numpy()

    def grad_norm(self, advantages: np.ndarray) -> np.ndarray:
        """Return norms of policy gradients at the LM head per token, (N,).

        The norm is NaN if the advantage is NaN.
        """
        given = torch.from_numpy(advantages)
        stats = self.stats
        return lm_head_grad_norm(given, stats.logprob, stats.sum_p2, self.hidden_norm, self.temperature).numpy()


@dataclass(frozen=True)
class TeacherForcing:
    """A model that evaluates given responses; see ``tables.Evaluator``."""

    policy: Policy
    settings: PassSettings

    @property
    def name(self) -> str:
        """Return where the model was loaded from."""
        return self.policy.name

    def evaluate(self, chunk: Sequence[Rollout]) -> PassValues:
        """Return the statistics of all tokens of the responses, context included.

        Raises:
            TrainingError: memory ran out, or the model returned NaN or infinity.
        """
        with memory_advice(self.settings, f"importing step {chunk[0].step}", "batch_tokens"):
            return self._evaluate(chunk)

    @torch.no_grad()
    def _evaluate(self, chunk: Sequence[Rollout]) -> PassValues:
        policy, settings = self.policy, self.settings
        prompts = [rollout.prompt_ids or [] for rollout in chunk]
        lengths = torch.tensor([len(rollout.response_ids) for rollout in chunk])
        starts = lengths.cumsum(0) - lengths
        values = torch.empty(4, int(lengths.sum()))
        whole = lengths + torch.tensor([len(prompt) for prompt in prompts])
        for part in cut_by_tokens(whole, settings.batch_tokens, is_padded=not policy.uses_packing):
            chosen = part.tolist()
            responses = [torch.tensor(chunk[i].response_ids) for i in chosen]
            hidden, targets, index = policy.forward_unique([prompts[i] for i in chosen], responses)
            stats = compute_token_stats(hidden, policy.head, targets, settings.temperature)
            places = torch.cat([torch.arange(len(r)) + start for r, start in zip(responses, starts[part], strict=True)])
            distinct = torch.stack([*vars(stats).values(), hidden.float().norm(dim=-1)])
            values[:, places] = distinct[:, index].cpu()
        if not values.isfinite().all():
            first = int((~values.isfinite()).any(0).nonzero()[0])
            place = chunk[int(torch.searchsorted(starts, first, right=True)) - 1].place
            raise TrainingError(f"{place}: {policy.name} gives this response a probability that is NaN or infinite")
        return PassValues(TokenStats(*values[:3]), values[3], settings.temperature)
