"""Loss variants: the weight of each token of a mini-batch in the loss.

A method chooses w, v, L, and the loss mask of the loss in ``algorithm.mini_batch``. 1[.] is 1 if the condition holds
and 0 otherwise.

Deviations from the sources:

1. Entropy, probability, and covariance are those of the policy that sampled, over the whole mini-batch. The released
   code of Clip-Cov, KL-Cov, and STEER uses the policy being trained, over a micro-batch. Both agree at the first update
   of a batch.
2. For the same reason, Clip-Cov does not skip tokens that the ratio has already clipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from entrace.trainer.algorithm.advantages import mean_surprisal
from entrace.trainer.algorithm.losses import (
    PolicyLoss,
    detached_ratio_loss,
    gradient_preserving_loss,
    policy_loss,
)
from entrace.trainer.algorithm.method import RolloutView, objective
from entrace.trainer.settings import AboveOne, AboveZero, BelowOne, Fraction, NonNegative, PositiveFraction, checked

if TYPE_CHECKING:
    from torch import Tensor

Denominator = Literal["selected", "all"]


@checked
@dataclass(frozen=True)
class TokenWeights:
    """Weights of the tokens of a mini-batch in its loss.

    Attributes:
        token_weights: w, (B, T).
        loss_mask: Tokens counted in the denominator, (B, T) bool.
        penalty: v, (B, T); None for no such term.
        is_clipped: Whether the ratio is clipped.
        surrogate: L as a function of ln rho, A, the two clip distances, and the dual clip.
        clip: Distances of the lower and the upper bound from 1, each (B, T); None for those of the config.
        entropy_range: Entropies of the policy being trained between which a token keeps its gradient, nats, each
            (B, T); None for no such bound.
        entropy_coef: Coefficient of the mean entropy of counted tokens, a bonus beside that of the config; None for no
            bonus.
        regularized: Tokens with the KL and entropy terms of the config, (B, T) bool; None for all counted tokens.
    """

    token_weights: Tensor
    loss_mask: Tensor
    penalty: Tensor | None = None
    is_clipped: bool = True
    surrogate: Callable[..., PolicyLoss] = policy_loss
    clip: tuple[Tensor, Tensor] | None = None
    entropy_range: tuple[Tensor, Tensor] | None = None
    entropy_coef: float | None = None
    regularized: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Return True if L is the clipped loss of the config, with nothing added to it."""
        return (
            self.surrogate is policy_loss
            and self.is_clipped
            and self.penalty is self.clip is self.entropy_range is self.entropy_coef is None
        )


@objective
def grpo(advantages: Tensor, rollouts: RolloutView) -> TokenWeights:
    """w_t = 1: every token of every response (arXiv 2402.03300)."""
    return TokenWeights(torch.ones_like(advantages), rollouts.response_mask)


@objective
def entropy_mask(
    advantages: Tensor, rollouts: RolloutView, top_frac: Fraction = 0.2, denominator: Denominator = "selected"
) -> TokenWeights:
    """w_t = 1[H_t in highest top_frac]: high-entropy tokens only (arXiv 2506.01939).

    ``denominator``: the loss is a mean over the selected tokens, as in the paper, or over all tokens, as in TRL. With
    20% of the tokens selected, the latter is five times smaller.
    """
    # Rounded up as in the released code, unlike in Clip-Cov and KL-Cov; a product such as 3.0000000000000004 is 3.
    count = int(top_frac * int(rollouts.response_mask.sum()) + 0.9999)
    selected = _highest(rollouts.entropy, rollouts.response_mask, count)
    return TokenWeights(
        selected.to(advantages.dtype), selected if denominator == "selected" else rollouts.response_mask
    )


