"""Shape advantages: one function per method, (B, T) -> (B, T).

``shape`` applies the methods of a config.

Notation: A is the advantage and A' the shaped advantage of a token; r_t = (t - 1) / |o_i| is the relative position of a
token, t from 1; p_t is its probability and H_t the entropy of its distribution when it was sampled.

Deviations from the sources:

1. The released code of arXiv 2508.02260 computes the factor of its low-perplexity branch and never applies it. Here
   ``ppl`` applies it, as the equation in the paper does, and ``released_noop`` is the released behavior.
2. With dynamic sampling, PSR, NSR, and weighted REINFORCE exclude uniform groups, as all methods here do.
3. Pass@k training and unlikeliness reward see the verdict only. Length penalties do not enter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch

from entrace.trainer.algorithm.advantages import EPS, group_relative_advantage, mean_surprisal, place_in_group, ppl_z
from entrace.trainer.algorithm.method import (
    REGISTRY,
    MethodSpec,
    RolloutView,
    Window,
    call_method,
    check_result,
    find_method,
    shaping,
    split_methods,
    validate_with_own,
    with_sections,
)
from entrace.trainer.algorithm.plateau import PlateauConfig
from entrace.trainer.settings import (
    AboveOne,
    AfterValidator,
    BaseConfig,
    BeforeValidator,
    BelowOne,
    Fraction,
    InputError,
    NonNegative,
    Positive,
    model_validator,
)

if TYPE_CHECKING:
    from torch import Tensor


@shaping
def ppl(
    advantages: Tensor, rollouts: RolloutView, alpha: float = 0.01, clip: tuple[float, float] = (0.8, 1.2)
) -> Tensor:
    """A' = A clamp(1 - alpha z_i, *clip): favors low perplexity (arXiv 2508.02260).

    z_i is the log perplexity of the response standardized within its group; see ``advantages.ppl_z``. An empty response
    keeps its advantages.
    """
    return advantages * _ppl_factor(rollouts, alpha, clip)[:, None]


@shaping(section="ppl")
def ppl_high(
    advantages: Tensor, rollouts: RolloutView, alpha: float = 0.01, clip: tuple[float, float] = (0.8, 1.2)
) -> Tensor:
    """A' = A clamp(1 + alpha z_i, *clip): sign-flipped control (arXiv 2508.02260).

    High-perplexity responses count more.
    """
    return ppl(advantages, rollouts, -alpha, clip)


@shaping(section="ppl")
def ppl_permuted(
    advantages: Tensor, rollouts: RolloutView, alpha: float = 0.01, clip: tuple[float, float] = (0.8, 1.2)
) -> Tensor:
    """A' = A clamp(1 - alpha z_s(i), *clip): shuffled control (this toolkit).

    s permutes the responses of a group at random: the same factors as in ``ppl``, on other responses.
    """
    factor = _ppl_factor(rollouts, alpha, clip)
    groups = rollouts.group_ids.numpy()
    # Sorted by group, the responses of a group occupy the same positions in order and at random.
    in_order, at_random = (
        np.lexsort((keys, groups)) for keys in (np.arange(len(groups)), rollouts.rng.random(len(groups)))
    )
    shuffled = torch.empty_like(factor)
    shuffled[torch.from_numpy(in_order)] = factor[torch.from_numpy(at_random)]
    return advantages * shuffled[:, None]


@shaping(start_step="plateau")
def position(
    advantages: Tensor, rollouts: RolloutView, gamma: NonNegative = 0.1, slope: float = 15.0, cap: Fraction = 0.5
) -> Tensor:
    """A' = A + sign(A) min(gamma sigmoid(slope (r_t - 0.5)), cap |A|): late tokens count more (arXiv 2508.02260).

    Positions outside the mask keep their value.
    """
    return _add_bonus(advantages, rollouts, gamma * torch.sigmoid(slope * (_relative_position(rollouts) - 0.5)), cap)


@shaping(section="position", start_step="plateau")
def position_reversed(
    advantages: Tensor, rollouts: RolloutView, gamma: NonNegative = 0.1, slope: float = 15.0, cap: Fraction = 0.5
) -> Tensor:
    """A' = A + sign(A) min(gamma sigmoid(slope (0.5 - r_t)), cap |A|): control, early tokens count (this toolkit)."""
    return _add_bonus(advantages, rollouts, gamma * torch.sigmoid(slope * (0.5 - _relative_position(rollouts))), cap)


