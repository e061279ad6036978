"""Loss variants: the weight of each token of a mini-batch in the loss.

The loss of a mini-batch is a sum over its tokens, with rho_t = p_t / p_t,old and the clipped policy loss L_t of
``algorithm.losses``:

    loss = sum_t c_t (w_t L_t + v_t |ln rho_t|)

A method chooses w, v, and the loss mask; an aggregation turns the mask into the scale c. All of them depend only on
values recorded during sampling, so that a mini-batch may be split into any micro-batches.

Deviations from the sources:

1. Entropy and covariance are those of the policy that sampled, over the whole mini-batch. The released code of Clip-Cov
   and KL-Cov uses the policy being trained, over a micro-batch. Both agree at the first update of a batch.
2. For the same reason, Clip-Cov does not skip tokens that the ratio has already clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch

from entrace.trainer.algorithm.advantages import mean_surprisal
from entrace.trainer.algorithm.losses import KLEstimator, PolicyLoss, policy_loss, sequence_log_ratio
from entrace.trainer.algorithm.method import (
    REGISTRY,
    RolloutView,
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
    """

    token_weights: Tensor
    loss_mask: Tensor
    penalty: Tensor | None = None
    is_clipped: bool = True


@objective
def grpo(advantages: Tensor, rollouts: RolloutView) -> TokenWeights:
    """w_t = 1: every token of every response (arXiv 2402.03300)."""
    return TokenWeights(torch.ones_like(advantages), rollouts.response_mask)


@objective
def entropy_mask(
    advantages: Tensor, rollouts: RolloutView, top_frac: Fraction = 0.2, denominator: Denominator = "selected"
) -> TokenWeights:
    """w_t = 1 if H_t is among the top_frac highest else 0: high-entropy tokens only (arXiv 2506.01939).

    ``denominator``: the loss is a mean over the selected tokens, as in the paper, or over all tokens, as in TRL. With
    20 % of the tokens selected, the latter is five times smaller.
    """
    selected = _highest(rollouts.entropy, rollouts.response_mask, top_frac)
    return TokenWeights(
        selected.to(advantages.dtype), selected if denominator == "selected" else rollouts.response_mask
    )


@objective(settings={"clip_high": 1.0})
def clip_cov(
    advantages: Tensor, rollouts: RolloutView, frac: Fraction = 2e-4, low: float = 1.0, high: float = 5.0
) -> TokenWeights:
    """w_t = 0 for a random frac of the tokens with low < cov_t < high: Clip-Cov, keeps entropy (arXiv 2505.22617).

    cov_t = (A_t - mean A)(ln p_t - mean ln p), means over the tokens of the mini-batch. At least one token is
    excluded if any lies between the bounds; the denominator counts all tokens.
    """
    cov = _covariance(advantages, rollouts)
    candidates = torch.nonzero(rollouts.response_mask & (cov > low) & (cov < high))
    count = min(_at_least_one(frac, rollouts.response_mask), len(candidates))
    chosen = candidates[torch.from_numpy(rollouts.rng.permutation(len(candidates))[:count])]
    surrogate = torch.ones_like(advantages)
    surrogate[chosen[:, 0], chosen[:, 1]] = 0
    return TokenWeights(surrogate, rollouts.response_mask)


@objective
def kl_cov(advantages: Tensor, rollouts: RolloutView, frac: Fraction = 2e-3, coef: NonNegative = 1.0) -> TokenWeights:
    """v_t = coef for the frac of tokens with the highest cov_t: KL-Cov, keeps entropy, no clip (arXiv 2505.22617).

    cov_t as for Clip-Cov. |ln rho| has no gradient at the first update of a batch: it needs several
    ``optim.mini_batches`` or ``optim.epochs`` to have an effect.
    """
    selected = _highest(_covariance(advantages, rollouts), rollouts.response_mask, frac)
    penalty = coef * selected.to(advantages.dtype)
    return TokenWeights(torch.ones_like(advantages), rollouts.response_mask, penalty, is_clipped=False)


@objective(section="ppl_only")
def low_ppl_only(advantages: Tensor, rollouts: RolloutView, frac: PositiveFraction = 0.5) -> TokenWeights:
    """w_t = 1 if PPL_i is among the frac lowest of its group else 0: low perplexity only (arXiv 2508.02260).

    Mean over the selected tokens; of n responses at least one and at most ``ceil(frac n)`` are selected.
    """
    return _by_perplexity(advantages, rollouts, frac, 1)


@objective(section="ppl_only")
def high_ppl_only(advantages: Tensor, rollouts: RolloutView, frac: PositiveFraction = 0.5) -> TokenWeights:
    """w_t = 1 if PPL_i is among the frac highest of its group else 0: high perplexity only (arXiv 2508.02260)."""
    return _by_perplexity(advantages, rollouts, frac, -1)


def token_mean(loss_mask: Tensor, max_tokens: int) -> Tensor:
    """c_t = 1 / N over the N counted tokens of the mini-batch (DAPO, arXiv 2503.14476)."""
    del max_tokens
    return loss_mask / loss_mask.sum().clamp(min=1)


def sequence_mean(loss_mask: Tensor, max_tokens: int) -> Tensor:
    """c_t = 1 / (R n_i) over the n_i counted tokens of each of R responses that have any (GRPO, arXiv 2402.03300)."""
    del max_tokens
    lengths = loss_mask.sum(1, keepdim=True)
    return loss_mask / (lengths.clamp(min=1) * (lengths > 0).sum().clamp(min=1))


