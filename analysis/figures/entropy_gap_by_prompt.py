"""Draw the entropy gap within prompts over training (claim S2).

The gap is between negative and positive responses to the same prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Mean entropy of the negative responses to a prompt minus that of the positive responses to the same prompt, "
    "averaged over prompts that have both. Hard prompts have more incorrect responses and may have higher entropy "
    "anyway; the comparison within a prompt removes that. If all responses lose the same share of their entropy, the "
    "gap closes too; the verdict therefore compares logarithms."
)


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draw the gap with its interval, and a line at zero."""
    ax.axhline(0, color=style.INK, linewidth=0.8)
    style.curve(ax, frame, "step", "gap", color=style.PURPLE)
    style.mark_boundary(ax, frame)
    style.label(
        ax,
        style.STEP,
        "entropy gap, negative - positive (nats)",
        f"{style.span(frame['num_prompts'], 'prompt')} with both signs per step; band: 95% interval over prompts"
        + style.runs_note(frame),
    )
    style.leave_room_on_top(ax)
    return ax