@objective(settings={"clip_low": 1.0, "clip_high": 1.0})
def clip_cov(
    advantages: Tensor, rollouts: RolloutView, frac: Fraction = 2e-4, low: float = 1.0, high: float = 5.0
) -> TokenWeights:
    """w_t = 0 for a random frac of the tokens with low < cov_t < high: Clip-Cov, keeps entropy (arXiv 2505.22617).

    cov_t = (A_t - mean A)(ln p_t - mean ln p), means over the tokens of the mini-batch. At least one token is
    excluded if any lies between the bounds; the denominator counts all tokens. As in the released scripts, the ratio
    has no lower bound, and 2 is the upper one.
    """
    cov = _covariance(advantages, rollouts)
    candidates = torch.nonzero(rollouts.response_mask & (cov > low) & (cov < high))
    count = min(_rounded_down(frac, rollouts), len(candidates))
    chosen = candidates[torch.from_numpy(rollouts.rng.permutation(len(candidates))[:count])]
    weights = torch.ones_like(advantages)
    weights[chosen[:, 0], chosen[:, 1]] = 0
    return TokenWeights(weights, rollouts.response_mask)


@objective
def kl_cov(advantages: Tensor, rollouts: RolloutView, frac: Fraction = 2e-3, coef: NonNegative = 1.0) -> TokenWeights:
    """v_t = coef 1[cov_t in top frac]: KL-Cov, keeps entropy (arXiv 2505.22617).

    The ratio is not clipped. cov_t is that of Clip-Cov. |ln rho| has no gradient at the first update of a batch: the
    method needs several ``optim.mini_batches`` or ``optim.epochs`` to have an effect.
    """
    selected = _highest(_covariance(advantages, rollouts), rollouts.response_mask, _rounded_down(frac, rollouts))
    penalty = coef * selected.to(advantages.dtype)
    return TokenWeights(torch.ones_like(advantages), rollouts.response_mask, penalty, is_clipped=False)


@objective(section="ppl_only")
def low_ppl_only(advantages: Tensor, rollouts: RolloutView, frac: PositiveFraction = 0.5) -> TokenWeights:
    """w_t = 1[PPL_i in bottom frac of group]: low perplexity only (arXiv 2508.02260).

    Mean over the selected tokens; of n responses at least one and at most ``ceil(frac n)`` are selected.
    """
    return _by_perplexity(advantages, rollouts, frac, 1)


@objective(section="ppl_only")
def high_ppl_only(advantages: Tensor, rollouts: RolloutView, frac: PositiveFraction = 0.5) -> TokenWeights:
    """w_t = 1[PPL_i in top frac of group]: high perplexity only (arXiv 2508.02260)."""
    return _by_perplexity(advantages, rollouts, frac, -1)


@objective
def steer(
    advantages: Tensor,
    rollouts: RolloutView,
    mapping: Literal["linear", "exponential"] = "linear",
    low: PositiveFraction = 0.8,
    high: NonNegative = 1.2,
) -> TokenWeights:
    """w_t falls with |A (1 - p_t) (ln p_t + H_t)|: STEER, tokens that move entropy count less (arXiv 2510.10150).

    The argument estimates the change of entropy by the token's update. ``linear`` maps its range over the mini-batch to
    [low, high], the largest change to ``low``. ``exponential`` is exp(-c |.|) with c such that the largest change, or
    0.02 if that is larger, is mapped to ``low``; ``high`` has no effect. Both are in the released code, whose earlier
    version had (1 - p_t)^2; they could not be checked against the paper.
    """
    mask = rollouts.response_mask
    p = rollouts.logprobs.exp().clamp(1e-8, 1 - 1e-8)
    change = (advantages * (1 - p) * (p.log() + rollouts.entropy)).abs()
    if not mask.any():
        return TokenWeights(torch.ones_like(advantages), mask)
    least, most = change[mask].min(), change[mask].max()
    if mapping == "exponential":
        weights = (math.log(low) / most.clamp(min=0.02) * change).exp().clamp(low, 1)
    elif most > least:
        weights = (high - (change - least) * (high - low) / (most - least)).clamp(low, high)
    else:
        weights = torch.full_like(change, (low + high) / 2)
    return TokenWeights(weights, mask)


