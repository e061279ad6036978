"""Advantage shaping: one small function a method, (B, T) -> (B, T), and the table that names them.

The first line of each docstring is ``equation: what it does (source)``; ``entrace methods`` prints it. r_t is the
relative position (t - 1) / |o_i| of a token, t from 1, and p_t its probability when it was sampled.

Deviations from the sources:

1. The study's released code computes the factor of its low-perplexity branch and never applies it; here ``ppl`` applies
   it, as the paper's equation says, and ``released_noop`` is what was released.
2. PSR, NSR and weighted REINFORCE leave out groups of uniform reward as all methods here do, where dynamic sampling is
   on.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trainer.advantage import ppl_z
from trainer.config import ShapingConfig, Window
from trainer.method import Method, TokenBatch


def ppl(advantages: Tensor, batch: TokenBatch, alpha: float = 0.01, clip: tuple[float, float] = (0.8, 1.2)) -> Tensor:
    """A' = A clamp(1 - alpha z_i, *clip): low-perplexity responses count more (arXiv 2508.02260).

    z_i is the log perplexity of the response standardised within its group; see ``trainer.advantage.ppl_z``. An empty
    response keeps its advantages.
    """
    return advantages * _ppl_factor(batch, alpha, clip)[:, None]


def ppl_high(
    advantages: Tensor, batch: TokenBatch, alpha: float = 0.01, clip: tuple[float, float] = (0.8, 1.2)
) -> Tensor:
    """A' = A clamp(1 + alpha z_i, *clip): control, high-perplexity responses count more (arXiv 2508.02260)."""
    return ppl(advantages, batch, -alpha, clip)


def ppl_permuted(
    advantages: Tensor, batch: TokenBatch, alpha: float = 0.01, clip: tuple[float, float] = (0.8, 1.2)
) -> Tensor:
    """A' = A clamp(1 - alpha z_s(i), *clip): control, the factors of ppl shuffled within the group (this toolkit).

    s permutes the responses of a group at random: the same factors, on responses they do not belong to.
    """
    factor = _ppl_factor(batch, alpha, clip)
    groups = batch.group_ids.numpy()
    # Sorted by group, the responses of a group take the same places in order and at random.
    in_order, at_random = (
        np.lexsort((keys, groups)) for keys in (np.arange(len(groups)), batch.rng.random(len(groups)))
    )
    shuffled = torch.empty_like(factor)
    shuffled[torch.from_numpy(in_order)] = factor[torch.from_numpy(at_random)]
    return advantages * shuffled[:, None]


def position(
    advantages: Tensor, batch: TokenBatch, gamma: float = 0.1, slope: float = 15.0, cap: float = 0.5
) -> Tensor:
    """A' = A + sign(A) min(gamma sigmoid(slope (r_t - 0.5)), cap |A|): late tokens count more (arXiv 2508.02260).

    Places outside the mask keep their value.
    """
    return _add_bonus(advantages, batch, gamma * torch.sigmoid(slope * (_relative_position(batch) - 0.5)), cap)


def position_reversed(
    advantages: Tensor, batch: TokenBatch, gamma: float = 0.1, slope: float = 15.0, cap: float = 0.5
) -> Tensor:
    """A' = A + sign(A) min(gamma sigmoid(slope (0.5 - r_t)), cap |A|): control, early tokens count (this toolkit)."""
    return _add_bonus(advantages, batch, gamma * torch.sigmoid(slope * (0.5 - _relative_position(batch))), cap)


def entropy_advantage(advantages: Tensor, batch: TokenBatch, alpha: float = 0.4, kappa: float = 2.0) -> Tensor:
    """A' = A + min(alpha H_t, |A| / kappa): uncertain tokens gain, but no sign turns (arXiv 2506.14758)."""
    bonus = torch.minimum(alpha * batch.entropy, advantages.abs() / kappa)
    return torch.where(batch.response_mask, advantages + bonus, advantages)


def reweighting(advantages: Tensor, batch: TokenBatch, alpha: float = 0.2) -> Tensor:
    """A' = A (alpha p_t + 1 - alpha): unlikely tokens, whose gradients are large, count less (arXiv 2505.12929)."""
    weight = alpha * batch.logprobs.exp() + 1 - alpha
    return torch.where(batch.response_mask, advantages * weight, advantages)


def psr(advantages: Tensor, batch: TokenBatch) -> Tensor:
    """A' = 1 if right else 0: positive sample reinforcement, learns from right responses only (arXiv 2506.01347)."""
    return _by_outcome(advantages, batch, 1.0, 0.0)


def nsr(advantages: Tensor, batch: TokenBatch) -> Tensor:
    """A' = 0 if right else -1: negative sample reinforcement, learns from wrong responses only (arXiv 2506.01347)."""
    return _by_outcome(advantages, batch, 0.0, -1.0)