@shaping
def entropy_advantage(
    advantages: Tensor, rollouts: RolloutView, alpha: NonNegative = 0.4, kappa: AboveOne = 2.0
) -> Tensor:
    """A' = A + min(alpha H_t, |A| / kappa): bonus for uncertainty (arXiv 2506.14758).

    The bonus flips no sign.
    """
    bonus = torch.minimum(alpha * rollouts.entropy, advantages.abs() / kappa)
    return torch.where(rollouts.response_mask, advantages + bonus, advantages)


@shaping
def reweighting(advantages: Tensor, rollouts: RolloutView, alpha: Fraction = 0.2) -> Tensor:
    """A' = A (alpha p_t + 1 - alpha): unlikely tokens count less (arXiv 2505.12929).

    Unlikely tokens have large gradients.
    """
    weight = alpha * rollouts.logprobs.exp() + 1 - alpha
    return torch.where(rollouts.response_mask, advantages * weight, advantages)


@shaping
def psr(advantages: Tensor, rollouts: RolloutView) -> Tensor:
    """A' = 1 if correct else 0: learns from correct responses only (arXiv 2506.01347).

    This is positive sample reinforcement (PSR).
    """
    return _by_outcome(advantages, rollouts, 1.0, 0.0)


@shaping
def nsr(advantages: Tensor, rollouts: RolloutView) -> Tensor:
    """A' = 0 if correct else -1: learns from incorrect responses only (arXiv 2506.01347).

    This is negative sample reinforcement (NSR).
    """
    return _by_outcome(advantages, rollouts, 0.0, -1.0)


@shaping
def weighted_reinforce(advantages: Tensor, rollouts: RolloutView, positive_weight: NonNegative = 0.1) -> Tensor:
    """A' = positive_weight if right else -1: NSR + weighted PSR (arXiv 2506.01347).

    Right responses are down-weighted.
    """
    return _by_outcome(advantages, rollouts, positive_weight, -1.0)


@shaping(replaces=True)
def quantile_advantage(
    advantages: Tensor, rollouts: RolloutView, quantile: BelowOne = 0.4, interpolate: bool = False
) -> Tensor:
    """A' = (r_i - Q(r)) / (std(r) + eps): QAE, quantile baseline (arXiv 2509.22611).

    The quantile Q replaces the group's mean. Q is the smallest reward with at least ``quantile`` of the group at or
    below it. Only correct responses count where at most 1 - ``quantile`` of them are correct, and only incorrect ones
    elsewhere, as in the paper. The released code interpolates linearly between two rewards, as ``interpolate`` does: if
    the quantile lies between an incorrect and a correct response, both count. Responses without a verdict get 0.
    """
    values, is_counted = _by_group(rollouts, rollouts.rewards)
    count = is_counted.sum(1, keepdim=True).double()
    ordered = torch.where(is_counted, values, torch.inf).sort(1).values
    # Rounding must not move a boundary such as 0.4 x 5.
    place = quantile * (count - 1) if interpolate else (quantile * count - 1e-9).ceil() - 1
    place = place.clamp(min=0)
    low, high = (ordered.gather(1, end.long()) for end in (place.floor(), place.ceil()))
    baseline = low + torch.where(high > low, (place - place.floor()).to(low) * (high - low), 0)
    centered = torch.where(is_counted, values - baseline, 0)
    mean = torch.where(is_counted, values, 0).sum(1, keepdim=True) / count.clamp(min=1)
    variance = torch.where(is_counted, values - mean, 0).square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
    return _per_response(advantages, rollouts, centered / (variance.sqrt() + EPS))


@shaping(replaces=True)
def pass_at_k(advantages: Tensor, rollouts: RolloutView, k: Positive = 4) -> Tensor:
    """A' = (1 - P) / s if right else (1 - P - Q) / s: pass@k training, rewards the best of k (arXiv 2508.10751).

    w of the n responses with a verdict are wrong: P = 1 - C(w, k) / C(n, k) is the pass@k of the group, s = sqrt(P
    (1 - P)) + eps, and Q = C(w - 1, k - 1) / C(n - 1, k - 1) is the chance that k - 1 others do not pass either. 0
    in groups with fewer than k verdicts, in uniform groups, where fewer than k are wrong, and without a verdict.
    """
    is_correct, is_counted = _by_group(rollouts, rollouts.is_correct.to(advantages.dtype))
    count = is_counted.sum(1, keepdim=True).to(advantages.dtype)
    wrong = count - is_correct.sum(1, keepdim=True)
    all_fail, others_fail = _chance_of_none(wrong, count, k), _chance_of_none(wrong - 1, count - 1, k - 1)
    # Exactly 0 in uniform groups: both chances are exactly 1.
    value = torch.where(is_correct > 0, all_fail, all_fail - others_fail) / ((1 - all_fail) * all_fail).sqrt().add(EPS)
    return _per_response(advantages, rollouts, torch.where(is_counted & (count >= k), value, 0))


