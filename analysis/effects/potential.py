"""Compute token movement relative to the potential to move (S5, S6, T3).

Movement is that of token probabilities. The potential is the movement under random logit changes of equal size; see
``statistics.random_movement``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from entrace.analysis.effects.estimate import NoEffectError
from entrace.analysis.statistics.random_movement import NUM_BINS, random_still_share, random_top_share

if TYPE_CHECKING:
    import polars as pl

BINS = [f"bin_{i}" for i in range(NUM_BINS)]
VALUES = ["top_movement", "movement", "still_tokens", "tokens", *BINS]
# Relative difference of log-probabilities between two passes with equal weights.
FLOAT32, BFLOAT16 = 1e-5, 2.0**-8
# Movement of log-probabilities below this multiple of the resolution is rounding.
MIN_RESOLUTIONS = 5

ENTROPY_BINS = 10
PARTS = [
    f"{quantity}_{part}_{i}"
    for quantity in ("tokens", "sum")
    for part in ("middle", "end")
    for i in range(ENTROPY_BINS)
]


def require_movement(frame: pl.DataFrame) -> None:
    """Require that updates moved log-probabilities by more than rounding.

    Args:
        frame: Rows of ``movement_sums``.

    Raises:
        NoEffectError: the updates of a run moved them by no more than rounding.
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
                f"updates moved log-probabilities by {shift:.2g} nats on average, no more than rounding",
                is_recorded=True,
            )


def with_bins(sums: pl.DataFrame, bins: pl.DataFrame) -> pl.DataFrame:
    """Return ``movement_sums`` with one column per bin of ``movement_potential``.

    Each column holds the number of tokens in the bin.
    """
    keys = ["run_id", "step", "prompt_id"]
    wide = bins.pivot(on="bin", index=keys, values="tokens").rename(
        lambda name: name if name in keys else f"bin_{name}"
    )
    joined = sums.join(wide, on=keys, how="left")
    import polars as pl

    missing = [pl.lit(0.0).alias(name) for name in BINS if name not in joined.columns]
    return joined.with_columns(*missing).with_columns(pl.col(BINS).cast(float).fill_null(0.0))


def concentration(totals: np.ndarray) -> np.ndarray:
    """Return the share of movement in the top fifth of tokens, minus the null.

    The null is the share under random logit changes.
    """
    return totals[..., 0] / totals[..., 1] - random_top_share(totals[..., 4:])


def stillness(totals: np.ndarray) -> np.ndarray:
    """Return the share of nearly still tokens, minus the null.

    The null is the share under random logit changes of equal total movement.
    """
    return totals[..., 2] / totals[..., 3] - random_still_share(totals[..., 4:], totals[..., 1])


def spread_parts(frame: pl.DataFrame, column: str) -> pl.DataFrame:
    """Pivot ``end_by_entropy`` to the columns ``PARTS``.

    The result has one row per step and prompt.
    """
    import polars as pl

    keys = ["run_id", "step", "prompt_id"]
    cells = [
        pl.col(source)
        .filter((pl.col("part") == part) & (pl.col("bin") == i))
        .sum()
        .cast(float)
        .alias(f"{quantity}_{name}_{i}")
        for quantity, source in (("tokens", "tokens"), ("sum", column))
        for part, name in enumerate(("middle", "end"))
        for i in range(ENTROPY_BINS)
    ]
    return frame.group_by(keys, maintain_order=True).agg(cells)


def end_over_middle(totals: np.ndarray) -> np.ndarray:
    """Return the log ratio of end to middle at equal entropy.

    End and middle are each relative to the average of tokens of equal entropy.

    Args:
        totals: Columns ``PARTS``, ``(..., 4 * ENTROPY_BINS)``.
    """
    cells = totals.reshape(*totals.shape[:-1], 2, 2, ENTROPY_BINS)
    tokens, sums = cells[..., 0, :, :], cells[..., 1, :, :]
    # Entropy bins with tokens in only one of the parts allow no comparison.
    is_shared = (tokens > 0).all(-2, keepdims=True)
    tokens, sums = tokens * is_shared, sums * is_shared
    usual = sums.sum(-2, keepdims=True) / np.maximum(tokens.sum(-2, keepdims=True), 1e-300)
    relative = sums.sum(-1) / (tokens * usual).sum(-1)
    return np.log(relative[..., 1] / relative[..., 0])
