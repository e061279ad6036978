"""Entropy at both ends of a response against its middle, by stage and sign (claim T1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Entropy of the first and of the last fifth of a response relative to its three middle fifths; 0 is as high as "
    "there. A U shape needs both intervals to lie above 0; the axis on the left says in how many runs they do."
)
PARTS = {"beginning": (style.GREEN, "o"), "end": (style.PURPLE, "s")}
STAGES = ("rising", "plateau")
SPREAD = 0.5


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draws a dot with its interval for every stage, sign, part and run."""
    rows = [(stage, sign) for stage in STAGES for sign in style.SIGN_COLORS]
    rows = [row for row in rows if not frame.filter(stage=row[0], sample_sign=row[1]).is_empty()]
    runs = style.by_run(frame)
    places = np.linspace(-SPREAD / 2, SPREAD / 2, len(PARTS) * len(runs)).reshape(len(PARTS), -1)
    for (part_name, (color, marker)), offsets in zip(PARTS.items(), places, strict=True):
        for i, (_, run, _) in enumerate(runs):
            part = run.filter(part=part_name)
            ax.errorbar(
                part["excess"],
                [rows.index(row) + offsets[i] for row in part.select("stage", "sample_sign").iter_rows()],
                xerr=style.errors(part, "excess"),
                color=color,
                marker=marker,
                markersize=4,
                linestyle="none",
                elinewidth=1.2,
                capsize=2,
                label=part_name if i == 0 else None,
            )
    ax.axvline(0, color=style.INK, linewidth=0.7)
    ax.set_yticks(range(len(rows)), [_name(frame, *row) for row in rows])
    ax.set_ylim(len(rows) - 0.4, -1)
    ax.grid(visible=False, axis="y")
    style.label(
        ax,
        "entropy relative to the middle of the response, minus 1",
        "",
        f"{style.span(frame['num_responses'])} responses to {style.span(frame['num_prompts'])} prompts a dot;\n"
        "bars: 95 % interval over steps and prompts",
    )
    style.legend(ax, loc="upper right", ncols=2)
    return ax


def _name(frame: pl.DataFrame, stage: str, sign: str) -> str:
    shaped = frame.filter(stage=stage, sample_sign=sign, part="end")["has_u_shape"]
    return f"{stage}, {sign}\nU in {shaped.sum()} of {style.count(shaped.to_list(), 'run')}"
