"""Draw the share of defective responses over training (claim S4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Share of all sampled responses with a defect: no parsable answer (format violation), cut off at the length limit "
    "(truncated), repetition, or off topic (irrelevant). A response can have several defects. Only the line of any "
    "defect has a band."
)
COLORS = {
    "any": style.INK,
    "format_violation": style.VERMILLION,
    "truncated": style.BLUE,
    "repetition": style.GREEN,
    "irrelevant": style.PURPLE,
}


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draw one line per defect that occurs, and the interval of any defect."""
    seen = set(frame.filter(frame["share"] > 0)["defect"])
    for defect, color in COLORS.items():
        part = frame.filter(defect=defect)
        if defect == "any":
            style.curve(ax, part, "step", "share", color=color, label="any defect")
        elif defect in seen:
            pooled = style.pool(part, ["step"], "share")
            style.line(ax, pooled, "step", "share", color=color, linewidth=1.1, label=defect.replace("_", " "))
    style.mark_boundary(ax, frame)
    style.label(
        ax,
        style.STEP,
        "share of responses",
        f"{style.span(frame['num_responses'], 'response')} per step; band: 95% interval over prompts"
        + style.runs_note(frame),
    )
    style.start_at_zero(ax)
    style.legend(ax, ncols=3)
    return ax
