"""Where each arm ends: avg@k, maj@k and pass@k (claims M1 to M3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "The last evaluation of every run: mean accuracy, accuracy of the majority answer, and the chance that at least "
    "one of k answers is right. The table 'Where each run ended' adds response length and entropy."
)
METRICS = {"avg_at_k": "avg@{k}", "maj_at_k": "maj@{k}", "pass_at_k": "pass@{k}"}
SPREAD = 0.5


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draws a dot with its interval for every run and metric."""
    shown = frame.filter(frame["metric"].is_in(list(METRICS)))
    runs = shown["run_id"].unique(maintain_order=True).to_list()
    arms = shown["arm"].fill_null("-").unique(maintain_order=True).to_list()
    offsets = np.linspace(-SPREAD / 2, SPREAD / 2, len(runs)) if len(runs) > 1 else [0.0]
    labelled: set[str] = set()
    for run, offset in zip(runs, offsets, strict=True):
        part = shown.filter(run_id=run)
        arm = part["arm"].fill_null("-")[0]
        ax.errorbar(
            part["value"],
            [list(METRICS).index(metric) + offset for metric in part["metric"]],
            xerr=style.errors(part, "value"),
            color=style.ARM_COLORS[arms.index(arm) % len(style.ARM_COLORS)],
            linestyle="none",
            marker="o",
            markersize=4,
            elinewidth=1.2,
            capsize=2,
            label=None if arm in labelled else arm,
        )
        labelled.add(arm)
    k = style.span(shown["k"]) if shown.height else "k"
    ax.set_yticks(range(len(METRICS)), [name.format(k=k) for name in METRICS.values()])
    ax.invert_yaxis()
    prompts = style.span(shown["num_prompts"]) if shown.height else "0"
    style.label(ax, "held-out accuracy", "", f"{prompts} held-out prompts; bars: 95 % interval over prompts")
    style.legend(ax, loc="best")
    return ax
