"""What replacing a token costs, by perplexity of the response (claim I2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "One token of a response is replaced, and the response is continued several times from either prefix: accuracy "
    "with the original token minus accuracy with the alternative. Above 0 the original was the better choice. The "
    "claim expects bars nearer to 0 for low perplexity: such responses survive a replaced token."
)
KINDS = {True: ("right response", style.BLUE), False: ("wrong response", style.VERMILLION)}
TERCILES = {1: "lowest", 2: "middle", 3: "highest"}
SPREAD = 0.8
LEGEND_ROOM = 0.15


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draws one bar a tercile, correctness and run, with its interval."""
    runs = style.by_series(frame)
    width = SPREAD / (len(KINDS) * len(runs))
    places = ((np.arange(len(KINDS) * len(runs)) + 0.5) * width - SPREAD / 2).reshape(len(KINDS), -1)
    for (is_correct, (name, color)), offsets in zip(KINDS.items(), places, strict=True):
        for i, (_, run, _) in enumerate(runs):
            part = run.filter(is_correct=is_correct)
            ax.bar(
                part["ppl_tercile"] + offsets[i],
                part["impact"],
                yerr=style.errors(part, "impact"),
                width=0.9 * width,
                color=color,
                error_kw={"elinewidth": 1, "capsize": 2, "ecolor": style.INK},
                label=name if i == 0 and not part.is_empty() else None,
            )
    ax.axhline(0, color=style.INK, linewidth=0.7)
    ax.set_xticks(list(TERCILES), list(TERCILES.values()))
    ax.grid(visible=False, axis="x")
    style.label(
        ax,
        "perplexity within the prompt's group",
        "accuracy lost by replacing a token",
        f"{style.span(frame['num_interventions'])} replaced tokens, {style.span(frame['num_prompts'])} prompts a bar;\n"
        "bars: 95 % interval over prompts",
    )
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + LEGEND_ROOM * (high - low))
    style.legend(ax, loc="upper left", ncols=2)
    return ax
