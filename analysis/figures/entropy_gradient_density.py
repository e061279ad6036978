"""Draw the joint distribution of entropy and gradient norm (claim S6).

All tokens in the update count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import LogNorm

from entrace.analysis.figures import marks, style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Number of tokens by entropy and by the norm of their gradient at the LM head, all scales logarithmic, both sample "
    "signs and all runs together; the outermost cells include everything beyond. Correlations of the logarithms are "
    "computed per step and sign and then averaged. Tokens without entropy or gradient are left out."
)
# Cell edges of the query, log10.
ENTROPY_EDGES = np.arange(41) * 0.125 - 4
GRAD_NORM_EDGES = np.arange(41) * 0.15 - 4


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draw the number of tokens per cell as color, in the late stage."""
    import seaborn as sns

    shown, stage = style.late_stage(frame)
    # The middle of a cell, so that rounding cannot move a token to the cell before.
    x = np.log10(shown["entropy_low"].to_numpy()) + 0.0625
    y = np.log10(shown["grad_norm_low"].to_numpy()) + 0.075
    weights = shown["num_tokens"].to_numpy()
    sns.histplot(
        x=10**x,
        y=10**y,
        weights=weights,
        bins=(ENTROPY_EDGES, GRAD_NORM_EDGES),  # pyright: ignore[reportArgumentType]
        log_scale=True,
        thresh=0,
        vmin=None,
        vmax=None,
        norm=LogNorm(0.5, max(_largest_cell(x, y, weights), 10)),
        cmap="Blues",
        rasterized=True,
        ax=ax,
    )
    marks.remember(ax, shown, "entropy_low", "grad_norm_low", at_x=10**x, at_y=10**y)
    ax.set_xlim(*_occupied(x, ENTROPY_EDGES))
    ax.set_ylim(*_occupied(y, GRAD_NORM_EDGES))
    bar = ax.figure.colorbar(ax.collections[0], ax=ax, pad=0.02)
    bar.set_label("tokens per cell", fontsize=8)
    style.label(
        ax,
        "token entropy (nats)",
        "gradient norm at the LM head (nats)",
        f"{stage}; {shown['num_tokens'].sum():,} tokens; correlation of the logs, 95% interval over steps:\n"
        + "; ".join(describe(shown, sign) for sign in style.SIGN_COLORS),
    )
    return ax


def describe(frame: pl.DataFrame, sign: str) -> str:
    """Return the correlation of one sign with its interval, in words.

    Runs are averaged as independent.
    """
    runs = frame.filter(sample_sign=sign).unique("run_id").select("correlation", "low").drop_nulls()
    if runs.is_empty():
        return f"{sign} unknown"
    mean, half = runs["correlation"].mean(), np.linalg.norm(runs["correlation"] - runs["low"]) / runs.height
    return f"{sign} {mean:.3f} ± {half:.3f}"


def _largest_cell(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    counts, _, _ = np.histogram2d(x, y, bins=(ENTROPY_EDGES, GRAD_NORM_EDGES), weights=weights)
    return float(counts.max())


def _occupied(middles: np.ndarray, edges: np.ndarray) -> tuple[float, float]:
    """Return the limits of the cells with tokens, and one more cell on either side."""
    cells = np.digitize(middles, edges) - 1
    return float(10 ** edges[max(cells.min() - 1, 0)]), float(10 ** edges[min(cells.max() + 2, len(edges) - 1)])
