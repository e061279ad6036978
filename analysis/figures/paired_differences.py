"""Draw the paired difference of each arm to its baseline (claims M1 to M3).

Pairs have equal seed and prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.patches import Patch

from entrace.analysis.compare import compare_once
from entrace.analysis.compare.verdict import METRICS, PRIMARY
from entrace.analysis.figures import arms, marks, style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

    from entrace.analysis.runs import Runs

CAPTION = (
    "Accuracy of each arm minus that of its baseline on the same held-out prompts, per seed. A verdict needs three "
    "seeds, an interval that excludes zero, an adjusted p of at most .05 (Holm, over all arms), and a difference "
    "beyond the shaded band. Ticks mark the detectable difference: the smallest true difference that this design "
    "finds with 80% power. A row without ticks would need one beyond the axis. Intervals and verdicts are those of "
    "the table 'Comparison'."
)
SMALLEST = METRICS[PRIMARY].smallest
# Color, marker, and order in the legend; any other verdict is drawn as inconclusive.
VERDICTS = {
    "better": (style.BLUE, "^"),
    "worse": (style.VERMILLION, "v"),
    "no difference that matters": (style.GREEN, "s"),
    "inconclusive": (style.GREY, "o"),
}
# An interval from two seeds can be very wide: the axis ends at this multiple of the largest difference of a seed.
REACH = 2.5


def query(runs: Runs) -> pl.DataFrame:
    """Return the query's rows with differences, intervals, and verdicts.

    ``compare`` alone pairs runs and prompts, and computes these columns. The query adds the step and the number of
    prompts of each seed. Rows that ``compare`` does not pair are left out.
    """
    baselines = {str(m.get("arm") or "-"): m.get("baseline") or runs.baseline for m in runs.manifests.values()}
    pairs = {"key": list(baselines), "value": list(baselines.values())}
    frame = runs.ask("paired_differences", baselines=pairs)
    found = compare_once(runs)
    if found is None:
        return frame.clear()
    keys = ["arm", "baseline", "benchmark", "metric"]
    judged = found.differences.select(
        *keys, "low", "high", "p_adjusted", "detectable", "verdict", "covers", "num_seeds", mean="difference"
    )
    measured = frame.drop("value", "baseline_value", "difference").join(
        found.by_seed, on=[*keys, "seed"], how="inner", maintain_order="left"
    )
    return measured.select(frame.columns).join(judged, on=keys, how="left", maintain_order="left")


def size(frame: pl.DataFrame) -> tuple[float, float]:
    """Return the size for one row per arm and benchmark, and the legend."""
    width, height = arms.rows_size(frame.select("arm", "benchmark").n_unique())
    return width, height + 0.3


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draw one row per arm, with the largest difference on top."""
    import polars as pl

    shown = frame.filter(pl.col("metric") == PRIMARY, pl.col("mean").is_not_null())
    is_single = shown["benchmark"].n_unique() == 1
    rows = shown.partition_by("arm", "benchmark", maintain_order=True)
    rows.sort(key=lambda row: (row["benchmark"][0], -row["mean"][0]))
    labels = [row["arm"][0] if is_single else f"{row['arm'][0]} · {row['benchmark'][0]}" for row in rows]
    # Names are within the Axes, so that the note above starts at their left edge.
    left = arms.name_width(labels)
    arms.hide(ax)
    ax.xaxis.labelpad = arms.X_PAD
    with mpl.rc_context(style.RC):
        panel = ax.inset_axes((left, 0, 1 - left, 1))
    panel.axvspan(-SMALLEST, SMALLEST, color=style.GREY, alpha=0.16, linewidth=0, zorder=0.4)
    panel.axvline(0, color=style.INK, linewidth=0.8, zorder=0.6)
    for place, row in enumerate(rows):
        _draw_row(panel, place, row)
    panel.set_yticks(range(len(rows)), [style.shorten(label) for label in labels])
    panel.set_ylim(len(rows) - 0.4, -0.6)
    panel.set_xlim(*_limits(shown))
    panel.locator_params(axis="x", nbins=5)
    panel.grid(visible=False, axis="y")
    panel.tick_params(labelsize=arms.SMALL, length=2, pad=2)
    _legend(ax, set(shown["verdict"]))
    baselines = shown["baseline"].unique().to_list()
    than = style.shorten(baselines[0]) if len(baselines) == 1 else "its baseline"
    note = (
        f"{style.count(rows, 'difference')}, {arms.seeds(shown)} each, "
        f"{style.span(shown['num_prompts'], 'held-out prompt')} per seed\n"
        f"bars: 95% interval, covers {' / '.join(shown['covers'].unique(maintain_order=True))}"
    )
    style.label(ax, f"held-out accuracy (avg@k): arm minus {than}", "", note)
    return ax


def _draw_row(ax: Axes, place: int, row: pl.DataFrame) -> None:
    mean, low, high, detectable, verdict = row.select("mean", "low", "high", "detectable", "verdict").row(0)
    color, marker = VERDICTS.get(verdict, VERDICTS["inconclusive"])
    if low is not None and high is not None:
        ax.hlines(place, low, high, color=color, linewidth=1.3)
    ax.plot(mean, place, marker=marker, color=color, markersize=4.5, linestyle="none")
    marks.remember(ax, row.head(1).drop("difference", "seed"), "mean", "arm", at_y=[place])
    style.seed_dots(ax, row["difference"], [place] * row.height, color)
    marks.remember(ax, row, "difference", "arm", at_y=[place] * row.height)
    if detectable is not None:
        ax.plot([-detectable, detectable], [place] * 2, "|", color=style.INK, markersize=5, markeredgewidth=0.6)


def _limits(shown: pl.DataFrame) -> tuple[float, float]:
    seeds = shown["difference"].to_numpy()
    far = REACH * max(np.abs(seeds).max(), SMALLEST)
    names = ("low", "high", "detectable")
    low, high, detectable = (shown[name].cast(float).fill_null(float("nan")).to_numpy() for name in names)
    ends = np.concatenate([low, high, detectable, -detectable])
    ends = np.clip(ends[np.isfinite(ends)], -far, far)
    everything = np.concatenate([seeds, ends, [-1.5 * SMALLEST, 1.5 * SMALLEST]])
    margin = 0.04 * np.ptp(everything)
    return float(everything.min() - margin), float(everything.max() + margin)


def _legend(ax: Axes, seen: set[str]) -> None:
    """Draw the legend below the axis label, where it cannot cover a row."""
    for verdict, (color, marker) in VERDICTS.items():
        if verdict in seen:
            ax.plot([], [], marker=marker, color=color, markersize=4.5, linewidth=1.3, label=verdict)
    style.seed_dots(ax, [], [], style.GREY, label="seeds")
    ax.plot([], [], "|", color=style.INK, markersize=5, label="detectable")
    handles, _ = ax.get_legend_handles_labels()
    handles.append(Patch(color=style.GREY, alpha=0.16, linewidth=0, label=f"within ±{SMALLEST:g}"))
    style.legend(ax, handles=handles, ncols=3)