def weighted_reinforce(advantages: Tensor, batch: TokenBatch, positive_weight: float = 0.1) -> Tensor:
    """A' = positive_weight if right else -1: both, the right ones weighed down (arXiv 2506.01347)."""
    return _by_outcome(advantages, batch, positive_weight, -1.0)


def released_noop(advantages: Tensor, batch: TokenBatch) -> Tensor:
    """A' = A: control, what the study's released perplexity branch does (arXiv 2508.02260, released code)."""
    return advantages


def scale_matched(advantages: Tensor, batch: TokenBatch, mirrored: Tensor) -> Tensor:
    """A' = A sum|A_m| / sum|A|: control, a constant that gives A the mean magnitude of another method (this toolkit).

    ``mirrored`` holds A_m, the advantages as ``shaping.scale_matched.mirrors`` shapes them. Where all advantages are 0,
    they stay so.
    """
    wanted, found = (values.abs()[batch.response_mask].sum() for values in (mirrored, advantages))
    return advantages * (wanted / found if found > 0 else 1.0)


METHODS: dict[str, Method] = {
    "ppl": Method(ppl, "ppl"),
    "position": Method(position, "position"),
    "entropy_advantage": Method(entropy_advantage, "entropy_advantage"),
    "reweighting": Method(reweighting, "reweighting"),
    "psr": Method(psr),
    "nsr": Method(nsr),
    "weighted_reinforce": Method(weighted_reinforce, "weighted_reinforce"),
    "ppl_high": Method(ppl_high, "ppl"),
    "ppl_permuted": Method(ppl_permuted, "ppl"),
    "position_reversed": Method(position_reversed, "position"),
    "scale_matched": Method(scale_matched, "scale_matched"),
    "released_noop": Method(released_noop),
}


def shape(
    advantages: Tensor, batch: TokenBatch, config: ShapingConfig, step: int, plateau_step: int | None
) -> tuple[Tensor, bool]:
    """Applies the parts of ``config.method``, in the order named, that are on at ``step``.

    Args:
        advantages: (B, T).
        batch: What the methods look at.
        config: Method, parameters and windows.
        step: Current training step, from 1.
        plateau_step: First step of the plateau if it has been detected.

    Returns:
        Shaped advantages (B, T), and whether any part was on.
    """
    if config.method == "scale_matched":
        mirrors = config.model_copy(update={"method": config.scale_matched.mirrors})
        mirrored, is_shaped = shape(advantages, batch, mirrors, step, plateau_step)
        return scale_matched(advantages, batch, mirrored), is_shaped
    active = [part for part in _parts(config) if is_on(_window(part, config), step, plateau_step)]
    for part in active:
        advantages = part.function(advantages, batch, **part.parameters(config))
    return advantages, bool(active)


def waits_for_plateau(config: ShapingConfig) -> bool:
    """Return whether shaping starts, wholly or in part, at the plateau that is detected while training."""
    if config.method == "scale_matched":
        return waits_for_plateau(config.model_copy(update={"method": config.scale_matched.mirrors}))
    return any(_window(part, config).start_step == "plateau" for part in _parts(config))


def is_on(window: Window, step: int, plateau_step: int | None) -> bool:
    """Whether ``step`` lies in the window; both ends included."""
    start = plateau_step if window.start_step == "plateau" else window.start_step
    return start is not None and start <= step <= (window.end_step or step)


def _parts(config: ShapingConfig) -> list[Method]:
    """Return the methods to apply, in order."""
    return [] if config.method == "none" else [METHODS[name] for name in config.method.split("+")]


def _window(method: Method, config: ShapingConfig) -> Window:
    """When a method is on; always without a section."""
    return getattr(config, method.section) if method.section else Window()


def _ppl_factor(batch: TokenBatch, alpha: float, clip: tuple[float, float]) -> Tensor:
    return (1 - alpha * ppl_z(batch.logprobs, batch.response_mask, batch.group_ids)).clamp(*clip)


def _relative_position(batch: TokenBatch) -> Tensor:
    length = batch.response_mask.sum(1, keepdim=True).clamp(min=1)
    return torch.arange(batch.response_mask.shape[1]) / length


def _add_bonus(advantages: Tensor, batch: TokenBatch, bonus: Tensor, cap: float) -> Tensor:
    bonus = torch.minimum(bonus, cap * advantages.abs())
    return torch.where(batch.response_mask, advantages + advantages.sign() * bonus, advantages)


def _by_outcome(advantages: Tensor, batch: TokenBatch, right: float, wrong: float) -> Tensor:
    value = torch.where(batch.is_correct, right, wrong).to(advantages.dtype)
    return value[:, None].expand_as(advantages).clone()
