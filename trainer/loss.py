"""The clipped policy loss, per token. Weights and denominators are the caller's; see ``trainer.objectives``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.config import KLEstimator


@dataclass
class PolicyLoss:
    """``loss`` (N,) with gradient; ``is_clipped_low`` and ``is_clipped_high`` (N,) bool, tokens without gradient."""

    loss: Tensor
    is_clipped_low: Tensor
    is_clipped_high: Tensor


def policy_loss(log_ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> PolicyLoss:
    """max(-rho A, -clip(rho, 1 - clip_low, 1 + clip_high) A), rho = exp(log_ratio).

    PPO's surrogate (arXiv 1707.06347) with DAPO's two bounds (arXiv 2503.14476).

    Args:
        log_ratio: ln p - ln p_old of each token, or ``sequence_log_ratio`` of it, (N,), with gradient.
        advantage: Shaped advantages, (N,).
        clip_low: Bound below 1.
        clip_high: Bound above 1.

    Returns:
        Per-token losses and which tokens the clip cut off; empty for N = 0.
    """
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    with torch.no_grad():
        is_low = (ratio < 1 - clip_low) & (advantage < 0)
        is_high = (ratio > 1 + clip_high) & (advantage > 0)
    return PolicyLoss(torch.maximum(-ratio * advantage, -clipped * advantage), is_low, is_high)


def sequence_log_ratio(log_ratio: Tensor, lengths: Tensor) -> Tensor:
    """The mean over its response in the place of each token's log ratio (GSPO-token, arXiv 2507.18071, eq. 14).

    The value is that of the response; the gradient flows to each token by itself, which for equal advantages within a
    response is the gradient of GSPO.

    Args:
        log_ratio: (N,), responses end to end.
        lengths: Tokens of each response, summing to N.
    """
    rows = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths).to(log_ratio.device)
    totals = torch.zeros(len(lengths), dtype=log_ratio.dtype, device=log_ratio.device)
    totals = totals.index_add(0, rows, log_ratio.detach())
    return log_ratio - log_ratio.detach() + (totals / lengths.to(totals))[rows]


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, estimator: KLEstimator) -> Tensor:
    """Per-token estimate of KL(policy || reference) from sampled tokens (Schulman, "Approximating KL", 2020).

    With d = ref_logprob - logprob: k1 = -d (unbiased, high variance), k2 = d^2 / 2 (biased, its gradient is that of
    the KL), k3 = exp(d) - 1 - d (unbiased, never negative). All (N,), nats.
    """
    delta = ref_logprob - logprob
    if estimator == "k1":
        return -delta
    if estimator == "k2":
        return delta.square() / 2
    return delta.exp() - 1 - delta
