"""Draw the distribution of probability changes by an update (claim S5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from entrace.analysis.figures import marks, style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Change of the probability of each sampled token by one update, |Δp|, on a logarithmic scale; each bin is 0.25 "
    "powers of ten wide, and the first bin holds everything below 1e-6. Most mass lies far to the left under any "
    "update, because most probabilities are near 1; the verdict compares the share below .01 with random logit changes "
    "of equal size. Bins that are empty in a run have no band."
)
SMALLEST = 1e-6
LEFT = SMALLEST / 10**0.25


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draw one stepped line with its band per sample sign, in the late stage."""
    import polars as pl

    shown, stage = style.late_stage(frame)
    ends = [pl.when(pl.col("share") > 0).then(pl.col(end)).alias(end) for end in ("low", "high")]
    for sign, color in style.SIGN_COLORS.items():
        part = shown.filter(sample_sign=sign)
        if part.is_empty():
            continue
        pooled = style.pool(part.with_columns(ends), ["bin_high"], "share")
        edges = [LEFT, *pooled["bin_high"]]
        name = f"{sign} ({part['num_tokens'].sum():,} tokens)"
        ax.stairs(pooled["share"], edges, color=color, linewidth=1.5, label=name, baseline=None)
        middles = np.sqrt(np.array(edges[1:]) * edges[:-1])
        marks.remember(ax, pooled.with_columns(sample_sign=pl.lit(sign)), "bin_high", "share", at_x=middles)
        low, high = (pooled[end].cast(float).fill_null(float("nan")).to_numpy() for end in ("low", "high"))
        for i in np.flatnonzero(np.isfinite(low)):
            ax.fill_between(edges[i : i + 2], low[i], high[i], color=color, alpha=style.BAND, linewidth=0)
    ax.set_xscale("log")
    powers = range(-5, 1)
    labels = ["≤$10^{-6}$", *(f"$10^{{{power}}}$" for power in powers)]
    ax.set_xticks([(LEFT * SMALLEST) ** 0.5, *(10.0**power for power in powers)], labels, minor=False)
    ax.minorticks_off()
    ax.set_xlim(LEFT, 1)
    ax.set_ylim(bottom=0)
    style.label(
        ax,
        "probability change by the update, |Δp|",
        "share of tokens",
        f"{stage}; {style.span(shown['num_prompts'], 'prompt')} per run; band: 95% interval over steps and prompts"
        + style.runs_note(shown, None),
    )
    style.legend(ax, ncols=2)
    return ax