def constant(loss_mask: Tensor, max_tokens: int) -> Tensor:
    """c_t = 1 / (B L) for B responses of at most L tokens, whatever their lengths (Dr.GRPO, arXiv 2503.20783)."""
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
    """Clipped policy loss: its method, ratio, and denominator, and the optional KL and entropy terms.

    ``dual_clip`` caps the ratio of tokens with a negative advantage (verl's ``clip_ratio_c``, TRL's ``delta``).
    ``mask_truncated`` leaves responses that reached the length limit out of the loss; their rewards still enter the
    mean and standard deviation of their group. ``kl_clamp`` bounds the KL estimate as verl's ``low_var_kl`` does. A
    user's own method is ``module:function``; the function's name is the key of its section.
    """

    method: Annotated[str, AfterValidator(_check_method)] = "grpo"
    ratio: Literal["token", "sequence"] = "token"
    aggregation: Aggregation = "token_mean"
    clip_low: BelowOne = 0.2
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


@dataclass(frozen=True)
class Objective:
    """The loss of one mini-batch as a function of the policy being trained.

    Attributes:
        advantages: Shaped, (B, T).
        mask: Response tokens, (B, T) bool.
        token_scale: c, (B, T).
        weights: w, v, and whether the ratio is clipped.
        config: Ratio and bounds.
    """

    advantages: Tensor
    mask: Tensor
    token_scale: Tensor
    weights: TokenWeights
    config: LossConfig

    @classmethod
    def of(cls, config: LossConfig, advantages: Tensor, rollouts: RolloutView, max_tokens: int) -> Objective:
        """Build the objective: weights by ``config.method``, scale by ``config.aggregation``.

        Args:
            config: The loss.
            advantages: Shaped advantages of the mini-batch, (B, T).
            rollouts: Its tokens.
            max_tokens: Longest response allowed.
        """
        spec = find_method(config.method, "loss")
        weights = spec.function(advantages, rollouts, **spec.parameters(config))
        if not isinstance(weights, TokenWeights):
            raise InputError(f"loss method {spec.name} returned {type(weights).__name__}, expected TokenWeights")
        token_scale = AGGREGATIONS[config.aggregation](weights.loss_mask, max_tokens)
        return cls(advantages, rollouts.response_mask, token_scale, weights, config)

    @property
    def has_gradient(self) -> Tensor:
        """Responses that can have a gradient, (B,) bool; every token of the others has loss 0 at any ratio."""
        moves = self.advantages != 0
        if self.weights.penalty is not None:
            moves = moves | (self.weights.penalty != 0)
        return (moves & self.mask).any(1)

    def take(self, values: Tensor, rows: Tensor) -> Tensor:
        """Return the values (B, T) of the tokens of ``rows``, concatenated, (N,)."""
        return values[rows][self.mask[rows]]

    def evaluate(self, log_ratio: Tensor, rows: Tensor) -> PolicyLoss:
        """Return the losses of the tokens of ``rows``; over all rows they sum to the loss of the mini-batch.

        Args:
            log_ratio: ln p - ln p_old of these tokens, concatenated, (N,), with gradient.
            rows: Rows of the mini-batch.
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
        result = policy_loss(ratio, advantages, low, high, dual)
        loss = token_scale * token_weights * result.loss
        if self.weights.penalty is not None:
            loss = loss + token_scale * self.take(self.weights.penalty, rows).to(log_ratio.device) * log_ratio.abs()
        return replace(result, loss=loss)


def _covariance(advantages: Tensor, rollouts: RolloutView) -> Tensor:
    mask = rollouts.response_mask
    return (advantages - advantages[mask].mean()) * (rollouts.logprobs - rollouts.logprobs[mask].mean())


def _highest(values: Tensor, mask: Tensor, frac: float) -> Tensor:
    """Select the ``frac`` of masked tokens with the highest values, at least one if there is any, (B, T) bool."""
    count = _at_least_one(frac, mask)
    selected = torch.zeros_like(mask)
    places = torch.nonzero(mask)[values[mask].argsort(descending=True, stable=True)[:count]]
    selected[places[:, 0], places[:, 1]] = True
    return selected


def _at_least_one(frac: float, mask: Tensor) -> int:
    return max(1, int(frac * int(mask.sum())))


def _by_perplexity(advantages: Tensor, rollouts: RolloutView, frac: float, sign: int) -> TokenWeights:
    """Select the ``frac`` of each group with the lowest (``sign`` 1) or highest (-1) perplexity; empty ones last."""
    surprisal = (sign * mean_surprisal(rollouts.logprobs, rollouts.response_mask)).nan_to_num(torch.inf).numpy()
    groups = rollouts.group_ids.numpy()
    order = np.lexsort((surprisal, groups))
    size = np.unique(groups, return_counts=True)[1]
    rank = np.concatenate([np.arange(n) for n in size]) if len(size) else np.zeros(0)
    is_selected = torch.zeros(len(groups), dtype=torch.bool)
    is_selected[torch.from_numpy(order)] = torch.from_numpy(rank < np.ceil(frac * np.repeat(size, size)))
    selected = rollouts.response_mask & is_selected[:, None]
    return TokenWeights(selected.to(advantages.dtype), selected)
