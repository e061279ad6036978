"""Entropy and accuracy over training, with the fitted stages (claim S1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Thin lines are single steps, thick ones the fit of two straight segments that meet at one boundary; the gray "
    "strip is where the boundary may be. The boundary splits the run into a fast and a slow part. Any curve that "
    "slows down has one: whether two lines fit better than a smooth curve is a verdict of its own."
)


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draws entropy on the left axis and accuracy on the right one."""
    right = ax.twinx()
    right.grid(visible=False)
    series = (
        (ax, "entropy_token_mean", "entropy_fit", style.VERMILLION),
        (right, "accuracy", "accuracy_fit", style.BLUE),
    )
    for _, run, line in style.by_run(frame):
        for axes, name, fit, color in series:
            axes.plot(run["step"], run[name], color=color, alpha=0.4, linewidth=0.8)
            for stage in run.partition_by("stage", maintain_order=True):
                axes.plot(stage["step"], stage[fit], color=color, linestyle=line, linewidth=2)
    style.mark_boundary(ax, frame)
    lengths = [run.height for _, run, _ in style.by_run(frame)]
    style.label(
        ax,
        style.STEP,
        "mean token entropy (nats)",
        f"n = {style.span(lengths)} steps in {style.count(lengths, 'run')}; shaded: 95 % interval of the boundary",
    )
    right.set_ylabel("accuracy of sampled responses", color=style.BLUE)
    ax.yaxis.label.set_color(style.VERMILLION)
    ax.set_ylim(0, ax.get_ylim()[1] * 1.1)
    # Room for the names of the stages, and for a fit that ends above 1.
    right.set(ylim=(0, 1.1), yticks=[0, 0.2, 0.4, 0.6, 0.8, 1])
    return ax
