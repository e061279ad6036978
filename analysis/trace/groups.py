"""Compute advantages and standardized perplexity of responses in their groups.

The trainer computes equal values with torch; see ``entrace.trainer.algorithm.advantages``.
"""

from __future__ import annotations

import numpy as np

EPS = 1e-6
# exp of more overflows float32.
LARGEST_SURPRISAL = 88.0


def group_relative_advantage(rewards: np.ndarray, group_ids: np.ndarray) -> np.ndarray:
    """Return the advantage of each response within the group of its prompt.

    A_i = (r_i - mean(r)) / (std(r) + eps) (GRPO, arXiv 2402.03300).

    Args:
        rewards: One per response, (B,) float64; NaN where there is no verdict.
        group_ids: Group of each response, (B,), integers from 0.

    Returns:
        Advantages, (B,); the standard deviation has Bessel's correction. Exactly 0 where all rewards of a group are
        equal, in groups of one response, and for responses without a reward.
    """
    counted = ~np.isnan(rewards)
    values = np.where(counted, rewards, 0.0)
    count = np.maximum(np.bincount(group_ids, counted), 1)
    # Differences between equal rewards are exactly 0, differences from their mean are not: (8 x 0.7) / 8 != 0.7.
    lowest = np.full(len(count), np.inf)
    np.minimum.at(lowest, group_ids[counted], values[counted])
    above = np.where(counted, values - np.where(np.isinf(lowest), 0.0, lowest)[group_ids], 0.0)
    centered = (above - (np.bincount(group_ids, above) / count)[group_ids]) * counted
    variance = np.bincount(group_ids, centered**2) / np.maximum(count - 1, 1)
    return centered / (np.sqrt(variance) + EPS)[group_ids]


def perplexity(surprisal: np.ndarray) -> np.ndarray:
    """Return the perplexity of responses, exp of their mean surprisal, (B,).

    NaN where the surprisal is unknown or the result overflows float32.
    """
    return np.exp(np.where(surprisal > LARGEST_SURPRISAL, np.nan, surprisal))


def ppl_z(log_ppl: np.ndarray, group_ids: np.ndarray) -> np.ndarray:
    """Standardize the log perplexity of responses within their groups.

    z_i = (ln PPL_i - m) / s, as in the released code of arXiv 2508.02260. The mean m and the population standard
    deviation s are taken over the group's responses inside [Q1 - 1.5 IQR, Q3 + 1.5 IQR]; s below 1e-6 counts as 1.

    Args:
        log_ppl: Mean surprisal of each response, nats, (B,); NaN where unknown.
        group_ids: Group of each response, (B,), integers from 0.

    Returns:
        z, (B,); a response without perplexity is excluded from the moments and gets 0.
    """
    z = np.zeros(len(log_ppl))
    for rows in rows_by_group(group_ids):
        known = rows[~np.isnan(log_ppl[rows])]
        if not len(known):
            continue
        values = log_ppl[known]
        q1, q3 = np.quantile(values, [0.25, 0.75])
        reach = 1.5 * (q3 - q1)
        inside = values[(values >= q1 - reach) & (values <= q3 + reach)]
        std = inside.std()
        z[known] = (values - inside.mean()) / (std if std >= 1e-6 else 1.0)
    return z


def rows_by_group(group_ids: np.ndarray) -> list[np.ndarray]:
    """Return the rows of each group, (B,) -> one array per group.

    Groups and rows are in ascending order.
    """
    order = np.argsort(group_ids, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(group_ids[order])) + 1) if len(order) else []


def place_in_group(group_ids: np.ndarray) -> np.ndarray:
    """Return the index of each element within its group, from 0, (B,)."""
    counts = np.bincount(group_ids)
    place = np.empty(len(group_ids), np.int64)
    place[np.argsort(group_ids, kind="stable")] = np.arange(len(place)) - np.repeat(np.cumsum(counts) - counts, counts)
    return place


def mean_of(values: np.ndarray, rows: np.ndarray, size: int) -> np.ndarray:
    """Return the mean of the values of each row, (size,).

    NaN for a row without values, and for a row with a NaN.
    """
    sums, counts = np.bincount(rows, values, size), np.bincount(rows, minlength=size)
    return np.divide(sums, counts, out=np.full(size, np.nan), where=counts > 0)


def shared_by(values: np.ndarray, rows: np.ndarray, size: int) -> np.ndarray:
    """Return the value that all entries of each row share, (size,).

    NaN for a row without values, with unequal values, or with a NaN.
    """
    low, high = np.full(size, np.inf), np.full(size, -np.inf)
    # A NaN among the values of a row makes both bounds NaN, which are unequal.
    with np.errstate(invalid="ignore"):
        np.minimum.at(low, rows, values)
        np.maximum.at(high, rows, values)
    return np.where(low == high, low, np.nan)
