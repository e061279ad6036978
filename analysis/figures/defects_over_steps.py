"""Share of defective responses over training (claim S4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Share of all sampled responses with a defect: no parsable answer, cut off at the length limit, repeating itself, "
    "or off the subject. One response can have several."
)
COLORS = {
    "any": style.INK,
    "format_violation": style.VERMILLION,
    "truncated": style.BLUE,
    "repetition": style.GREEN,
    "irrelevant": style.PURPLE,
}


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draws one line a defect that occurs at all; the interval for any defect only."""
    seen = set(frame.filter(frame["share"] > 0)["defect"])
    for i, (_, run, line) in enumerate(style.by_run(frame)):
        for defect, color in COLORS.items():
            part = run.filter(defect=defect)
            name = defect.replace("_", " ") if i == 0 else None
            if defect == "any":
                style.band(ax, part, "step", "share", color=color, linestyle=line, label="any defect" if name else None)
            elif defect in seen:
                ax.plot(part["step"], part["share"], color=color, linestyle=line, linewidth=1.1, label=name)
    style.mark_boundary(ax, frame)
    style.label(
        ax,
        style.STEP,
        "share of responses",
        f"{style.span(frame['num_responses'])} responses a step; band: 95 % interval over prompts",
    )
    style.start_at_zero(ax)
    style.legend(ax, loc="upper right", bbox_to_anchor=(1, 0.97), ncols=2)
    return ax
