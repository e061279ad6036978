"""Compute the movement of probabilities under random logit changes.

The logit changes of all tokens are of equal size.

An update that changes the logit of the sampled token, relative to the others, by d moves its probability by
dp = p (1 - p) d to first order. With d ~ N(0, s^2) for every token of a step, the movement of a token is p (1 - p) s
times a standard half-normal variable. This null contains nothing that an update learns, and still concentrates movement
on the few tokens of uncertain probability.
"""

from __future__ import annotations

import numpy as np

NUM_BINS = 80
# Center of each bin of p (1 - p): quarter octaves below 1/4.
POTENTIAL = 0.25 * 2.0 ** (-(np.arange(NUM_BINS) + 0.5) / 4)
MEAN_HALF_NORMAL = float(np.sqrt(2 / np.pi))
TOP, STILL = 0.2, 0.01


def random_top_share(tokens: np.ndarray, top: float = TOP) -> np.ndarray:
    """Return the share of movement in the top tokens, under random logit changes.

    Let w = p (1 - p), and t the movement that the share ``top`` of all tokens exceeds. The result is the sum over
    tokens of E[(w |N| - t)+] + top t, divided by the sum of w E|N|.

    Args:
        tokens: Number of tokens by bin of w, ``(..., NUM_BINS)``.
        top: Share of tokens that move most.
    """
    from scipy.special import ndtr

    number = tokens.sum(-1, keepdims=True)
    low, high = np.full(number.shape, 1e-12), np.ones(number.shape)
    middle = high
    for _ in range(50):
        middle = np.sqrt(low * high)
        beyond = (tokens * 2 * ndtr(-middle / POTENTIAL)).sum(-1, keepdims=True)
        is_low = beyond > top * number
        low, high = np.where(is_low, middle, low), np.where(is_low, high, middle)
    z = middle / POTENTIAL
    density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    over = 2 * (POTENTIAL * density - middle * ndtr(-z))
    carried = (tokens * over).sum(-1) + top * (middle * number)[..., 0]
    return carried / ((tokens @ POTENTIAL) * MEAN_HALF_NORMAL)


def random_still_share(tokens: np.ndarray, movement: np.ndarray) -> np.ndarray:
    """Return the share of tokens that random logit changes move by .01 at most.

    Args:
        tokens: Number of tokens by bin of p (1 - p), ``(..., NUM_BINS)``.
        movement: Sum of |dp|, equal for the random changes, ``(...)``.
    """
    from scipy.special import erf

    scale = movement / ((tokens @ POTENTIAL) * MEAN_HALF_NORMAL)
    return (tokens * erf(STILL / (np.sqrt(2) * POTENTIAL * scale[..., None]))).sum(-1) / tokens.sum(-1)
