"""Entropy against gradient norm, over all tokens in the update (claim S6)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import LogNorm

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Where tokens lie by entropy and by the norm of their gradient at the LM head, both on logarithmic scales, samples "
    "of both signs and all runs together; the outermost cells take in what lies beyond. Correlations of the logarithms "
    "are computed step by step and averaged, each sign by itself. Tokens without entropy or gradient are left out."
)
# Lower edges of the cells, as the query cuts them.
ENTROPY_EDGES = 10 ** (np.arange(41) * 0.125 - 4)
GRAD_NORM_EDGES = 10 ** (np.arange(41) * 0.15 - 4)


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draws the tokens of each cell as colour, for the stage that ``style.late_stage`` picks."""
    shown, stage = style.late_stage(frame)
    # Half a cell further, so that rounding cannot take a token to the cell before.
    counts, _, _ = np.histogram2d(
        shown["entropy_low"] * 10**0.0625,
        shown["grad_norm_low"] * 10**0.075,
        bins=(ENTROPY_EDGES, GRAD_NORM_EDGES),
        weights=shown["num_tokens"],
    )
    mesh = ax.pcolormesh(
        ENTROPY_EDGES,
        GRAD_NORM_EDGES,
        np.where(counts > 0, counts, np.nan).T,
        norm=LogNorm(0.5, max(counts.max(), 10)),
        cmap="Blues",
        rasterized=True,
    )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(*_occupied(counts.sum(1), ENTROPY_EDGES))
    ax.set_ylim(*_occupied(counts.sum(0), GRAD_NORM_EDGES))
    bar = ax.figure.colorbar(mesh, ax=ax, pad=0.02)
    bar.set_label("tokens in the cell", fontsize=8)
    style.label(
        ax,
        "token entropy (nats)",
        "gradient norm at the LM head (nats)",
        f"{stage}; {shown['num_tokens'].sum():,} tokens; correlation of the logs, 95 % interval over steps:\n"
        + "; ".join(describe(shown, sign) for sign in style.SIGN_COLORS),
    )
    return ax


def describe(frame: pl.DataFrame, sign: str) -> str:
    """Correlation of one sign with its interval, in words; runs are averaged as independent ones."""
    runs = frame.filter(sample_sign=sign).unique("run_id").select("correlation", "low").drop_nulls()
    if runs.is_empty():
        return f"{sign} unknown"
    mean, half = runs["correlation"].mean(), np.linalg.norm(runs["correlation"] - runs["low"]) / runs.height
    return f"{sign} {mean:.3f} ± {half:.3f}"


def _occupied(counts: np.ndarray, edges: np.ndarray) -> tuple[float, float]:
    """Limits of the cells that hold anything, with one more on either side."""
    cells = np.flatnonzero(counts)
    return float(edges[max(cells[0] - 1, 0)]), float(edges[min(cells[-1] + 2, len(edges) - 1)])
