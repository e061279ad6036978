"""Group-relative advantages and the perplexity of responses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

EPS = 1e-6


def group_relative_advantage(
    rewards: Tensor, group_ids: Tensor, normalize_std: bool = True, is_counted: Tensor | None = None
) -> Tensor:
    """Return the group-relative advantage of each response (GRPO, arXiv 2402.03300).

    A_i = (r_i - mean(r)) / (std(r) + eps), with mean and standard deviation over the group of one prompt.

    Args:
        rewards: One per response, (B,).
        group_ids: Group of each response, (B,), integers from 0.
        normalize_std: Divide by the group's standard deviation (with Bessel's correction); Dr.GRPO does not.
        is_counted: Responses that have a reward, (B,) bool (default: all).

    Returns:
        Advantages, (B,). Exactly 0 where all rewards of a group are equal, whatever their value, in groups of one
        response, and for responses that do not count.
    """
    is_counted = torch.ones_like(rewards, dtype=torch.bool) if is_counted is None else is_counted
    counted = is_counted.to(rewards.dtype)
    count = _group_sum(counted, group_ids).clamp(min=1)
    # Differences between equal rewards are exactly 0, differences from their mean are not: (8 x 0.7) / 8 != 0.7.
    lowest = torch.full_like(count, torch.inf).scatter_reduce(0, group_ids[is_counted], rewards[is_counted], "amin")
    above = torch.where(is_counted, rewards - lowest[group_ids], 0)
    centered = (above - (_group_sum(above, group_ids) / count)[group_ids]) * counted
    if not normalize_std:
        return centered
    variance = _group_sum(centered.square(), group_ids) / (count - 1).clamp(min=1)
    return centered / (variance.sqrt() + EPS)[group_ids]


def mixed_groups(values: Tensor, group_ids: Tensor, is_counted: Tensor) -> Tensor:
    """Return the groups that dynamic sampling keeps, (num_groups,) bool.

    A group is kept if its counted values differ.

    Args:
        values: Correctness (0 or 1) or reward of each response, (B,).
        group_ids: Group of each response, (B,), integers from 0.
        is_counted: Responses that have a value, (B,) bool.
    """
    ids, values = group_ids[is_counted], values[is_counted].to(torch.get_default_dtype())
    low = torch.full((int(group_ids.max()) + 1,), torch.inf).scatter_reduce(0, ids, values, "amin")
    high = torch.full_like(low, -torch.inf).scatter_reduce(0, ids, values, "amax")
    return high > low


def overlong_penalty(lengths: Tensor, max_tokens: int, buffer_tokens: int, factor: float) -> Tensor:
    """Return the soft overlong penalty (DAPO, arXiv 2503.14476, eq. 13).

    The penalty acts on the last ``buffer_tokens`` before the length limit: 0 up to max - buffer, then falling linearly
    to ``-factor`` at max. Lengths are (B,) in tokens; the result is (B,) float32, on the scale of rewards.
    """
    if buffer_tokens == 0:
        return torch.zeros(len(lengths))
    excess = (lengths.float() - (max_tokens - buffer_tokens)).clamp(min=0)
    return -factor * excess / buffer_tokens


def mean_surprisal(logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """Return the mean surprisal of each response, (B,), nats; NaN if it is empty.

    Surprisal is -logprob, averaged over response tokens; both arguments are (B, T).
    """
    mask = response_mask.to(logprobs.dtype)
    return -(logprobs * mask).sum(1) / mask.sum(1)


def ppl_z(logprobs: Tensor, response_mask: Tensor, group_ids: Tensor) -> Tensor:
    """Standardize the log perplexity of responses within their groups.

    z_i = (ln PPL_i - m) / s with ln PPL = mean surprisal; m and the population standard deviation s are taken over
    the group's responses inside [Q1 - 1.5 IQR, Q3 + 1.5 IQR]; s below 1e-6 counts as 1. This follows the released code
    of arXiv 2508.02260.

    Args:
        logprobs: (B, T), nats.
        response_mask: (B, T) bool, True at generated tokens.
        group_ids: (B,).

    Returns:
        z, (B,); an empty response is excluded from the moments and gets 0.
    """
    log_ppl = mean_surprisal(logprobs, response_mask)
    place = place_in_group(group_ids)
    table = torch.full((int(group_ids.max()) + 1, int(place.max()) + 1), torch.nan, dtype=log_ppl.dtype)
    table[group_ids, place] = log_ppl
    q1, q3 = torch.nanquantile(table, torch.tensor([0.25, 0.75], dtype=table.dtype), dim=1, keepdim=True)
    reach = 1.5 * (q3 - q1)
    inside = (table >= q1 - reach) & (table <= q3 + reach)
    count = inside.sum(1, keepdim=True)
    mean = torch.where(inside, table, 0).sum(1, keepdim=True) / count
    std = (torch.where(inside, table - mean, 0).square().sum(1, keepdim=True) / count).sqrt()
    z = (table - mean) / torch.where(std >= 1e-6, std, 1.0)
    return z[group_ids, place].nan_to_num(0.0)


def place_in_group(group_ids: Tensor) -> Tensor:
    """Return the index of each element within its group, from 0, (B,)."""
    counts = torch.bincount(group_ids)
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    place = torch.empty_like(group_ids)
    place[group_ids.argsort(stable=True)] = torch.arange(len(group_ids)) - first
    return place


def _group_sum(values: Tensor, group_ids: Tensor) -> Tensor:
    return torch.zeros(int(group_ids.max()) + 1, dtype=values.dtype).index_add(0, group_ids, values)
