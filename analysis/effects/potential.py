"""How far tokens could move: what random logit changes of equal size would do to recorded probabilities.

An update that changes the logit of the sampled token, relative to the others, by d moves its probability by
dp = p (1 - p) d to first order. With d ~ N(0, s^2) for every token of a step, the movement of a token is p (1 - p) s
times a standard half-normal variable: a null with no knowledge of what an update learns, and yet with most movement on
the few tokens of uncertain probability.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from entrace.analysis.effects.estimate import NoEffectError

if TYPE_CHECKING:
    import polars as pl

NUM_BINS = 80
# Middle of each bin of p (1 - p), quarter octaves below 1/4.
POTENTIAL = 0.25 * 2.0 ** (-(np.arange(NUM_BINS) + 0.5) / 4)
BINS = [f"bin_{i}" for i in range(NUM_BINS)]
VALUES = ["top_movement", "movement", "still_tokens", "tokens", *BINS]
MEAN_HALF_NORMAL = float(np.sqrt(2 / np.pi))
TOP, STILL = 0.2, 0.01
# Relative resolution of log-probabilities that two passes of the same weights give.
FLOAT32, BFLOAT16 = 1e-5, 2.0**-8
# Movement of log-probabilities below this many resolutions is rounding.
MIN_RESOLUTIONS = 5

ENTROPY_BINS = 10
PARTS = [f"{what}_{part}_{i}" for what in ("tokens", "sum") for part in ("middle", "end") for i in range(ENTROPY_BINS)]


def require_movement(frame: pl.DataFrame) -> None:
    """Raise ``NoEffectError`` where updates moved log-probabilities by no more than rounding does.

    Args:
        frame: Rows of ``movement_sums``.
    """
    import polars as pl

    by_run = frame.group_by("run_id").agg(
        pl.sum("uncertain_shift", "uncertain_tokens", "coarse_tokens", "tokens").cast(float)
    )
    for row in by_run.iter_rows(named=True):
        resolution = BFLOAT16 if row["coarse_tokens"] == row["tokens"] else FLOAT32
        shift = row["uncertain_shift"] / max(row["uncertain_tokens"], 1)
        if shift < MIN_RESOLUTIONS * resolution:
            raise NoEffectError(
                f"updates moved log-probabilities by {shift:.2g} nats on average, no more than rounding does",
                is_recorded=True,
            )


def with_bins(sums: pl.DataFrame, bins: pl.DataFrame) -> pl.DataFrame:
    """Return ``movement_sums`` with one column of tokens per bin of ``movement_potential``."""
    keys = ["run_id", "step", "prompt_id"]
    wide = bins.pivot(on="bin", index=keys, values="tokens").rename(
        lambda name: name if name in keys else f"bin_{name}"
    )
    joined = sums.join(wide, on=keys, how="left")
    import polars as pl

    missing = [pl.lit(0.0).alias(name) for name in BINS if name not in joined.columns]
    return joined.with_columns(*missing).with_columns(pl.col(BINS).cast(float).fill_null(0.0))


def concentration(totals: np.ndarray) -> np.ndarray:
    """Return the share of movement in the fifth of tokens that moves most, minus that under random logit changes."""
    return totals[..., 0] / totals[..., 1] - random_top_share(totals[..., 4:])


def stillness(totals: np.ndarray) -> np.ndarray:
    """Return the share of tokens that hardly move, minus that under random logit changes of equal total movement."""
    return totals[..., 2] / totals[..., 3] - random_still_share(totals[..., 4:], totals[..., 1])


def random_top_share(tokens: np.ndarray, top: float = TOP) -> np.ndarray:
    """Return the share of movement that the tokens that move most carry under random logit changes.

    With t such that the top share of all tokens moves further: sum of E[(w |N| - t)+] + top t, over the sum of w E|N|.

    Args:
        tokens: Number by bin of p (1 - p) = w, ``(..., NUM_BINS)``.
        top: Share of tokens that counts as moving most.
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
        tokens: Number by bin of p (1 - p), ``(..., NUM_BINS)``.
        movement: Sum of |dp|, which random changes have, too, ``(...)``.
    """
    from scipy.special import erf

    scale = movement / ((tokens @ POTENTIAL) * MEAN_HALF_NORMAL)
    return (tokens * erf(STILL / (np.sqrt(2) * POTENTIAL * scale[..., None]))).sum(-1) / tokens.sum(-1)


def spread_parts(frame: pl.DataFrame, column: str) -> pl.DataFrame:
    """Return ``end_by_entropy`` with one row per step and prompt, and the columns ``PARTS``."""
    import polars as pl

    keys = ["run_id", "step", "prompt_id"]
    cells = [
        pl.col(source)
        .filter((pl.col("part") == part) & (pl.col("bin") == i))
        .sum()
        .cast(float)
        .alias(f"{what}_{name}_{i}")
        for what, source in (("tokens", "tokens"), ("sum", column))
        for part, name in enumerate(("middle", "end"))
        for i in range(ENTROPY_BINS)
    ]
    return frame.group_by(keys, maintain_order=True).agg(cells)


def end_over_middle(totals: np.ndarray) -> np.ndarray:
    """Return the log ratio of end to middle, each relative to what tokens of equal entropy have on average.

    Args:
        totals: Columns ``PARTS``, ``(..., 4 * ENTROPY_BINS)``.
    """
    cells = totals.reshape(*totals.shape[:-1], 2, 2, ENTROPY_BINS)
    tokens, sums = cells[..., 0, :, :], cells[..., 1, :, :]
    # Where only one of the parts has tokens, they say nothing about the other.
    is_shared = (tokens > 0).all(-2, keepdims=True)
    tokens, sums = tokens * is_shared, sums * is_shared
    usual = sums.sum(-2, keepdims=True) / np.maximum(tokens.sum(-2, keepdims=True), 1e-300)
    relative = sums.sum(-1) / (tokens * usual).sum(-1)
    return np.log(relative[..., 1] / relative[..., 0])
