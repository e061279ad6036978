"""Draw the share of each token category over training (claim S3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Share of each token category among all sampled tokens. The claim expects reasoning tokens (formal, logical, "
    "metacognitive) to gain in the rising stage and tokens that the task does not need to lose. Categories come from a "
    "word list, so a word has the same category wherever it occurs."
)


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draw one line with its interval for each category that occurs."""
    seen = set(frame.filter(frame["share"] > 0)["category"])
    for category, color in style.CATEGORY_COLORS.items():
        if category in seen:
            part = frame.filter(category=category)
            style.curve(ax, part, "step", "share", color=color, label=category.replace("_", " "))
    style.mark_boundary(ax, frame)
    style.label(
        ax,
        style.STEP,
        "share of tokens",
        f"{frame['num_tokens'].sum():,} tokens, {style.span(frame['num_prompts'], 'prompt')} per step; "
        "band: 95% interval over prompts" + style.runs_note(frame),
    )
    style.start_at_zero(ax)
    style.legend(ax, ncols=3)
    return ax
