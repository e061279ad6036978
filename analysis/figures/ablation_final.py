"""Draw held-out performance of each arm at its last evaluation (claims M1 to M3).

Performance is avg@k, maj@k, and pass@k.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl

from entrace.analysis.figures import arms, marks, style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "The last evaluation: mean accuracy (avg@k), accuracy of the majority answer (maj@k), and the chance that at least "
    "one of k answers is right (pass@k). Small open dots are runs, large dots means over the seeds of an arm; a gray "
    "line marks the baseline. The table 'Final performance' adds response length and entropy."
)
MEAN_OF, AT = "value", ("benchmark", "metric")
METRICS = {"avg_at_k": "avg@{k}", "maj_at_k": "maj@{k}", "pass_at_k": "pass@{k}"}
# Height of a row that benchmarks share.
SPREAD = 0.5
# Between the panels and the legend, in heights of a letter: room for two rows of axis labels.
LEGEND_PAD = 6.2


def size(frame: pl.DataFrame) -> tuple[float, float]:
    """Return the size for one row per arm."""
    return arms.rows_size(len(arms.names(frame.drop_nulls("mean"))))


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draw one panel per metric, with one row per arm."""
    shown = frame.drop_nulls("mean")
    order = arms.names(shown)
    benchmarks = shown["benchmark"].unique(maintain_order=True).to_list()
    arms.hide(ax)
    ax.xaxis.labelpad = 2 * arms.X_PAD
    # Names are within the Axes, so that the note above starts at their left edge.
    left = arms.name_width(order)
    width = (1 - left) / len(METRICS)
    k = style.span(shown["k"])
    for i, (metric, name) in enumerate(METRICS.items()):
        with mpl.rc_context(style.RC):
            panel = ax.inset_axes((left + i * width, 0, 0.86 * width, 1))
        for j, benchmark in enumerate(benchmarks):
            offset = SPREAD * ((j + 0.5) / len(benchmarks) - 0.5)
            part = shown.filter(metric=metric, benchmark=benchmark)
            color = style.ARM_COLORS[1 + j % (len(style.ARM_COLORS) - 1)]
            _draw_rows(panel, part, {arm: row + offset for row, arm in enumerate(order)}, color)
        panel.set_xlabel(name.format(k=k), fontsize=8, labelpad=1)
        panel.set_yticks(range(len(order)), [style.shorten(arm) for arm in order] if i == 0 else [])
        panel.set_ylim(len(order) - 0.5, -0.5)
        panel.tick_params(labelsize=arms.SMALL, length=2, pad=2)
        panel.locator_params(axis="x", nbins=3)
        panel.grid(visible=False, axis="y")
        if i == 0 and len(benchmarks) > 1:
            handles, labels = panel.get_legend_handles_labels()
            style.legend(ax, handles=handles, labels=labels, borderaxespad=LEGEND_PAD, ncols=3)
    note = f"{arms.counts(frame)}\nlarge dots: means; bars: {arms.covers(shown)}"
    style.label(ax, "held-out accuracy", "", note)
    return ax


def _draw_rows(ax: Axes, part: pl.DataFrame, rows: dict[str, float], color: str) -> None:
    means = arms.mean_rows(part)
    ax.errorbar(
        means["mean"],
        [rows[arm] for arm in means["arm"]],
        xerr=style.errors(means, "mean"),
        color=color,
        linestyle="none",
        marker="o",
        markersize=4.5,
        elinewidth=1.1,
        label=style.shorten(part["benchmark"][0]) if part.height else None,
    )
    marks.remember(ax, means, "mean", "arm", at_y=[rows[arm] for arm in means["arm"]])
    style.seed_dots(ax, part["value"], [rows[arm] for arm in part["arm"]], color)
    marks.remember(ax, part, "value", "arm", at_y=[rows[arm] for arm in part["arm"]])
    for baseline in means.filter(means["arm"] == means["baseline"])["mean"]:
        ax.axvline(baseline, color=style.GREY, linewidth=0.8, zorder=0.6)
