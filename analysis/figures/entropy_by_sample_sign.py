"""Entropy of right and wrong samples over training (claim S2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from entrace.analysis.figures import style
from entrace.analysis.statistics.stages import decompose_fall

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Mean token entropy of responses with a positive advantage (better than their group) and with a negative one. "
    "The text splits the fall between the first steps and the end of the rising stage exactly: how much happened "
    "within each kind, and how much because wrong responses became fewer. Shares of the fall follow base accuracy, "
    "so the verdict compares the relative fall of either kind, at equal weight of every group."
)


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draws one line a sign, with its interval, and writes the decomposition of the fall beside them."""
    for i, (_, run, line) in enumerate(style.by_run(frame)):
        for sign, color in style.SIGN_COLORS.items():
            part = run.filter(sample_sign=sign)
            name = f"{sign} samples" if i == 0 else None
            style.band(ax, part, "step", "entropy", color=color, linestyle=line, label=name)
    style.mark_boundary(ax, frame)
    style.label(
        ax,
        style.STEP,
        "mean token entropy (nats)",
        f"{style.span(frame['num_prompts'])} prompts a step and sign; band: 95 % interval over prompts",
    )
    style.start_at_zero(ax)
    style.legend(
        ax, loc="upper right", bbox_to_anchor=(1, 0.97), ncols=2, title=describe_fall(frame), title_fontsize=7.5
    )
    return ax


def describe_fall(frame: pl.DataFrame) -> str:
    """The fall of entropy in the rising stage, split by sign, in words; runs are averaged."""
    lines = []
    for _, run, _ in style.by_run(frame):
        tokens, sums = np.zeros((2, 2)), np.zeros((2, 2))
        for row in run.drop_nulls("window").iter_rows(named=True):
            cell = int(row["window"] == "end"), int(row["sample_sign"] == "positive")
            tokens[cell] += row["num_tokens"]
            sums[cell] += row["num_tokens"] * row["entropy"]
        if (tokens.sum(-1) == 0).any():
            continue
        within, between = decompose_fall(tokens, sums)
        lines.append([*within, between.sum()])
    if not lines:
        return ""
    negative, positive, shares = np.mean(lines, axis=0).round(2) + 0.0
    return (
        f"fall in the rising stage {negative + positive + shares:.2f} nats:\n"
        f"within negative {negative:.2f}, positive {positive:.2f}, shares {shares:.2f}"
    )
