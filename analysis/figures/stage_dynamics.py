"""Draw entropy and accuracy over training, with the fitted stages (claim S1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Thin lines are training steps. Thick lines are the two-stage fit of each run: two straight segments that meet at "
    "one boundary. Gray marks show the boundary and its 95% interval. The boundary splits a run into a fast and a "
    "slow part. Any curve that slows down has one: a separate verdict says if two segments fit better than a smooth "
    "curve."
)


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draw entropy on the left axis and accuracy on the right axis."""
    right = ax.twinx()
    right.grid(visible=False)
    right.spines["right"].set_visible(True)
    series = (
        (ax, "entropy_token_mean", "entropy_fit", style.VERMILLION),
        (right, "accuracy", "accuracy_fit", style.BLUE),
    )
    for _, run in style.by_run(frame):
        for axes, name, fit, color in series:
            style.line(axes, run, "step", name, color=color, alpha=0.35, linewidth=0.6)
            for stage in run.partition_by("stage", maintain_order=True):
                style.line(axes, stage, "step", fit, color=color, linewidth=1.7)
    style.mark_boundary(ax, frame)
    lengths = [run.height for _, run in style.by_run(frame)]
    interval = "bars on top" if len(lengths) > 1 else "shaded"
    style.label(
        ax,
        style.STEP,
        "mean token entropy (nats)",
        f"n = {style.span(lengths, 'step')} in {style.count(lengths, 'run')}; {interval}: 95% interval of the boundary",
    )
    right.set_ylabel("accuracy of sampled responses", color=style.BLUE)
    ax.yaxis.label.set_color(style.VERMILLION)
    ax.set_ylim(0, ax.get_ylim()[1] * 1.12)
    # Room for the names of the stages, and for a fit that ends above 1.
    right.set(ylim=(0, 1.12), yticks=[0, 0.2, 0.4, 0.6, 0.8, 1])
    return ax
