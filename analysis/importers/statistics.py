"""Compute group-relative advantages and standardized perplexities of imported responses, in float64."""

from __future__ import annotations

import numpy as np

EPS = 1e-6


def group_relative_advantage(rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return A_i = (r_i - mean(r)) / (std(r) + eps) within groups (GRPO, arXiv 2402.03300).

    Args:
        rewards: Rewards, ``(B,)``; NaN if unknown.
        groups: Group of each response, ``(B,)``, integers from 0.

    Returns:
        Advantages, ``(B,)``; NaN where the reward is unknown, exactly 0 in groups of equal rewards and of one response.
    """
    found = np.full(len(rewards), np.nan)
    for group in range(int(groups.max()) + 1):
        members = np.flatnonzero((groups == group) & ~np.isnan(rewards))
        if not len(members):
            continue
        # Differences between equal rewards are exactly 0, differences from their mean are not.
        above = rewards[members] - rewards[members].min()
        centered = above - above.mean()
        if len(members) == 1 or not above.any():
            found[members] = 0.0
            continue
        found[members] = centered / (np.sqrt((centered**2).sum() / (len(members) - 1)) + EPS)
    return found


def ppl_z(surprisal: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Standardize the log perplexity of responses within groups, with moments of those inside 1.5 IQR.

    Args:
        surprisal: Mean of -logprob of each response, ``(B,)``; NaN if unknown.
        groups: Group of each response, ``(B,)``, integers from 0.

    Returns:
        z, ``(B,)``; NaN where the perplexity of any response of the group is unknown.
    """
    found = np.full(len(surprisal), np.nan)
    for group in range(int(groups.max()) + 1):
        members = np.flatnonzero(groups == group)
        values = surprisal[members]
        if np.isnan(values).any():
            continue
        q1, q3 = np.quantile(values, [0.25, 0.75])
        reach = 1.5 * (q3 - q1)
        inside = values[(values >= q1 - reach) & (values <= q3 + reach)]
        spread = inside.std()
        found[members] = (values - inside.mean()) / (spread if spread >= EPS else 1.0)
    return found


def place_in_group(groups: np.ndarray) -> np.ndarray:
    """Return the index of each response within its group, from 0, ``(B,)``."""
    places = np.zeros(len(groups), dtype=np.int64)
    for group in range(int(groups.max()) + 1):
        members = np.flatnonzero(groups == group)
        places[members] = np.arange(len(members))
    return places


def mean_of(values: np.ndarray, rows: np.ndarray, size: int) -> np.ndarray:
    """Return the mean of values by row, ``(size,)``; NaN for rows without values and for rows with a NaN."""
    sums = np.bincount(rows, weights=values, minlength=size)
    counts = np.bincount(rows, minlength=size)
    return np.divide(sums, counts, out=np.full(size, np.nan), where=counts > 0)
