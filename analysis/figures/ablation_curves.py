"""Held-out accuracy of each arm over training (claims M1, M2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Held-out accuracy of every run. The band covers the choice of prompts only; runs of another seed would differ by "
    "more, so that curves within each other's bands, and even slightly outside, say nothing yet."
)


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draws avg@k over steps, one colour an arm, one line style a run of it."""
    arms = frame["arm"].fill_null("-").unique(maintain_order=True).to_list()
    for arm, color in zip(arms, _colors(len(arms)), strict=True):
        of_arm = frame.filter(frame["arm"].fill_null("-") == arm)
        for i, (_, run, line) in enumerate(style.by_run(of_arm)):
            for benchmark in run.partition_by("benchmark", maintain_order=True):
                name = arm if i == 0 and benchmark["benchmark"][0] == run["benchmark"][0] else None
                style.band(ax, benchmark, "step", "avg_at_k", color=color, linestyle=line, label=name)
    k = style.span(frame["k"])
    style.label(
        ax,
        style.STEP,
        f"held-out accuracy (avg@{k})",
        f"{style.span(frame['num_prompts'])} held-out prompts, {k} samples each; band: 95 % interval over prompts",
    )
    style.legend(ax, loc="lower right")
    return ax


def _colors(count: int) -> list[str]:
    return [style.ARM_COLORS[i % len(style.ARM_COLORS)] for i in range(count)]
