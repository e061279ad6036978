"""Compute the policy loss per token.

The caller applies weights and denominators; see ``algorithm.mini_batch``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

if TYPE_CHECKING:
    from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]

# Bounds of clamped KL estimates, in nats.
MAX_LOG_RATIO, MAX_KL = 20.0, 10.0


@dataclass
class PolicyLoss:
    """Losses of tokens, and the tokens whose gradient a bound cut off.

    Attributes:
        loss: (N,), with gradient.
        is_clipped_low: (N,) bool.
        is_clipped_high: (N,) bool.
        is_clipped_dual: (N,) bool.
    """

    loss: Tensor
    is_clipped_low: Tensor
    is_clipped_high: Tensor
    is_clipped_dual: Tensor


def policy_loss(
    log_ratio: Tensor,
    advantage: Tensor,
    clip_low: float | Tensor,
    clip_high: float | Tensor,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """Return max(-rho A, -clip(rho, 1 - clip_low, 1 + clip_high) A) per token.

    rho = exp(log_ratio). This is PPO's surrogate (arXiv 1707.06347) with DAPO's two bounds (arXiv 2503.14476). Where
    A < 0, ``dual_clip`` = c caps rho, so that the loss is at most -c A (dual-clip PPO, arXiv 1912.09729, eq. 5). For
    c >= 1 + clip_high, this equals the two-sided clip of INTELLECT-2 (arXiv 2505.07291).

    Args:
        log_ratio: ln p - ln p_old of each token, or ``sequence_log_ratio`` of it, (N,), with gradient.
        advantage: Shaped advantages, (N,).
        clip_low: Distance of the lower bound below 1, one for all tokens or one per token, (N,).
        clip_high: Distance of the upper bound above 1, likewise.
        dual_clip: c > 1, or None for no cap.

    Returns:
        Per-token losses and the tokens that each bound cuts off; empty for N = 0.
    """
    is_dual = torch.zeros_like(advantage, dtype=torch.bool)
    if dual_clip is not None:
        cap = math.log(dual_clip)
        is_dual = (log_ratio.detach() > cap) & (advantage < 0)
        # Clamped before the exponential, whose gradient at an infinite ratio would be 0 x infinity.
        log_ratio = torch.where(advantage < 0, log_ratio.clamp(max=cap), log_ratio)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(*cast("tuple[Any, Any]", (1 - clip_low, 1 + clip_high)))
    with torch.no_grad():
        is_low = (ratio < 1 - clip_low) & (advantage < 0)
        is_high = (ratio > 1 + clip_high) & (advantage > 0)
    return PolicyLoss(torch.maximum(-ratio * advantage, -clipped * advantage), is_low, is_high, is_dual)


def gradient_preserving_loss(
    log_ratio: Tensor,
    advantage: Tensor,
    clip_low: float | Tensor,
    clip_high: float | Tensor,
    dual_clip: float | None = None,
    *,
    keep_low: float,
    keep_high: float,
) -> PolicyLoss:
    """Return ``policy_loss`` with a bounded gradient where the clip cuts it off.

    The method is CE-GPPO (arXiv 2509.20712). Where rho < 1 - clip_low and A < 0, the loss is
    -keep_low (1 - clip_low) rho / sg(rho) A, and where rho > 1 + clip_high and A > 0, it is
    -keep_high (1 + clip_high) rho / sg(rho) A; sg stops the gradient. With keep_low = keep_high = 0, gradients are
    those of ``policy_loss``. A token counts as clipped only if nothing of its gradient is kept.
    """
    result = policy_loss(log_ratio, advantage, clip_low, clip_high, dual_clip)
    is_low, is_high = result.is_clipped_low, result.is_clipped_high
    weight = torch.where(is_low, keep_low * (1 - clip_low), keep_high * (1 + clip_high))
    kept = -weight * (log_ratio - log_ratio.detach()).exp() * advantage
    loss = torch.where(is_low | is_high, kept, result.loss)
    return replace(
        result, loss=loss, is_clipped_low=is_low & (keep_low == 0), is_clipped_high=is_high & (keep_high == 0)
    )


def detached_ratio_loss(
    log_ratio: Tensor,
    advantage: Tensor,
    clip_low: float | Tensor,
    clip_high: float | Tensor,
    dual_clip: float | None = None,
    *,
    cap: float,
) -> PolicyLoss:
    """Return -sg(min(rho, cap)) A ln p up to a constant (CISPO, arXiv 2506.13585).

    No token loses its gradient. The value is -min(rho, cap) A and the gradient that of the equation. The clip bounds
    have no effect.
    """
    del clip_low, clip_high, dual_clip
    weight = log_ratio.detach().clamp(max=math.log(cap)).exp()
    nothing = torch.zeros_like(advantage, dtype=torch.bool)
    return PolicyLoss(-weight * (log_ratio - log_ratio.detach()).exp() * advantage, nothing, nothing, nothing)


def sequence_log_ratio(log_ratio: Tensor, lengths: Tensor) -> Tensor:
    """Replace each token's log ratio by the mean over its response.

    The result is the ratio of GSPO-token (arXiv 2507.18071, eq. 14). The value is that of the response. The gradient
    flows to each token separately, which for equal advantages within a response is the gradient of GSPO.

    Args:
        log_ratio: (N,), responses concatenated.
        lengths: Tokens of each response, summing to N.
    """
    rows = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths).to(log_ratio.device)
    totals = torch.zeros(len(lengths), dtype=log_ratio.dtype, device=log_ratio.device)
    totals = totals.index_add(0, rows, log_ratio.detach())
    return log_ratio - log_ratio.detach() + (totals / lengths.to(totals))[rows]


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, estimator: KLEstimator, clamp: bool = False) -> Tensor:
    """Estimate KL(policy || reference) per token from sampled tokens.

    The estimators are those of Schulman ("Approximating KL", 2020). With d = ref_logprob - logprob: k1 = -d (unbiased,
    high variance), k2 = d^2 / 2 (biased, its gradient is that of the KL), k3 = exp(d) - 1 - d (unbiased, never
    negative). All (N,), nats.

    ``clamp`` bounds d to +-20 and the estimate to +-10; for k3 this is ``low_var_kl`` of verl.
    """
    delta = ref_logprob - logprob
    if clamp:
        delta = delta.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if estimator == "k1":
        found = -delta
    elif estimator == "k2":
        found = delta.square() / 2
    else:
        found = delta.exp() - 1 - delta
    return found.clamp(-MAX_KL, MAX_KL) if clamp else found
