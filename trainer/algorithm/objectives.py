"""Loss variants: the weight of each token of a mini-batch in the loss.

The loss of a mini-batch is a sum over its tokens, with rho_t = p_t / p_t,old and the clipped policy loss L_t of
``algorithm.losses``:

    loss = sum_t c_t (w_t L_t + v_t |ln rho_t|)

1[.] is 1 if the condition holds and 0 otherwise.

A method chooses w, v, L, and the loss mask; an aggregation turns the mask into the scale c. All of them depend only on
values recorded during sampling, so that a mini-batch may be split into any micro-batches.

Deviations from the sources:

1. Entropy, probability, and covariance are those of the policy that sampled, over the whole mini-batch. The released
   code of Clip-Cov, KL-Cov, and STEER uses the policy being trained, over a micro-batch. Both agree at the first update
   of a batch.
2. For the same reason, Clip-Cov does not skip tokens that the ratio has already clipped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch

from entrace.trainer.algorithm.advantages import mean_surprisal
from entrace.trainer.algorithm.losses import (
    KLEstimator,
    PolicyLoss,
    detached_ratio_loss,
    gradient_preserving_loss,
    policy_loss,
    sequence_log_ratio,
)
from entrace.trainer.algorithm.method import (
    REGISTRY,
    RolloutView,
    call_method,
    find_method,
    objective,
    validate_with_own,
    with_sections,
)
from entrace.trainer.settings import (
    AboveOne,
    AboveZero,
    AfterValidator,
    BelowOne,
    Fraction,
    InputError,
    NonNegative,
    PositiveFraction,
    model_validator,
)

if TYPE_CHECKING:
    from torch import Tensor

Denominator = Literal["selected", "all"]
Aggregation = Literal["token_mean", "sequence_mean", "constant"]


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


def token_mean(loss_mask: Tensor, max_tokens: int) -> Tensor:
    """c_t = 1 / N for N counted tokens in the mini-batch (DAPO, arXiv 2503.14476)."""
    del max_tokens
    return loss_mask / loss_mask.sum().clamp(min=1)


def sequence_mean(loss_mask: Tensor, max_tokens: int) -> Tensor:
    """c_t = 1 / (R n_i), n_i counted tokens in response i (GRPO, arXiv 2402.03300).

    R is the number of responses with counted tokens.
    """
    del max_tokens
    lengths = loss_mask.sum(1, keepdim=True)
    return loss_mask / (lengths.clamp(min=1) * (lengths > 0).sum().clamp(min=1))


def constant(loss_mask: Tensor, max_tokens: int) -> Tensor:
    """c_t = 1 / (B L) for B responses of any length (Dr.GRPO, arXiv 2503.20783).

    L is ``max_tokens``, the longest response allowed.
    """
    return loss_mask / (len(loss_mask) * max_tokens)


AGGREGATIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "constant": constant,
}


def _check_method(method: str) -> str:
    try:
        find_method(method, "loss")
    except InputError as error:
        raise ValueError(str(error)) from None
    return method


class LossConfig(with_sections("loss", REGISTRY["loss"].values())):
    """Clipped policy loss: method, ratio, denominator, and KL and entropy terms.

    ``dual_clip`` caps the ratio of tokens with a negative advantage (verl's ``clip_ratio_c``, TRL's ``delta``).
    ``mask_truncated`` leaves responses that reached the length limit out of the loss; their rewards still enter the
    mean and standard deviation of their group. ``kl_clamp`` bounds the KL estimate as verl's ``low_var_kl`` does. A
    user's own method is ``module:function``; the function's name is the key of its section.
    """

    method: Annotated[str, AfterValidator(_check_method)] = "grpo"
    ratio: Literal["token", "sequence"] = "token"
    aggregation: Aggregation = "token_mean"
    clip_low: PositiveFraction = 0.2
    clip_high: AboveZero = 0.28
    dual_clip: AboveOne | None = None
    mask_truncated: bool = False
    normalize_std: bool = True
    kl_coef: NonNegative = 0.0
    kl_estimator: KLEstimator = "k3"
    kl_clamp: bool = False
    entropy_coef: NonNegative = 0.0

    @model_validator(mode="wrap")
    @classmethod
    def _with_own_section(cls, values: Any, handler: Any) -> Any:
        name = values.get("method") if isinstance(values, Mapping) else None
        return validate_with_own(cls, "loss", [name], values, handler) if isinstance(name, str) else handler(values)

    @model_validator(mode="after")
    def _fits_its_method(self) -> LossConfig:
        for key, value in find_method(self.method, "loss").needs.items():
            if (found := getattr(self, key)) != value:
                wanted = "no value" if value is None else json.dumps(value)
                raise ValueError(f"{key}: method {self.method} needs {wanted}, found {json.dumps(found)}")
        return self


@dataclass(frozen=True)
class Objective:
    """The loss of one mini-batch as a function of the policy being trained.

    Attributes:
        advantages: Shaped, (B, T).
        mask: Response tokens, (B, T) bool.
        token_scale: c, (B, T).
        weights: w, v, and L.
        config: Ratio and bounds.
    """

    advantages: Tensor
    mask: Tensor
    token_scale: Tensor
    weights: TokenWeights
    config: LossConfig

    @classmethod
    def of(cls, config: LossConfig, advantages: Tensor, rollouts: RolloutView, max_tokens: int) -> list[Objective]:
        """Build one objective per optimizer step.

        ``config.method`` gives the weights, and ``config.aggregation`` the scale.

        Args:
            config: The loss.
            advantages: Shaped advantages of the mini-batch, (B, T).
            rollouts: Its tokens.
            max_tokens: Longest response allowed.
        """
        spec = find_method(config.method, "loss")
        found = call_method(spec, advantages, rollouts, spec.parameters(config))
        passes = found if isinstance(found, tuple) else (found,)
        for weights in passes:
            if not isinstance(weights, TokenWeights):
                raise InputError(f"loss method {spec.name} returned {type(weights).__name__}, expected TokenWeights")
        scale = AGGREGATIONS[config.aggregation]
        return [
            cls(advantages, rollouts.response_mask, scale(weights.loss_mask, max_tokens), weights, config)
            for weights in passes
        ]

    @cached_property
    def regularized_scale(self) -> Tensor:
        """Scale c of the KL and entropy terms of the config, (B, T)."""
        regularized = self.weights.regularized
        return self.token_scale if regularized is None else self.token_scale * regularized

    @cached_property
    def entropy_weights(self) -> Tensor:
        """Weight of the entropy of each token in all bonuses, (B, T)."""
        weights = self.config.entropy_coef * self.regularized_scale
        own = self.weights.entropy_coef
        return weights + own * token_mean(self.weights.loss_mask, 0) if own else weights

    @property
    def has_gradient(self) -> Tensor:
        """Responses that can have a gradient, (B,) bool.

        Every token of the other responses has loss 0 at any ratio.
        """
        moves = self.advantages != 0
        if self.weights.penalty is not None:
            moves = moves | (self.weights.penalty != 0)
        return (moves & self.mask).any(1)

    def take(self, values: Tensor, rows: Tensor) -> Tensor:
        """Return the values (B, T) of the tokens of ``rows``, concatenated, (N,)."""
        return values[rows][self.mask[rows]]

    def evaluate(self, log_ratio: Tensor, rows: Tensor, entropy: Tensor | None = None) -> PolicyLoss:
        """Return the losses of the tokens of ``rows``, (N,).

        Over all rows, they sum to the loss of the mini-batch.

        Args:
            log_ratio: ln p - ln p_old of these tokens, concatenated, (N,), with gradient.
            rows: Rows of the mini-batch.
            entropy: Entropies of these tokens under the policy being trained, nats, (N,); None if they are unchanged.
        """
        advantages, token_scale, token_weights = (
            self.take(values, rows).to(log_ratio.device)
            for values in (self.advantages, self.token_scale, self.weights.token_weights)
        )
        is_sequence = self.config.ratio == "sequence"
        ratio = sequence_log_ratio(log_ratio, self.mask[rows].sum(1)) if is_sequence else log_ratio
        config = self.config
        low, high, dual = config.clip_low, config.clip_high, config.dual_clip
        if not self.weights.is_clipped:
            low, high, dual = 1.0, float("inf"), None
        elif self.weights.clip is not None:
            low, high = (self.take(bound, rows).to(log_ratio.device) for bound in self.weights.clip)
        result = self.weights.surrogate(ratio, advantages, low, high, dual)
        if self.weights.entropy_range is not None and entropy is not None:
            result = _within(result, entropy, [self.take(end, rows) for end in self.weights.entropy_range])
        loss = token_scale * token_weights * result.loss
        if self.weights.penalty is not None:
            loss = loss + token_scale * self.take(self.weights.penalty, rows).to(log_ratio.device) * log_ratio.abs()
        return replace(result, loss=loss)


def _within(result: PolicyLoss, entropy: Tensor, bounds: list[Tensor]) -> PolicyLoss:
    """Remove the gradient of tokens whose entropy is not between the bounds.

    They count as clipped.
    """
    is_low, is_high = entropy <= bounds[0].to(entropy), entropy >= bounds[1].to(entropy)
    return replace(
        result,
        loss=torch.where(is_low | is_high, result.loss.detach(), result.loss),
        is_clipped_low=result.is_clipped_low | is_low,
        is_clipped_high=result.is_clipped_high | is_high,
    )


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
