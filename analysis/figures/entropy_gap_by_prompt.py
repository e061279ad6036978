"""Entropy of wrong against right responses to the same prompt, over training (claim S2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Mean entropy of the negative responses to a prompt minus that of the positive ones to the same prompt, averaged "
    "over prompts that have both. Hard prompts have more wrong responses and may have more entropy anyway; comparing "
    "within a prompt leaves that out. If all responses lose the same share of their entropy, the gap closes, too; the "
    "verdict therefore compares logarithms."
)


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draws the gap of each run with its interval, and the line of no gap."""
    ax.axhline(0, color=style.INK, linewidth=0.8)
    for _, run, line in style.by_run(frame):
        style.band(ax, run, "step", "gap", color=style.PURPLE, linestyle=line)
    style.mark_boundary(ax, frame)
    style.label(
        ax,
        style.STEP,
        "entropy, negative - positive (nats)",
        f"{style.span(frame['num_prompts'])} prompts a step with both signs; band: 95 % interval over prompts",
    )
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.1 * (high - low))
    return ax