@objective
def ce_gppo(
    advantages: Tensor, rollouts: RolloutView, keep_low: NonNegative = 0.75, keep_high: NonNegative = 1.0
) -> TokenWeights:
    """Grad L_t = -keep (1 -+ clip) A grad ln p_t if clipped: CE-GPPO, clipped tokens still count (arXiv 2509.20712).

    ``keep_low`` and ``keep_high`` are beta_1 and beta_2 of the released code, for tokens below and above the bounds. It
    has no effect at the first update of a batch: it needs several ``optim.mini_batches`` or ``optim.epochs``.
    """
    surrogate = partial(gradient_preserving_loss, keep_low=keep_low, keep_high=keep_high)
    return TokenWeights(torch.ones_like(advantages), rollouts.response_mask, surrogate=surrogate)


@objective(needs={"dual_clip": None})
def cispo(advantages: Tensor, rollouts: RolloutView, cap: AboveOne = 5.0) -> TokenWeights:
    """Grad L_t = -min(rho_t, cap) A grad ln p_t: CISPO, every token counts, its ratio capped (arXiv 2506.13585).

    ``cap`` is 1 + epsilon_high of the paper, which gives no value, and ``epsilon_high`` of TRL, for which 5 is
    recommended. Like the paper's runs and TRL, it has no lower bound. ``clip_low`` and ``clip_high`` have no effect.
    """
    surrogate = partial(detached_ratio_loss, cap=cap)
    return TokenWeights(torch.ones_like(advantages), rollouts.response_mask, surrogate=surrogate)


@objective(needs={"ratio": "token"})
def dcpo(
    advantages: Tensor, rollouts: RolloutView, low: AboveZero = 0.16, high: AboveZero = 0.2, cap: AboveOne = 10.0
) -> TokenWeights:
    """|rho_t - 1| rho_t p_t,old <= low, high: dynamic bounds of DCPO, wider for unlikely tokens (arXiv 2509.02333).

    Solved for the ratio: (1 + sqrt(max(1 - 4 low / p, 0))) / 2 <= rho <= min((1 + sqrt(1 + 4 high / p)) / 2, cap). The
    other two parts of DCPO, advantages standardized over past epochs and a mean per response, are not included.
    ``clip_low`` and ``clip_high`` have no effect. The defaults are those of the released README; its script sets
    ``high`` to .28 for the large run. The released code also caps the ratio of negative advantages at 10, which is
    ``dual_clip=10`` here.
    """
    p = rollouts.logprobs.exp()
    lowest = (1 + (1 - 4 * low / p).clamp(min=0).sqrt()) / 2
    highest = ((1 + (1 + 4 * high / p).sqrt()) / 2).clamp(max=cap)
    return TokenWeights(torch.ones_like(advantages), rollouts.response_mask, clip=(1 - lowest, highest - 1))


@objective
def erc(advantages: Tensor, rollouts: RolloutView, low: BelowOne = 0.05, high: AboveZero = 0.05) -> TokenWeights:
    """Grad L_t = 0 unless 1 - low < H_t / H_t,old < 1 + high: entropy ratio clipping (arXiv 2512.05591).

    H_t is the entropy under the policy being trained. The clip of the ratio stays. Tokens outside the bounds count as
    clipped. Like all bounds, it has no effect at the first update of a batch.
    """
    eps = 1e-8
    bounds = tuple(factor * (rollouts.entropy + eps) - eps for factor in (1 - low, 1 + high))
    return TokenWeights(torch.ones_like(advantages), rollouts.response_mask, entropy_range=(bounds[0], bounds[1]))


