"""How much of the movement of probabilities lies in the tokens that move most (claim S5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "The tokens of a step are ranked by |Δp|, how far its update moved the probability of the sampled token. A bar is "
    "what the top 1, 5, and 20 % hold of all movement, on average over steps. Dashes mark what random logit changes of "
    "equal size would give at the recorded probabilities: most of these are near 1 and cannot move. Dots mark equal "
    "movement. Only bars above the dashes say that the update chose few tokens."
)
STAGES = {"rising": style.ORANGE, "plateau": style.BLUE}
# Column: what the mark says, line style.
MARKS = {"random": ("random logit changes", "--"), "even": ("equal movement", ":")}
WIDTH = 0.8


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draws one bar a share of tokens, stage and run, with the two marks beside it."""
    tops = sorted(set(frame["top"]))
    series = frame.select("run_id", "stage").unique(maintain_order=True).sort("stage", descending=True)
    offsets = WIDTH * ((np.arange(series.height) + 0.5) / series.height - 0.5)
    width = WIDTH / series.height
    labelled: set[str] = set()
    for (run, stage), offset in zip(series.iter_rows(), offsets, strict=True):
        part = frame.filter(run_id=run, stage=stage)
        places = np.array([tops.index(top) for top in part["top"]]) + offset
        ax.bar(
            places,
            part["share"],
            yerr=style.errors(part, "share"),
            width=0.9 * width,
            color=STAGES[stage],
            error_kw={"elinewidth": 1.2, "capsize": 2, "ecolor": style.INK},
            label=None if stage in labelled else stage,
        )
        for kind, (_, dashes) in MARKS.items():
            ends = places - 0.45 * width, places + 0.45 * width
            ax.hlines(part[kind], ends[0], ends[1], color=style.INK, linestyle=dashes, linewidth=1.2)
        labelled.add(stage)
    for name, dashes in MARKS.values():
        ax.plot([], [], color=style.INK, linestyle=dashes, linewidth=1.2, label=name)
    ax.set_xticks(range(len(tops)), [f"top {100 * top:g} %" for top in tops])
    style.label(
        ax,
        "tokens that move most, by |Δp|",
        "share of all movement",
        f"{style.span(frame['num_tokens'])} tokens, {style.span(frame['num_prompts'])} prompts a bar; "
        "95 % interval over steps and prompts",
    )
    ax.grid(visible=False, axis="x")
    style.legend_above_shares(ax, ncols=2)
    return ax
