"""What the tokens are for, over training (claim S3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Share of each token category among all sampled tokens. The claim expects reasoning (formal, logical, "
    "metacognitive) to gain in the rising stage and what is not needed for the task to lose. Categories follow from a "
    "list of words, so that a word counts the same wherever it stands."
)


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draw one line for each category that occurs at all, with its interval."""
    seen = set(frame.filter(frame["share"] > 0)["category"])
    for i, (_, run, line) in enumerate(style.by_run(frame)):
        for category, color in style.CATEGORY_COLORS.items():
            if category not in seen:
                continue
            name = category.replace("_", " ") if i == 0 else None
            style.band(ax, run.filter(category=category), "step", "share", color=color, linestyle=line, label=name)
    style.mark_boundary(ax, frame)
    style.label(
        ax,
        style.STEP,
        "share of tokens",
        f"{frame['num_tokens'].sum():,} tokens, {style.span(frame['num_prompts'])} prompts a step; "
        "band: 95 % interval over prompts",
    )
    style.start_at_zero(ax)
    style.legend(ax, loc="upper center", bbox_to_anchor=(0.5, 0.97), ncols=3, columnspacing=1.2)
    return ax
