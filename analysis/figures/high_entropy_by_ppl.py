"""Draw functions of high-entropy tokens at low and high perplexity (claim I1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "The responses to one prompt are cut into thirds by perplexity at equal length. A dot is the share of a category "
    "among the 20% of tokens with the highest entropy; the five categories of a third add up to 1. 'All reasoning' is "
    "the sum of formal, logical, and metacognitive: the claim expects it to be highest in the lowest third. The "
    "verdict compares tokens at equal position."
)
CATEGORIES = {
    "reasoning": "all\nreasoning",
    "formal_reasoning": "formal",
    "logical_structuring": "logical",
    "metacognitive": "meta-\ncognitive",
    "semantic_support": "semantic",
    "special": "special",
}
# Name, color, marker, and horizontal offset of each third.
TERCILES = {
    1: ("lowest", style.BLUE, "o", -0.22),
    2: ("middle", style.GREY, "s", 0),
    3: ("highest", style.ORANGE, "^", 0.22),
}


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draw a dot with its interval per category and tercile, in the late stage."""
    shown, stage = style.late_stage(frame)
    placed = shown.with_columns(place=shown["category"].replace_strict(list(CATEGORIES), range(len(CATEGORIES))))
    for tercile, (name, color, marker, shift) in TERCILES.items():
        part = placed.filter(ppl_tercile=tercile)
        look = {"color": color, "marker": marker, "linestyle": "none", "label": name}
        if not part.is_empty():
            style.points(ax, part, "place", "share", shift=shift, **look)
    ax.axvline(0.5, color=style.GREY, linewidth=0.7)
    ax.set_xticks(range(len(CATEGORIES)), list(CATEGORIES.values()))
    ax.grid(visible=False, axis="x")
    style.show_all_shares(ax)
    style.label(
        ax,
        "function of the token",
        "share of high-entropy tokens",
        f"{stage}; {style.span(shown['num_tokens'], 'high-entropy token')} per third, "
        f"{style.span(shown['num_prompts'], 'prompt')};\n"
        f"bars: 95% interval over steps and prompts{style.runs_note(shown, 'open dots')}",
    )
    style.legend(ax, tick_lines=2, ncols=3, title="third of the prompt's group by perplexity", title_fontsize=8)
    return ax
