"""Draw the overlap of policy and reference in high-entropy tokens over training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Of the 20% of a step's tokens with the highest entropy, the share that is also among the 20% with the highest "
    "entropy under the reference policy, the policy before training. Dotted line: the share if entropies were "
    "exchanged between tokens of equal step and position, so that only positions persist. Dashed line: the share if "
    "the ranks under both policies were independent. The reference policy rates what the trained policy wrote, not "
    "what it would have written. arXiv 2506.01939 reports more than 86% at convergence."
)
# Column: legend entry, line style.
NULLS = {"by_position": ("exchanged at equal position", ":"), "independent": ("independent ranks", "--")}


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draw the overlap with its interval, and both null lines."""
    style.curve(ax, frame, "step", "share", color=style.BLUE, label="policy and reference")
    nulls = style.pool(frame, ["step"], *NULLS, ends=())
    for column, (name, dashes) in NULLS.items():
        style.line(ax, nulls, "step", column, color=style.INK, linestyle=dashes, linewidth=1.2, label=name)
    style.mark_boundary(ax, frame)
    ax.set_ylim(0, 1.02)
    style.label(
        ax,
        style.STEP,
        "overlap of high-entropy tokens",
        f"{style.span(frame['num_high'], 'high-entropy token')}, {style.span(frame['num_prompts'], 'prompt')} per step "
        "and run; band: 95% interval over prompts" + style.runs_note(frame),
    )
    style.legend(ax, ncols=2)
    return ax