@shaping(replaces=True)
def unlikeliness(advantages: Tensor, rollouts: RolloutView, beta: Fraction = 0.25) -> Tensor:
    """A' = A(right (1 - beta k_i / n)): favors unlikely successes (arXiv 2506.02355).

    A(.) is the group-relative advantage. k_i counts the responses of the group, of n with a verdict, that are less
    likely, by the mean log probability of their tokens. The paper ranks from the other end, k_i = n - rank, and by the
    probability of the whole response; this is the released code. Ties are broken by order. Responses without a verdict
    get 0.
    """
    likelihood, is_counted = _by_group(rollouts, -mean_surprisal(rollouts.logprobs, rollouts.response_mask))
    likelihood = torch.where(is_counted, likelihood.nan_to_num(-torch.inf), torch.inf)
    rank = likelihood.argsort(dim=1, stable=True).argsort(dim=1).to(advantages.dtype)
    reward = 1 - beta * rank / is_counted.sum(1, keepdim=True).clamp(min=1)
    reward = rollouts.is_correct * reward[rollouts.group_ids, place_in_group(rollouts.group_ids)]
    value = group_relative_advantage(reward, rollouts.group_ids, is_counted=rollouts.rewards.isfinite())
    return value[:, None].expand_as(advantages).clone()


@shaping
def released_noop(advantages: Tensor, rollouts: RolloutView) -> Tensor:
    """A' = A: control, the released ppl branch (arXiv 2508.02260, released code).

    The study's released code computes the factor of its perplexity branch and never applies it.
    """
    return advantages


def scale_matched(advantages: Tensor, rollouts: RolloutView, mirrored: Tensor) -> Tensor:
    """A' = A sum|A_m| / sum|A|: control, another method's mean |A| (this toolkit).

    The factor is a constant. A_m are the advantages as ``shaping.scale_matched.mirrors`` shapes them. If every
    advantage is 0, all stay 0.
    """
    wanted, found = (values.abs()[rollouts.response_mask].sum() for values in (mirrored, advantages))
    return advantages * (wanted / found if found > 0 else 1.0)


# Applied through its name, with the methods that it mirrors; see ``shape``.
NONE, SCALE_MATCHED = "none", "scale_matched"
REGISTRY["shaping"][SCALE_MATCHED] = MethodSpec(SCALE_MATCHED, "shaping", scale_matched, SCALE_MATCHED)


def _join(method: Any) -> Any:
    return "+".join(split_methods(method)) or method


def _check_composition(method: str) -> str:
    for name in split_methods(method):
        if name == SCALE_MATCHED:
            raise ValueError(
                f"{SCALE_MATCHED} stands alone; name the methods to mirror in shaping.{SCALE_MATCHED}.mirrors"
            )
        try:
            spec = find_method(name, "shaping")
        except InputError as error:
            raise ValueError(str(error)) from None
        if spec.replaces and name != split_methods(method)[0]:
            raise ValueError(f"{name} replaces the advantage, so that what precedes it has no effect; name it first")
    return method


def _check_method(method: str) -> str:
    return method if method in (NONE, SCALE_MATCHED) else _check_composition(method)


Composition = Annotated[str, BeforeValidator(_join), AfterValidator(_check_composition)]
ShapingMethod = Annotated[str, BeforeValidator(_join), AfterValidator(_check_method)]


class ScaleMatchedConfig(BaseConfig):
    """Methods, applied in order, whose mean magnitude and windows are matched."""

    mirrors: Composition = "ppl"


class ShapingConfig(with_sections("shaping", (s for s in REGISTRY["shaping"].values() if s.name != SCALE_MATCHED))):
    """Advantage shaping: method, its parameters, and the plateau.

    Each method has a section of parameters. Windows may start at the plateau. ``method`` is ``none``,
    ``scale_matched``, or a list of methods applied in order (in a string, joined by ``+``). A user's own method is
    ``module:function``; the function's name is the key of its section.
    """

    method: ShapingMethod = NONE
    scale_matched: ScaleMatchedConfig = ScaleMatchedConfig()
    plateau: PlateauConfig = PlateauConfig()

    @model_validator(mode="wrap")
    @classmethod
    def _with_own_sections(cls, values: Any, handler: Any) -> Any:
        if not isinstance(values, Mapping):
            return handler(values)
        mirrors = dict(values.get(SCALE_MATCHED) or {}).get("mirrors")
        names = split_methods(values.get("method")) + split_methods(mirrors)
        return validate_with_own(cls, "shaping", names, values, handler)


