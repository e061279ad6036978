"""Seed random numbers by purpose and step, independently of all earlier draws.

Resumed runs therefore equal uninterrupted ones, and the arms of an ablation share their random numbers.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """Purposes of random numbers."""

    ROLLOUT = 1
    EVAL = 2
    MINI_BATCH = 3
    TOKEN_CHOICE = 4
    ALTERNATIVE = 5
    CONTINUATION = 6
    SHAPING = 7
    LOSS = 8
    SPLIT = 9
    EPOCH = 10
    MIXTURE = 11
    CAPTURE = 12


def generator(seed: int, stream: Stream, *indices: int) -> np.random.Generator:
    """Return the generator of one purpose at one place, such as (step, refill)."""
    return np.random.default_rng([seed, stream, *indices])
