"""Draw accuracy of each arm against the cost of its training (claims M1, M2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.ticker import EngFormatter

from entrace.analysis.figures import arms, marks, style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Accuracy at the last evaluation against the cost of training up to it. Small marks are runs, large marks means "
    "over the seeds of an arm. With more arms than colors, only means are drawn, and one bar as long as their median "
    "interval. Up and to the left is better. Tokens are always comparable; seconds are comparable only between runs on "
    "the same machine with the same load."
)
MEAN_OF, AT = "avg_at_k", ("benchmark",)
COSTS = {"tokens": "generated tokens", "seconds": "training time (s)"}
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Distance of the names as a share of the height, unless they must be closer.
LINE = 0.09
# From this many arms on, lines connect names and means.
MANY = 5


def size(frame: pl.DataFrame) -> tuple[float, float]:
    """Return the size for one row per arm and benchmark."""
    width, height = arms.rows_size(len(arms.names(frame.drop_nulls("mean"))))
    return width, max(height, 2.8) * frame["benchmark"].n_unique()


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draw two panels (tokens and seconds) per benchmark.

    The names of the arms are beside the panels.
    """
    shown = frame.drop_nulls("mean")
    looks = _looks(arms.names(shown))
    is_crowded = arms.is_crowded(shown)
    parts = shown.partition_by("benchmark", maintain_order=True)
    arms.hide(ax)
    ax.xaxis.labelpad, ax.yaxis.labelpad = 2 * arms.X_PAD, arms.Y_PAD
    height = (0.88 if len(parts) > 1 else 1) / len(parts)
    for i, part in enumerate(parts):
        bar = _typical_interval(part)
        values = [part["mean"], bar] if is_crowded else [part[name] for name in ("avg_at_k", "mean_low", "mean_high")]
        panels = _panels(ax, 1 - (i + 1) / len(parts), height, np.concatenate(values))
        for panel, (cost, name) in zip(panels, COSTS.items(), strict=True):
            _draw_points(panel, part, cost, looks, with_runs=not is_crowded)
            panel.set_xlabel(name if i + 1 == len(parts) else "", fontsize=8, labelpad=1)
        if len(parts) > 1:
            panels[0].set_title(style.shorten(part["benchmark"][0]), fontsize=7, loc="left", pad=2)
        if is_crowded:
            transform = panels[0].get_yaxis_transform()
            panels[0].plot([0.05, 0.05], bar, transform=transform, color=style.GREY, linewidth=1.5)
        _draw_names(panels[1], part, looks)
    covers = arms.covers(shown)
    drawn = f"means; bar: median {covers}" if is_crowded else f"large marks: means; bars: {covers}"
    note = f"{arms.counts(frame)}\n{drawn}"
    label = f"held-out accuracy (avg@{style.span(shown['k'])})"
    style.label(ax, "cost of training up to the last evaluation", label, note)
    return ax


def _looks(order: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the color and marker of each arm, which together distinguish dozens."""
    colors = len(style.ARM_COLORS)
    return {
        arm: {
            "color": style.ARM_COLORS[i % colors],
            "marker": MARKERS[i // colors % len(MARKERS)],
            "linestyle": "none",
        }
        for i, arm in enumerate(order)
    }


def _panels(ax: Axes, bottom: float, height: float, shown: np.ndarray) -> tuple[Axes, Axes]:
    with mpl.rc_context(style.RC):
        left = ax.inset_axes((0, bottom, 0.46, height))
        right = ax.inset_axes((0.54, bottom, 0.46, height), sharey=left)
    shown = shown[np.isfinite(shown)]
    margin = 0.06 * np.ptp(shown) or 0.05
    left.set_ylim(shown.min() - margin, shown.max() + margin)
    for panel in (left, right):
        panel.tick_params(labelsize=arms.SMALL, length=2, pad=2, labelleft=panel is left)
        panel.locator_params(axis="x", nbins=3)
        panel.locator_params(axis="y", nbins=5)
        panel.margins(x=0.12)
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    return left, right


def _draw_points(ax: Axes, part: pl.DataFrame, cost: str, looks: dict[str, dict[str, Any]], *, with_runs: bool) -> None:
    """Draw the mean of each arm at the mean cost of its runs, where that is known.

    ``with_runs`` adds the runs and the intervals of the means.
    """
    import polars as pl

    known = part.drop_nulls(cost)
    if known.is_empty():
        ax.text(0.5, 0.5, "not recorded", transform=ax.transAxes, ha="center", color=style.GREY, fontsize=7)
    for (arm,), runs in known.partition_by("arm", maintain_order=True, as_dict=True).items():
        look = looks[str(arm)]
        mean = arms.mean_rows(runs).with_columns(pl.lit(runs[cost].mean()).alias(cost))
        if with_runs:
            ax.plot(runs[cost], runs["avg_at_k"], **look, markersize=3, alpha=0.45, markeredgewidth=0)
            marks.remember(ax, runs, cost, "avg_at_k")
            ax.vlines(mean[cost], mean["low"], mean["high"], color=look["color"], linewidth=1, alpha=0.6)
        ax.plot(mean[cost], mean["mean"], **look, markersize=5.5)
        marks.remember(ax, mean, cost, "mean")


def _typical_interval(part: pl.DataFrame) -> np.ndarray:
    """Return the ends of a bar above the lowest mean, (2,).

    It is as long as the median interval.
    """
    mean, low, high = part.select("mean", "mean_low", "mean_high").to_numpy().T
    return mean.min() + np.array([0, np.median(high - low)])


def _draw_names(ax: Axes, part: pl.DataFrame, looks: dict[str, dict[str, Any]]) -> None:
    """Write the names of the arms beside ``ax``, the most accurate on top.

    With ``MANY`` arms or more, a line connects each name and mean, if the training time is known.
    """
    import polars as pl

    means = part.group_by("arm").agg(pl.col("mean").first(), pl.col("seconds").mean())
    means = means.sort("mean", "arm", descending=[True, False])
    low, high = ax.get_ylim()
    heights = _spread((means["mean"].to_numpy() - low) / (high - low))
    for (arm, accuracy, seconds), height in zip(means.iter_rows(), heights, strict=True):
        ax.plot(1.07, height, transform=ax.transAxes, clip_on=False, markersize=4.5, **looks[arm])
        if seconds is not None and len(heights) >= MANY:
            ax.annotate(
                "",
                (seconds, accuracy),
                (1.07, height),
                textcoords="axes fraction",
                arrowprops={"arrowstyle": "-", "color": looks[arm]["color"], "linewidth": 0.4, "alpha": 0.5},
            )
        ax.text(1.11, height, style.shorten(arm), transform=ax.transAxes, va="center", fontsize=arms.SMALL)


def _spread(wanted: np.ndarray) -> np.ndarray:
    """Return heights close to the falling ``wanted``, far enough apart for text.

    All heights are in [0, 1].
    """
    distance = min(LINE, 1 / max(len(wanted) - 1, 1))
    places = wanted.copy()
    for i in range(1, len(places)):
        places[i] = min(places[i], places[i - 1] - distance)
    places[-1] = max(places[-1], 0)
    for i in range(len(places) - 2, -1, -1):
        places[i] = max(places[i], places[i + 1] + distance)
    return places
