"""What the high-entropy tokens of low- and high-perplexity responses are for (claim I1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "The responses to one prompt are cut into thirds by perplexity at equal length. Each dot is the share of a "
    "category among the 20 % of tokens with the highest entropy, so that the five categories of a third add up to 1. "
    "'All reasoning' is the sum of formal, logical, and metacognitive: the claim expects it to be highest in the "
    "lowest third. The verdict compares tokens at equal position."
)
CATEGORIES = {
    "reasoning": "all\nreasoning",
    "formal_reasoning": "formal",
    "logical_structuring": "logical",
    "metacognitive": "meta-\ncognitive",
    "semantic_support": "semantic",
    "special": "special",
}
TERCILES = {
    1: ("lowest", style.BLUE, "o"),
    2: ("middle", style.GREY, "s"),
    3: ("highest", style.ORANGE, "^"),
}
SPREAD = 0.6


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draws a dot with its interval for every category, tercile and run, in the stage ``style.late_stage`` picks."""
    shown, stage = style.late_stage(frame)
    runs = style.by_run(shown)
    places = np.linspace(-SPREAD / 2, SPREAD / 2, len(TERCILES) * len(runs)).reshape(len(TERCILES), -1)
    for (tercile, (name, color, marker)), offsets in zip(TERCILES.items(), places, strict=True):
        for i, (_, run, _) in enumerate(runs):
            part = run.filter(ppl_tercile=tercile)
            ax.errorbar(
                [list(CATEGORIES).index(category) + offsets[i] for category in part["category"]],
                part["share"],
                yerr=style.errors(part, "share"),
                color=color,
                marker=marker,
                markersize=3.5,
                linestyle="none",
                elinewidth=1,
                capsize=2,
                label=name if i == 0 else None,
            )
    ax.axvline(0.5, color=style.GREY, linewidth=0.7)
    ax.set_xticks(range(len(CATEGORIES)), list(CATEGORIES.values()))
    ax.grid(visible=False, axis="x")
    style.label(
        ax,
        "function of the token",
        "share of high-entropy tokens",
        f"{stage}; {style.span(shown['num_tokens'])} high-entropy tokens a third of "
        f"{style.span(shown['num_prompts'])} prompts;\nbars: 95 % interval over steps and prompts",
    )
    style.start_at_zero(ax)
    ax.set_yticks([tick for tick in ax.get_yticks() if tick <= 1])
    style.legend(ax, loc="upper center", ncols=3, title="third of the prompt's group by perplexity", title_fontsize=8)
    return ax