def shape(
    advantages: Tensor, rollouts: RolloutView, config: ShapingConfig, step: int, plateau_step: int | None
) -> tuple[Tensor, bool]:
    """Apply the methods of a config that are on at ``step``, in order.

    Args:
        advantages: (B, T).
        rollouts: What the methods may depend on.
        config: Methods, parameters, and windows.
        step: Current training step, from 1.
        plateau_step: First step of the plateau, if it has been detected.

    Returns:
        Shaped advantages (B, T), and whether any method was on.

    Raises:
        InputError: a method returned something other than finite advantages of the same shape.
    """
    if config.method == SCALE_MATCHED:
        mirrored, is_shaped = shape(advantages, rollouts, _mirrored(config), step, plateau_step)
        return scale_matched(advantages, rollouts, mirrored), is_shaped
    active = [spec for spec in _specs(config) if is_on(_window(spec, config), step, plateau_step)]
    for spec in active:
        found = call_method(spec, advantages, rollouts, spec.parameters(config))
        advantages = check_result(spec, found, advantages)
    return advantages, bool(active)


def find_replacement(config: ShapingConfig) -> str | None:
    """Return the method that replaces the group-relative advantage, if there is one."""
    names = config.scale_matched.mirrors if config.method == SCALE_MATCHED else config.method
    return next((name for name in split_methods(names) if name != NONE and find_method(name, "shaping").replaces), None)


def waits_for_plateau(config: ShapingConfig) -> bool:
    """Return True if any method starts at the plateau detected during training."""
    if config.method == SCALE_MATCHED:
        return waits_for_plateau(_mirrored(config))
    return any(_window(spec, config).start_step == "plateau" for spec in _specs(config))


def is_on(window: Window, step: int, plateau_step: int | None) -> bool:
    """Return whether ``step`` lies in the window, both ends included."""
    start = plateau_step if window.start_step == "plateau" else window.start_step
    return start is not None and start <= step <= (window.end_step or step)


def _mirrored(config: ShapingConfig) -> ShapingConfig:
    return config.model_copy(update={"method": config.scale_matched.mirrors})


def _specs(config: ShapingConfig) -> list[MethodSpec]:
    return [] if config.method == NONE else [find_method(name, "shaping") for name in split_methods(config.method)]


def _window(spec: MethodSpec, config: ShapingConfig) -> Window:
    return getattr(config, spec.section or "")


def _ppl_factor(rollouts: RolloutView, alpha: float, clip: tuple[float, float]) -> Tensor:
    return (1 - alpha * ppl_z(rollouts.logprobs, rollouts.response_mask, rollouts.group_ids)).clamp(*clip)


def _relative_position(rollouts: RolloutView) -> Tensor:
    length = rollouts.response_mask.sum(1, keepdim=True).clamp(min=1)
    return torch.arange(rollouts.response_mask.shape[1]) / length


def _add_bonus(advantages: Tensor, rollouts: RolloutView, bonus: Tensor, cap: float) -> Tensor:
    bonus = torch.minimum(bonus, cap * advantages.abs())
    return torch.where(rollouts.response_mask, advantages + advantages.sign() * bonus, advantages)


def _by_group(rollouts: RolloutView, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return values by group and place, and which places have a verdict, (G, N).

    ``values`` belong to responses, (B,). Places without a verdict get 0.
    """
    at = rollouts.group_ids, place_in_group(rollouts.group_ids)
    shape = int(at[0].max()) + 1, int(at[1].max()) + 1
    is_counted = torch.zeros(shape, dtype=torch.bool)
    is_counted[at] = rollouts.rewards.isfinite()
    table = torch.zeros(shape, dtype=values.dtype)
    table[at] = values
    return torch.where(is_counted, table, 0), is_counted


def _per_response(advantages: Tensor, rollouts: RolloutView, values: Tensor) -> Tensor:
    """Return the values of groups, (G, N), at each token of their responses, (B, T)."""
    own = values[rollouts.group_ids, place_in_group(rollouts.group_ids)]
    return own[:, None].to(advantages.dtype).expand_as(advantages).clone()


def _chance_of_none(wrong: Tensor, count: Tensor, k: int) -> Tensor:
    """Return C(wrong, k) / C(count, k), exact at 0 and 1.

    This is the chance that k of ``count`` responses are all wrong.
    """
    factors = [(wrong - i).clamp(min=0) / (count - i).clamp(min=1) for i in range(k)]
    return torch.stack(factors).prod(0) if factors else torch.ones_like(wrong)


def _by_outcome(advantages: Tensor, rollouts: RolloutView, right: float, wrong: float) -> Tensor:
    value = torch.where(rollouts.is_correct, right, wrong).to(advantages.dtype)
    return value[:, None].expand_as(advantages).clone()
