"""Draw held-out accuracy of each arm over training (claims M1, M2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import arms, style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Held-out accuracy, mean over the seeds of each arm. A band over seeds covers the variation between seeds; a band "
    "over prompts does not. Arms share prompts within a seed, so differences are known better than the bands suggest: "
    "the next figure shows paired differences."
)
MEAN_OF, AT = "avg_at_k", ("benchmark", "step")
size = arms.panels_size


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draw avg@k over steps, one color or one panel per arm."""
    arms.lines(ax, frame, "step")
    style.label(ax, style.STEP, f"held-out accuracy (avg@{style.span(frame['k'])})", arms.line_note(frame))
    return ax
