"""Draw the entropy of positive and negative samples over training (claim S2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from entrace.analysis.figures import style
from entrace.analysis.statistics.stages import decompose_fall

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Mean token entropy of responses with a positive advantage (better than their group) and with a negative one. The "
    "text splits the fall between the first steps and the end of the rising stage into three exact parts: the fall "
    "within negative responses, within positive responses, and the change of their shares. The parts depend on base "
    "accuracy, so the verdict compares the relative fall of either sign at equal weight of every group."
)


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draw one line per sign with its interval, and describe the fall below.

    The description decomposes the fall; see ``describe_fall``.
    """
    for sign, color in style.SIGN_COLORS.items():
        part = frame.filter(sample_sign=sign)
        if not part.is_empty():
            style.curve(ax, part, "step", "entropy", color=color, label=f"{sign} samples")
    style.mark_boundary(ax, frame)
    style.label(
        ax,
        style.STEP,
        "mean token entropy (nats)",
        f"{style.span(frame['num_prompts'], 'prompt')} per step and sign; band: 95% interval over prompts"
        + style.runs_note(frame),
    )
    style.start_at_zero(ax)
    style.legend(ax, ncols=2, title=describe_fall(frame), title_fontsize=7.5)
    return ax


def describe_fall(frame: pl.DataFrame) -> str:
    """Describe the fall of entropy in the rising stage, split by sign.

    Runs are averaged. The text is empty if no run has tokens at both ends of the stage.
    """
    lines = []
    for _, run in style.by_run(frame):
        tokens, sums = np.zeros((2, 2)), np.zeros((2, 2))
        for row in run.drop_nulls("phase").iter_rows(named=True):
            cell = int(row["phase"] == "end"), int(row["sample_sign"] == "positive")
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
