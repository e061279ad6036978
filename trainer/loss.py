"""The clipped policy loss, per token. Sums and denominators are the caller's: one number for the whole batch."""

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


def policy_loss(
    logprob: Tensor, old_logprob: Tensor, advantage: Tensor, clip_low: float, clip_high: float
) -> PolicyLoss:
    """max(-rho A, -clip(rho, 1 - clip_low, 1 + clip_high) A), rho = exp(logprob - old_logprob).

    PPO's surrogate (arXiv 1707.06347) with DAPO's two bounds (arXiv 2503.14476).

    Args:
        logprob: Under the policy being trained, (N,), with gradient.
        old_logprob: Under the policy that sampled, (N,).
        advantage: Shaped advantages, (N,).
        clip_low: Bound below 1.
        clip_high: Bound above 1.

    Returns:
        Per-token losses and which tokens the clip cut off; empty for N = 0.
    """
    ratio = (logprob - old_logprob).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    with torch.no_grad():
        is_low = (ratio < 1 - clip_low) & (advantage < 0)
        is_high = (ratio > 1 + clip_high) & (advantage > 0)
    return PolicyLoss(torch.maximum(-ratio * advantage, -clipped * advantage), is_low, is_high)


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
