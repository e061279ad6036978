"""The loss of a mini-batch: its config, its scale, and its value.

The loss is a sum over tokens, with rho_t = p_t / p_t,old and the clipped policy loss L_t of ``algorithm.losses``:

    loss = sum_t c_t (w_t L_t + v_t |ln rho_t|)

A method of ``algorithm.objectives`` chooses w, v, L, and the loss mask; an aggregation turns the mask into the scale c.
All of them depend only on values recorded during sampling, so that a mini-batch may be split into any micro-batches.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch

from entrace.trainer.algorithm.losses import KLEstimator, PolicyLoss, sequence_log_ratio
from entrace.trainer.algorithm.method import (
    REGISTRY,
    RolloutView,
    call_method,
    find_method,
    validate_with_own,
    with_sections,
)
from entrace.trainer.algorithm.objectives import TokenWeights
from entrace.trainer.settings import (
    AboveOne,
    AboveZero,
    AfterValidator,
    InputError,
    NonNegative,
    PositiveFraction,
    model_validator,
)

if TYPE_CHECKING:
    from torch import Tensor

Aggregation = Literal["token_mean", "sequence_mean", "constant"]


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
            for name in ("token_weights", "loss_mask", "penalty", "regularized"):
                value, expected = getattr(weights, name), tuple(advantages.shape)
                if value is not None and tuple(value.shape) != expected:
                    raise InputError(
                        f"loss method {spec.name} returned {name} of shape {tuple(value.shape)}, expected {expected}"
                    )
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
