"""Advantage shaping: one small function a method, (B, T) -> (B, T), and the table that names them.

Deviation from the study's released code: there the low-PPL factor is computed and never applied; here it is applied,
as the paper's equation says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.advantage import ppl_z
from trainer.config import PositionConfig, PplConfig, ShapingConfig, Window


def ppl_shaping(
    advantages: Tensor,
    logprobs: Tensor,
    response_mask: Tensor,
    group_ids: Tensor,
    alpha: float = 0.01,
    clip: tuple[float, float] = (0.8, 1.2),
) -> Tensor:
    """A'_it = A_it clamp(1 - alpha z_i, *clip): low-perplexity responses count more (arXiv 2508.02260).

    Args:
        advantages: (B, T).
        logprobs: (B, T), nats, of the distribution sampled from.
        response_mask: (B, T) bool.
        group_ids: (B,), the prompt of each response.
        alpha: Strength; a negative value emphasises high perplexity.
        clip: Bounds of the factor.

    Returns:
        (B, T). An empty response keeps its advantages.
    """
    factor = (1 - alpha * ppl_z(logprobs, response_mask, group_ids)).clamp(*clip)
    return advantages * factor[:, None]


def position_shaping(
    advantages: Tensor,
    response_mask: Tensor,
    gamma: float = 0.1,
    slope: float = 15.0,
    cap: float = 0.5,
    reverse: bool = False,
) -> Tensor:
    """A'_it = A_it + sign(A_it) min(gamma sigmoid(slope (r_t - 0.5)), cap |A_it|): late tokens count more.

    r_t = (t - 1) / |o_i| with t from 1 (arXiv 2508.02260).

    Args:
        advantages: (B, T).
        response_mask: (B, T) bool, True at the first |o_i| places of each row.
        gamma: Largest bonus, in units of the advantage.
        slope: Steepness in relative position.
        cap: Largest bonus as a share of |A_it|.
        reverse: Put 1 - r_t for r_t: the control that emphasises early tokens.

    Returns:
        (B, T); places outside the mask keep their value.
    """
    length = response_mask.sum(1, keepdim=True).clamp(min=1)
    relative = torch.arange(response_mask.shape[1]) / length
    if reverse:
        relative = 1 - relative
    bonus = torch.minimum(gamma * torch.sigmoid(slope * (relative - 0.5)), cap * advantages.abs())
    return torch.where(response_mask, advantages + advantages.sign() * bonus, advantages)


@dataclass(frozen=True)
class ShapingBatch:
    """What a method may look at: ``logprobs`` and ``response_mask`` (B, T), ``group_ids`` (B,)."""

    logprobs: Tensor
    response_mask: Tensor
    group_ids: Tensor


def _ppl(advantages: Tensor, batch: ShapingBatch, config: PplConfig, sign: int = 1) -> Tensor:
    return ppl_shaping(
        advantages, batch.logprobs, batch.response_mask, batch.group_ids, sign * config.alpha, config.clip
    )


def _position(advantages: Tensor, batch: ShapingBatch, config: PositionConfig, reverse: bool = False) -> Tensor:
    return position_shaping(advantages, batch.response_mask, config.gamma, config.slope, config.cap, reverse)


@dataclass(frozen=True)
class Method:
    """A named method: which config section holds its window and parameters, and how to apply it."""

    window: Callable[[ShapingConfig], Window]
    apply: Callable[[Tensor, ShapingBatch, ShapingConfig], Tensor]


METHODS: dict[str, Method] = {
    "ppl": Method(lambda c: c.ppl, lambda a, b, c: _ppl(a, b, c.ppl)),
    "ppl_high": Method(lambda c: c.ppl, lambda a, b, c: _ppl(a, b, c.ppl, sign=-1)),
    "position": Method(lambda c: c.position, lambda a, b, c: _position(a, b, c.position)),
    "position_reversed": Method(lambda c: c.position, lambda a, b, c: _position(a, b, c.position, reverse=True)),
}


def shape(
    advantages: Tensor, batch: ShapingBatch, config: ShapingConfig, step: int, plateau_step: int | None
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
    parts = [] if config.method == "none" else [METHODS[name] for name in config.method.split("+")]
    active = [part for part in parts if is_on(part.window(config), step, plateau_step)]
    for part in active:
        advantages = part.apply(advantages, batch, config)
    return advantages, bool(active)


def is_on(window: Window, step: int, plateau_step: int | None) -> bool:
    """Whether ``step`` lies in the window; both ends included."""
    start = plateau_step if window.start_step == "plateau" else window.start_step
    return start is not None and start <= step <= (window.end_step or step)