@objective
def lopti(
    advantages: Tensor, rollouts: RolloutView, threshold: Fraction = 0.5, low_first: bool = True
) -> tuple[TokenWeights, TokenWeights]:
    """w_t = 1 if p_t < threshold else 0, then 1 - w_t: Lopti, unlikely tokens first, then likely (arXiv 2505.12929).

    The step takes its mini-batches twice: once with either part, so that it has twice as many updates. Denominators
    count all tokens, and KL and entropy terms act on the tokens of the pass, as in the released code. ``low_first`` is
    the order of the paper.
    """
    is_low = (rollouts.logprobs.exp() < threshold) & rollouts.response_mask
    parts = is_low, rollouts.response_mask & ~is_low
    first, second = (
        TokenWeights(part.to(advantages.dtype), rollouts.response_mask, regularized=part) for part in parts
    )
    return (first, second) if low_first else (second, first)


@objective(needs={"entropy_coef": 0.0})
def adaptive_entropy(
    advantages: Tensor,
    rollouts: RolloutView,
    target: NonNegative = 0.2,
    initial: NonNegative = 0.0,
    delta: NonNegative = 0.005,
    lowest: NonNegative = 0.0,
    highest: NonNegative = 1.0,
) -> TokenWeights:
    """L - c_s mean H, c_s+1 = c_s +- delta: an entropy bonus that keeps H at a target (arXiv 2505.22312, TRL).

    c rises after a step with mean token entropy of at most ``target`` and falls after another, within [lowest,
    highest]. The bonus is applied only if the entropy of the previous step was at most ``target``. TRL updates c at
    every optimizer step, from the tokens of that step; here it is updated once per training step, from all tokens
    sampled, which agrees with one optimizer step per training step and makes resumed runs equal. As in TRL, mean H is
    a mean over tokens whatever the aggregation of the loss.
    """
    coefficient = initial
    for entropy in rollouts.past_entropy:
        moved = coefficient + (delta if entropy <= target else -delta)
        coefficient = min(moved, highest) if entropy <= target else max(moved, lowest)
    is_below = bool(rollouts.past_entropy) and rollouts.past_entropy[-1] <= target
    weights = torch.ones_like(advantages)
    return TokenWeights(weights, rollouts.response_mask, entropy_coef=coefficient if is_below else 0.0)


def _covariance(advantages: Tensor, rollouts: RolloutView) -> Tensor:
    mask = rollouts.response_mask
    return (advantages - advantages[mask].mean()) * (rollouts.logprobs - rollouts.logprobs[mask].mean())


def _highest(values: Tensor, mask: Tensor, count: int) -> Tensor:
    """Select the ``count`` masked tokens with the highest values, (B, T) bool.

    If the mask has any tokens, at least one is selected.
    """
    selected = torch.zeros_like(mask)
    places = torch.nonzero(mask)[values[mask].argsort(descending=True, stable=True)[: max(1, count)]]
    selected[places[:, 0], places[:, 1]] = True
    return selected


def _rounded_down(frac: float, rollouts: RolloutView) -> int:
    return max(1, int(frac * int(rollouts.response_mask.sum())))


def _by_perplexity(advantages: Tensor, rollouts: RolloutView, frac: float, sign: int) -> TokenWeights:
    """Select the ``frac`` of each group with the lowest or highest perplexity.

    ``sign`` is 1 for the lowest and -1 for the highest. Empty responses come last.
    """
    surprisal = (sign * mean_surprisal(rollouts.logprobs, rollouts.response_mask)).nan_to_num(torch.inf).numpy()
    groups = rollouts.group_ids.numpy()
    order = np.lexsort((surprisal, groups))
    size = np.unique(groups, return_counts=True)[1]
    rank = np.concatenate([np.arange(n) for n in size]) if len(size) else np.zeros(0)
    is_selected = torch.zeros(len(groups), dtype=torch.bool)
    is_selected[torch.from_numpy(order)] = torch.from_numpy(rank < np.ceil(frac * np.repeat(size, size)))
    selected = rollouts.response_mask & is_selected[:, None]
    return TokenWeights(selected.to(advantages.dtype), selected)
