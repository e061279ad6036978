"""Draw arms side by side: means over seeds, in panels if there are many arms."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from entrace.analysis.figures import style
from entrace.analysis.statistics.shares import NO_ERROR, bounded
from entrace.analysis.verdict_rules import MIN_RUNS

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

    from entrace.analysis.runs import Runs

COLUMNS = 4
# Shares of a panel's width and height that stay free, to its right and above it.
GAP_X, GAP_Y = 0.06, 0.3
# Inches: a row of panels, a row of names, and the margin around them.
PANEL_HEIGHT, ROW_HEIGHT, MARGIN = 1.1, 0.17, 1.5
# Points between panels that share an axis label and that label: room for their tick labels.
X_PAD, Y_PAD = 15, 31
# Points: tick labels of panels, and names of arms beside them.
SMALL = 7
# Characters in a line of a panel's title.
TITLE_LENGTH = 17


def with_means(runs: Runs, frame: pl.DataFrame, value: str, keys: Sequence[str]) -> pl.DataFrame:
    """Add each arm's ``baseline`` and mean of ``value`` to every row of its runs.

    The mean is over rows with equal ``keys``. All points of an arm average the same seeds: those whose evaluations
    reach the last step of the arm on that benchmark. A point that one of these seeds lacks has no mean. Rows that are
    in no mean, and metrics that are not shares, hold null.

    The interval is Student's t over runs (``shares.bounded``) if there are ``MIN_RUNS`` that do not all agree.
    Otherwise it is the mean of the runs' intervals over prompts, which leaves out the variation between seeds.

    Args:
        runs: Defines the baseline of each arm.
        frame: Rows of runs with ``run_id``, ``arm``, ``benchmark``, ``step``, ``low``, ``high``, ``value``, ``keys``.
        value: Column of shares, in [0, 1].
        keys: Columns that must be equal within a mean, apart from the arm; without ``step``, last evaluations are
            averaged.

    Returns:
        ``frame`` with the columns ``baseline``, ``mean``, ``mean_low``, ``mean_high`` (95% interval), and
        ``num_seeds``.
    """
    import polars as pl

    baselines = {run: manifest.get("baseline") or runs.baseline for run, manifest in runs.manifests.items()}
    frame = frame.with_columns(
        arm=pl.col("arm").fill_null("-"),
        baseline=pl.col("run_id").replace_strict(baselines, default=runs.baseline, return_dtype=pl.String),
    )
    part = frame.drop_nulls(value)
    if "metric" in keys:
        part = part.filter(pl.col("metric").str.ends_with("_at_k"))
    curve = ["arm", "benchmark"]
    is_last = pl.col("step") == pl.col("step").max().over(curve)
    part = part.join(part.filter(is_last), on=["run_id", "benchmark"], how="semi", maintain_order="left")
    if "step" not in keys:
        part = part.filter(is_last)
    group = list(dict.fromkeys((*curve, *keys)))
    num_runs = pl.col("run_id").n_unique()
    part = part.filter(num_runs.over(group) == num_runs.over(curve))
    rows = [
        (*point, *_mean(*(own[name].to_numpy() for name in (value, "low", "high"))), own.height)
        for point, own in part.group_by(group, maintain_order=True)
    ]
    numbers = dict.fromkeys(("mean", "mean_low", "mean_high"), pl.Float64) | {"num_seeds": pl.Int64}
    means = pl.DataFrame(rows, {name: frame.schema[name] for name in group} | numbers, orient="row")
    taking_part = part.select("run_id", *group).join(means, on=group, how="left", maintain_order="left")
    return frame.join(taking_part, on=["run_id", *group], how="left", maintain_order="left")


def _mean(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[float, float, float]:
    """Return the mean over runs with its interval; see ``with_means``."""
    n, value = len(values), float(values.mean())
    error = float(np.std(values, ddof=1) / np.sqrt(n)) if n >= MIN_RUNS else 0.0
    if error <= NO_ERROR:
        return value, float(low.mean()), float(high.mean())
    estimate = bounded(value, error, n - 1, n, "seeds")
    return value, estimate.low, estimate.high


def names(frame: pl.DataFrame) -> list[str]:
    """Return the arms, baselines first."""
    arms = frame["arm"].unique(maintain_order=True).to_list()
    return sorted(arms, key=lambda arm: arm not in set(frame["baseline"]))


def mean_rows(frame: pl.DataFrame, *keys: str) -> pl.DataFrame:
    """Return one row per arm and ``keys``, with the columns that ``style`` draws.

    The interval of the mean gets the names ``low`` and ``high``.
    """
    return (
        frame.drop_nulls("mean")
        .unique(["arm", *keys], keep="first", maintain_order=True)
        .drop("low", "high")
        .rename({"mean_low": "low", "mean_high": "high"})
    )


def covers(frame: pl.DataFrame) -> str:
    """Return what the intervals of ``with_means`` cover, in words."""
    seeds = frame["num_seeds"].drop_nulls()
    if seeds.is_empty() or seeds.max() < MIN_RUNS:  # pyright: ignore[reportOperatorIssue]
        return "95% interval over prompts"
    return "95% interval over seeds" + (f", over prompts below {MIN_RUNS}" if (seeds < MIN_RUNS).any() else "")


def counts(frame: pl.DataFrame) -> str:
    """Describe the sample sizes behind means, and the runs left out, in words.

    The text counts arms, seeds, prompts, and samples.
    """
    shown = frame.drop_nulls("mean")
    prompts, samples = style.span(shown["num_prompts"], "held-out prompt"), style.span(shown["k"], "sample")
    number = style.count(names(shown), "arm")
    text = f"{number}, {seeds(shown)} each, {prompts}, {samples} each"
    return "\n".join(filter(None, (text, _left_out(frame))))


def _left_out(frame: pl.DataFrame) -> str:
    """Return how many evaluated runs are in no mean, and why, in words.

    The text is empty if every run is in a mean.
    """
    import polars as pl

    by_run = frame.drop_nulls("num_prompts").group_by("run_id", "benchmark").agg(pl.col("mean").count())
    ended_early = by_run.filter(mean=0)["run_id"].unique().to_list()
    return f"left out: {style.count(ended_early, 'run')} that ended before others of the arm" if ended_early else ""


def seeds(frame: pl.DataFrame) -> str:
    """Return ``1 seed`` or ``3–5 seeds``."""
    return style.span(frame["num_seeds"].drop_nulls(), "seed")


def is_crowded(frame: pl.DataFrame) -> bool:
    """Return True if there are more arms than colors."""
    return len(names(frame)) > len(style.ARM_COLORS)


def panels_size(frame: pl.DataFrame) -> tuple[float, float]:
    """Return the size of a figure of ``lines``: one column, taller with more panels."""
    width, height = style.SIZE
    rows = -(-len(_compared(frame)) // COLUMNS)
    return (width, MARGIN + rows * PANEL_HEIGHT) if is_crowded(frame) else (width, height)


def rows_size(num_rows: int) -> tuple[float, float]:
    """Return the size of a figure with one row per arm, at least 2 inches high."""
    return style.SIZE[0], max(2.0, MARGIN + num_rows * ROW_HEIGHT)


def lines(ax: Axes, frame: pl.DataFrame, x: str) -> None:
    """Draw the mean of every arm with its band over ``x``.

    Each arm has a color, or its own panel if there are more arms than colors. A panel shows its arm in blue and the
    baseline in gray. Benchmarks differ in line style.
    """
    means = mean_rows(frame, "benchmark", x)
    if not is_crowded(frame):
        for arm, color in zip(names(means), style.ARM_COLORS, strict=False):
            _line(ax, means.filter(arm=arm), x, color, style.shorten(arm))
        style.legend(ax, ncols=3)
        return
    shown = _compared(means)
    found = panels(ax, len(shown))
    for arm, panel in zip(shown, found, strict=True):
        own = means.filter(arm=arm)
        _line(panel, means.filter(arm=own["baseline"][0]), x, style.GREY)
        _line(panel, own, x, style.BLUE)
        # The values of a sweep are on a separate line.
        titles = [style.fold(part, TITLE_LENGTH) for part in re.split(r" (?=\[)", style.shorten(arm))]
        panel.set_title("\n".join(titles), fontsize=6.5, pad=2, linespacing=0.95)
    share_limits(found)


def line_note(frame: pl.DataFrame) -> str:
    """Return the meaning of the lines and bands of ``lines``, in words."""
    benchmarks = frame["benchmark"].drop_nulls().unique(maintain_order=True).to_list()
    styles = zip(benchmarks, ("solid", "dashed", "dotted", "dash-dotted"), strict=False)
    which = "; " + ", ".join(f"{line}: {style.shorten(name)}" for name, line in styles) if len(benchmarks) > 1 else ""
    plain = "; gray: baseline" if is_crowded(frame) else ""
    return f"{counts(frame)}\nband: {covers(frame)}{which}{plain}"


def panels(ax: Axes, count: int) -> list[Axes]:
    """Replace the inside of ``ax`` by ``count`` panels.

    Panels are placed row by row; call ``share_limits`` once they are drawn. ``ax`` keeps its labels and its title.
    """
    import matplotlib as mpl

    hide(ax)
    ax.xaxis.labelpad, ax.yaxis.labelpad = X_PAD, Y_PAD
    height = 1 / -(-count // COLUMNS)
    width = 1 / (COLUMNS - GAP_X)
    found: list[Axes] = []
    with mpl.rc_context(style.RC):
        for i in range(count):
            row, column = divmod(i, COLUMNS)
            bounds = (column * width, 1 - (row + 1) * height, width * (1 - GAP_X), height * (1 - GAP_Y))
            panel = ax.inset_axes(bounds)
            panel.tick_params(labelsize=SMALL, labelleft=column == 0, labelbottom=i + COLUMNS >= count, length=2, pad=2)
            panel.locator_params(axis="y", nbins=4)
            # The last label would touch the first of the next panel.
            panel.locator_params(axis="x", nbins=3, prune="upper")
            found.append(panel)
    return found


def share_limits(panels: Sequence[Axes]) -> None:
    """Give panels the limits that hold the data of all.

    With shared axes, each step of a drawing would ask all panels.
    """
    first = panels[0]
    for panel in panels[1:]:
        first.update_datalim(panel.dataLim.get_points())
    first.autoscale_view()
    for panel in panels[1:]:
        panel.set(xlim=first.get_xlim(), ylim=first.get_ylim())


def hide(ax: Axes) -> None:
    """Hide everything of ``ax`` except its labels and its title."""
    ax.spines[:].set_visible(False)
    ax.grid(visible=False)
    ax.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)


def name_width(order: Sequence[str]) -> float:
    """Return the share of the figure's width that the longest of the names takes."""
    return 0.02 + 0.6 * SMALL / 72 / style.SIZE[0] * max(len(style.shorten(name)) for name in order)


def _compared(frame: pl.DataFrame) -> list[str]:
    """Return the arms that are not baselines, or all arms if there are no others."""
    baselines = set(frame["baseline"])
    return [arm for arm in names(frame) if arm not in baselines] or names(frame)


def _line(ax: Axes, means: pl.DataFrame, x: str, color: str, name: str | None = None) -> None:
    for i, (benchmark, line) in enumerate(
        zip(means.partition_by("benchmark", maintain_order=True), style.LINE_STYLES, strict=False)
    ):
        style.band(ax, benchmark.sort(x), x, "mean", color=color, linestyle=line, label=None if i else name)
