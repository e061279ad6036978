"""Draw entropy at both ends of a response relative to its middle (claim T1).

Rows differ by stage and sign.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Entropy of the first and of the last fifth of a response relative to its three middle fifths; 0 is the entropy of "
    "the middle. A U shape needs both intervals above 0; the vertical axis says in how many runs they are."
)
# Color, marker, and vertical offset of each part.
PARTS = {"beginning": (style.GREEN, "o", -0.12), "end": (style.PURPLE, "s", 0.12)}


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draw a dot with its interval per stage, sign, and part."""
    rows = [(stage, sign) for stage in style.STAGE_COLORS for sign in style.SIGN_COLORS]
    rows = [row for row in rows if not frame.filter(stage=row[0], sample_sign=row[1]).is_empty()]
    names = [" ".join(row) for row in rows]
    placed = frame.with_columns(
        row=(frame["stage"] + " " + frame["sample_sign"]).replace_strict(names, range(len(rows)), default=None)
    )
    for part_name, (color, marker, shift) in PARTS.items():
        part = placed.filter(part=part_name)
        look = {"color": color, "marker": marker, "linestyle": "none", "label": part_name}
        if not part.is_empty():
            style.points(ax, part, "row", "excess", shift=shift, is_horizontal=True, **look)
    ax.axvline(0, color=style.INK, linewidth=0.7)
    ax.set_yticks(range(len(rows)), [_name(frame, *row) for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.grid(visible=False, axis="y")
    style.label(
        ax,
        "entropy relative to the middle, minus 1",
        "",
        f"{style.span(frame['num_responses'], 'response')} to {style.span(frame['num_prompts'], 'prompt')} per dot;\n"
        f"bars: 95% interval over steps and prompts{style.runs_note(frame, 'open dots')}",
    )
    style.legend(ax, ncols=2)
    return ax


def _name(frame: pl.DataFrame, stage: str, sign: str) -> str:
    shaped = frame.filter(stage=stage, sample_sign=sign, part="end")["has_u_shape"]
    return f"{stage}, {sign}\nU in {shaped.sum()} of {style.count(shaped.to_list(), 'run')}"
