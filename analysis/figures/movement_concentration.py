"""Draw the share of movement in the tokens that move most (claim S5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "The tokens of a step are ranked by |Δp|, the change of the probability of the sampled token by the update. A bar "
    "is the share of all movement in the top 1, 5, and 20%, averaged over steps. Dashed lines: random logit changes "
    "of equal size at the recorded probabilities, most of which are near 1 and cannot move. Dotted lines: equal "
    "movement of all tokens. Only a bar above its dashed line says that the update selected few tokens."
)
# Column: legend entry, line style.
MARKS = {"random": ("random logit changes", "--"), "even": ("equal movement", ":")}
WIDTH = 0.8


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draw one bar per stage and share of tokens, with both reference lines."""
    tops = sorted(set(frame["top"]))
    placed = frame.with_columns(place=frame["top"].replace_strict(tops, range(len(tops))))
    stages = [stage for stage in style.STAGE_COLORS if (frame["stage"] == stage).any()]
    width = WIDTH / len(stages)
    for i, stage in enumerate(stages):
        shift = (i + 0.5) * width - WIDTH / 2
        part = placed.filter(stage=stage)
        style.bars(
            ax, part, "place", "share", shift=shift, width=0.92 * width, color=style.STAGE_COLORS[stage], label=stage
        )
        marks = style.pool(part, ["place"], *MARKS, ends=())
        for kind, (_, dashes) in MARKS.items():
            left, right = (marks["place"] + shift + side * 0.46 * width for side in (-1, 1))
            ax.hlines(marks[kind], left, right, color=style.INK, linestyle=dashes, linewidth=1.2)
    for name, dashes in MARKS.values():
        ax.plot([], [], color=style.INK, linestyle=dashes, linewidth=1.2, label=name)
    ax.set_xticks(range(len(tops)), [f"top {100 * top:g}%" for top in tops])
    ax.grid(visible=False, axis="x")
    ax.set_ylim(0, 1.04)
    style.label(
        ax,
        "tokens that move most, by |Δp|",
        "share of all movement",
        f"{style.span(frame['num_tokens'], 'token')}, {style.span(frame['num_prompts'], 'prompt')} per stage and run; "
        "bars: 95% interval over steps and prompts" + style.runs_note(frame, "open dots"),
    )
    style.legend(ax, ncols=2)
    return ax
