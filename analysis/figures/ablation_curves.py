"""Held-out accuracy of each arm over training (claims M1, M2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import arms, style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Held-out accuracy, mean over the seeds of each arm. A band over seeds says where other seeds would put the mean; "
    "one over prompts leaves that out. Arms of a seed share their prompts, so that differences are known better than "
    "bands suggest: the next figure judges them in pairs."
)
MEAN_OF, AT = "avg_at_k", ("benchmark", "step")
size = arms.panels_size


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draws avg@k over steps, one colour or one panel an arm."""
    arms.lines(ax, frame, "step", legend="lower right")
    style.label(ax, style.STEP, f"held-out accuracy (avg@{style.span(frame['k'])})", arms.line_note(frame))
    return ax
