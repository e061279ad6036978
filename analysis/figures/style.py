"""Define the shared look of all figures: palette, sizes, and common marks.

The palette is color-blind-safe, and the sizes fit one column of a page. Runs are pooled in one way everywhere: a mark
is the mean over runs, and its interval is the mean of the ends of the runs' own 95% intervals, the interval of a
typical run. Single runs are thin lines or small open dots.
"""

from __future__ import annotations

import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from entrace.analysis.figures import marks
from entrace.analysis.trace.plain import plain

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

# Palette of Okabe and Ito, which readers with any color vision can tell apart.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
INK, GREY = "#222222", "#6b6b6b"
SIGN_COLORS = {"negative": VERMILLION, "positive": BLUE}
SIGN_MARKERS = {"negative": "s", "positive": "o"}
CATEGORY_COLORS = {
    "formal_reasoning": BLUE,
    "logical_structuring": ORANGE,
    "metacognitive": PURPLE,
    "semantic_support": GREEN,
    "special": GREY,
}
ARM_COLORS = (INK, BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
STAGE_COLORS = {"rising": ORANGE, "plateau": BLUE}
STAGE_MARKERS = {"rising": "o", "plateau": "s"}
# Horizontal offset that separates the error bars of the two stages.
STAGE_SHIFTS = {"rising": -0.07, "plateau": 0.07}
LINE_STYLES = ("-", "--", ":", "-.")
# Inches, and the characters of a note that fit the width.
SIZE = (4.4, 3.4)
NOTE_LENGTH = 76
NAME_LENGTH = 40
# Characters of the labels in one row of a legend.
LEGEND_CHARACTERS = 54
WORD_LENGTH = 14
STEP = "training step"
# Heights of a legend letter between the axis and a legend below the axis label, and per further line of tick labels.
LEGEND_PAD, LEGEND_LINE = 4.4, 1.25
BAND = 0.18
# White edges separate markers that lie upon each other.
MARKER_EDGE: dict[str, Any] = {"markeredgecolor": "w", "markeredgewidth": 0.75}

# Any: matplotlib's stubs require literal types for the keys.
RC: Any = {
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.labelsize": 9,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,
    # Unsalted ids in vector files are random.
    "svg.hashsalt": "entrace",
}


@contextmanager
def canvas(size: tuple[float, float]) -> Iterator[Figure]:
    """Yield a new figure without pyplot; ``size`` in inches.

    Save the figure inside the block, under the settings that hold there.
    """
    with mpl.rc_context(RC), warnings.catch_warnings():
        # Words and names may hold characters that the font lacks; each becomes a box.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        yield Figure(figsize=size, dpi=mpl.rcParams["savefig.dpi"])


def new_axes(size: tuple[float, float] = SIZE) -> Axes:
    """Return the Axes of a new figure; ``size`` in inches."""
    import matplotlib.pyplot as plt

    with mpl.rc_context(RC):
        _, ax = plt.subplots(figsize=size)
    return ax


def label(ax: Axes, x: str, y: str, note: str) -> None:
    """Set the axis labels, and the ``note`` on n and intervals above the Axes."""
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.set_title("\n".join(_wrap(note)), loc="left", fontsize=7, color=GREY)
    ax.spines["top"].set_visible(False)
    if x == STEP:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _wrap(note: str) -> list[str]:
    """Break ``note`` into lines that fit: at semicolons, else between words."""
    lines: list[str] = []
    for line in note.split("\n"):
        parts = line.split("; ") if len(line) > NOTE_LENGTH else [line]
        for i, part in enumerate(parts):
            part += ";" * (i + 1 < len(parts))
            if i and len(lines[-1]) + len(part) < NOTE_LENGTH:
                lines[-1] += f" {part}"
            else:
                lines += textwrap.wrap(part, NOTE_LENGTH)
    return lines


def start_at_zero(ax: Axes) -> None:
    """Start the vertical axis at 0 and leave room on top for the stage boundary."""
    ax.set_ylim(0, ax.get_ylim()[1] * 1.12)


def leave_room_on_top(ax: Axes) -> None:
    """Extend the vertical axis by an eighth for the names of the stages."""
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + (high - low) / 8)


def show_all_shares(ax: Axes) -> None:
    """Scale the vertical axis to [0, 1], with room for whole marks at both ends."""
    ax.set_ylim(-0.03, 1.04)
    ax.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])


def legend(ax: Axes, *, tick_lines: int = 1, **options: Any) -> None:
    """Draw the legend below the axis label, where it cannot cover data.

    Args:
        ax: Axes whose labeled marks are listed; without any, there is no legend.
        tick_lines: Lines of the tick labels between the axis and its label.
        **options: Passed to ``Axes.legend``.
    """
    labels = ax.get_legend_handles_labels()[1]
    if "handles" not in options and not labels:
        return
    defaults = {
        "frameon": False,
        "fontsize": 8,
        "handlelength": 1.8,
        "columnspacing": 1.2,
        "loc": "upper center",
        "bbox_to_anchor": (0.5, 0),
        "borderaxespad": LEGEND_PAD + LEGEND_LINE * (tick_lines - 1),
    }
    chosen = defaults | options
    longest = max(map(len, labels), default=0)
    if longest * chosen.get("ncols", 1) > LEGEND_CHARACTERS:
        # Wider than the figure, the legend would squeeze the axes.
        chosen["ncols"] = max(1, LEGEND_CHARACTERS // longest)
    ax.legend(**chosen)


def pool(frame: pl.DataFrame, keys: Sequence[str], *values: str, ends: Sequence[str] = ("low", "high")) -> pl.DataFrame:
    """Return one row per ``keys`` with means over runs.

    Means are of ``values`` and of the ``ends`` of their intervals. An interval is null where a run has none. Counts
    (``num_*``) are sums over runs, and other columns, such as the stage, are kept where all runs agree.
    """
    import polars as pl

    means = [pl.col(value).mean() for value in values]
    limits = [pl.when(pl.col(end).null_count() == 0).then(pl.col(end).mean()).alias(end) for end in ends]
    others = [pl.col(name) for name in frame.columns if name not in {*keys, *values, *ends}]
    kept = [
        column.sum() if name.startswith("num_") else pl.when(column.n_unique() == 1).then(column.first()).alias(name)
        for column in others
        for name in [column.meta.output_name()]
    ]
    return frame.drop_nulls(values[0]).group_by(keys, maintain_order=True).agg(*means, *limits, *kept).sort(keys)


def line(ax: Axes, frame: pl.DataFrame, x: str, y: str, *, units: str | None = None, **options: Any) -> None:
    """Draw ``y`` over ``x`` as a line, or as one line per value of ``units``.

    The axes keep their labels.
    """
    data = frame.fill_nan(None).drop_nulls([x, y]).sort(*([units] if units else []), x, y)
    for part in data.partition_by(units, maintain_order=True) if units else [data]:
        ax.plot(part[x], part[y], **MARKER_EDGE, **options)
    marks.remember(ax, frame, x, y)


def band(ax: Axes, frame: pl.DataFrame, x: str, y: str, **options: Any) -> None:
    """Draw ``y`` over ``x`` with the band between columns ``low`` and ``high``.

    The widest twentieth of the bands over steps may reach beyond the Axes: a step with two prompts would flatten all
    others.
    """
    line(ax, frame, x, y, **options)
    low, high = (frame[name].cast(float).fill_null(float("nan")) for name in ("low", "high"))
    limits = ax.dataLim.frozen()
    ax.fill_between(frame[x], low, high, color=options["color"], alpha=BAND, linewidth=0)
    known = frame.drop_nulls("low")
    if x == "step" and not known.is_empty():
        ends = [np.quantile(known[end], part, method="nearest") for end, part in (("low", 0.05), ("high", 0.95))]
        ax.dataLim.set(limits)
        ax.update_datalim([(known[x][0], end) for end in ends])


def curve(ax: Axes, frame: pl.DataFrame, x: str, y: str, **options: Any) -> None:
    """Draw the mean over runs of ``y`` with its band; see ``pool``.

    If there are several runs, each is a thin line.
    """
    runs(ax, frame, x, y, color=options["color"])
    band(ax, pool(frame, [x], y), x, y, **options)


def runs(ax: Axes, frame: pl.DataFrame, x: str, y: str, color: str) -> None:
    """Draw ``y`` over ``x`` as a thin line per run, if there are several."""
    if frame["run_id"].n_unique() > 1:
        shown = frame.drop_nulls(y)
        line(ax, shown, x, y, units="run_id", color=color, linewidth=0.5, alpha=0.45, zorder=1.5)


def by_run(frame: pl.DataFrame) -> list[tuple[str, pl.DataFrame]]:
    """Return the name and the rows of each run."""
    parts = frame.partition_by("run_id", maintain_order=True, as_dict=True)
    return [(shorten(str(run)), part) for (run,), part in parts.items()]


def by_series(frame: pl.DataFrame) -> Iterator[tuple[str, pl.DataFrame, str]]:
    """Yield label, rows, and line style of every series of interventions.

    The label of a single series is empty.
    """
    parts = frame.partition_by("series", maintain_order=True)
    for part, style in zip(parts, cycle(LINE_STYLES), strict=False):
        name = part["series"][0]
        yield f", {shorten(str(name))}" if len(parts) > 1 and name is not None else "", part, style


def runs_note(frame: pl.DataFrame, marks: str | None = "thin lines") -> str:
    """Return a line on how several runs were pooled; empty for one run.

    ``marks`` names the marks of single runs; None if there are none. Intervals are columns ``low``, or with the suffix
    ``_low``.
    """
    number = frame["run_id"].n_unique()
    has_interval = any(frame[name].count() for name in frame.columns if name == "low" or name.endswith("_low"))
    note = f"\nmean of {number} runs{' and of their intervals' * has_interval}"
    return (note if marks is None else f"{note}; {marks}: runs") if number > 1 else ""


def errors(frame: pl.DataFrame, y: str, low: str = "low", high: str = "high") -> list[pl.Series]:
    """Return the distances of ``y`` to both ends of its interval, for error bars.

    The distance is 0 where an interval is unknown.
    """
    return [(frame[y] - frame[low]).fill_null(0).clip(0), (frame[high] - frame[y]).fill_null(0).clip(0)]


def points(
    ax: Axes, frame: pl.DataFrame, place: str, y: str, *, shift: float = 0, is_horizontal: bool = False, **options: Any
) -> None:
    """Draw the mean over runs with its interval at every ``place``.

    If there are several runs, each is a small open dot.

    Args:
        ax: Where to draw.
        frame: Rows of one or several runs with ``y``, ``low``, and ``high``.
        place: Column of positions on the other axis.
        y: Column of values.
        shift: Added to ``place``; it separates series.
        is_horizontal: Draw the values along the horizontal axis.
        **options: Passed to ``Axes.errorbar``.
    """
    pooled = pool(frame, [place], y)
    at, values = pooled[place] + shift, pooled[y]
    bars: dict[str, Any] = {"xerr" if is_horizontal else "yerr": errors(pooled, y)}
    looks = {"markersize": 4, "elinewidth": 1.1, "capsize": 2} | options
    ax.errorbar(*((values, at) if is_horizontal else (at, values)), **bars, **looks)
    _remember_places(ax, pooled, place, y, shift, is_horizontal=is_horizontal)
    if frame["run_id"].n_unique() > 1:
        x, height = frame[place] + shift, frame[y]
        seed_dots(ax, *((height, x) if is_horizontal else (x, height)), options["color"])
        _remember_places(ax, frame, place, y, shift, is_horizontal=is_horizontal)


def _remember_places(
    ax: Axes, frame: pl.DataFrame, place: str, y: str, shift: float, *, is_horizontal: bool = False
) -> None:
    if is_horizontal:
        marks.remember(ax, frame, y, place, at_y=frame[place] + shift)
    else:
        marks.remember(ax, frame, place, y, at_x=frame[place] + shift)


def points_by_stage(ax: Axes, frame: pl.DataFrame, x: str, y: str, names: dict[str, str]) -> None:
    """Draw ``points`` of ``y`` over whole numbers ``x``, one line per stage.

    ``names`` holds the legend entry of each stage.
    """
    for stage, color in STAGE_COLORS.items():
        part = frame.filter(stage=stage)
        if not part.is_empty():
            shift = STAGE_SHIFTS[stage]
            points(ax, part, x, y, shift=shift, color=color, marker=STAGE_MARKERS[stage], label=names[stage])


def points_by_sign(ax: Axes, frame: pl.DataFrame, place: str, x: str, shift: float = 0.14) -> None:
    """Draw ``points`` of ``x`` in every row ``place``, one series per sign.

    The two signs are ``shift`` from the middle of the row.
    """
    for sign, color in SIGN_COLORS.items():
        part = frame.filter(sample_sign=sign)
        look = {"color": color, "marker": SIGN_MARKERS[sign], "linestyle": "none", "label": f"{sign} samples"}
        if not part.is_empty():
            own = shift if sign == "positive" else -shift
            points(ax, part, place, x, shift=own, is_horizontal=True, **look)


def bars(
    ax: Axes,
    frame: pl.DataFrame,
    place: str,
    y: str,
    *,
    shift: float = 0,
    width: float,
    color: str,
    label: str,
    alpha: float = 1,
) -> None:
    """Draw the mean over runs as a bar with its interval at every ``place``.

    Places are whole numbers; see ``points``.
    """
    pooled = pool(frame, [place], y)
    ax.bar(
        pooled[place] + shift,
        pooled[y],
        yerr=errors(pooled, y),
        width=width,
        color=color,
        alpha=alpha,
        error_kw={"elinewidth": 1.1, "capsize": 2, "ecolor": INK},
        label=label,
    )
    _remember_places(ax, pooled, place, y, shift)
    if frame["run_id"].n_unique() > 1:
        seed_dots(ax, frame[place] + shift, frame[y], INK)
        _remember_places(ax, frame, place, y, shift)


def seed_dots(
    ax: Axes, x: Sequence[float] | pl.Series, y: Sequence[float] | pl.Series, color: str, **options: Any
) -> None:
    """Draw single runs as small open dots that do not hide a mean below them."""
    look = {"markerfacecolor": "white", "markeredgecolor": color, "markeredgewidth": 0.6, "linestyle": "none"}
    ax.plot(x, y, marker="o", markersize=2.4, **look, **options)


def word_bars(ax: Axes, frame: pl.DataFrame, place: str, words: str, share: str) -> None:
    """Draw ``share`` in percent as a horizontal bar per word.

    Color shows the function of the word. The first place is on top.
    """
    # Loading seaborn takes twice as long as loading matplotlib, and most figures do without.
    import seaborn as sns

    percent = frame.with_columns(100 * frame[name] for name in (share, "low", "high"))
    percent = percent.with_columns(function=percent["category"].str.replace_all("_", " "))
    colors = {name.replace("_", " "): color for name, color in CATEGORY_COLORS.items()}
    functions = [name for name in colors if name in set(percent["function"])]
    sns.barplot(
        percent.select(place, share, "function").to_pandas(),
        x=share,
        y=place,
        hue="function",
        hue_order=functions,
        palette=colors,
        orient="h",
        dodge=False,
        native_scale=True,
        width=0.7,
        saturation=1,
        errorbar=None,
        ax=ax,
    )
    ax.errorbar(percent[share], percent[place], xerr=errors(percent, share), fmt="none", ecolor=INK, elinewidth=0.9)
    ax.set_yticks(frame[place], [_short(word) for word in frame[words]], fontsize=7.5)
    marks.remember(ax, percent, share, place)
    places = frame[place].to_numpy()
    ax.set_ylim(float(places.max()) + 0.6, float(places.min()) - 0.6)
    ax.grid(visible=False, axis="y")


def shorten(name: str) -> str:
    """Return ``name``, cut in the middle if long, and safe for matplotlib.

    Nothing in the result is interpreted as markup.
    """
    # A label that begins with an underscore stays out of the legend.
    return f"{' ' * name.startswith('_')}{plain(name, NAME_LENGTH)}".replace("$", r"\$")


def fold(name: str, width: int) -> str:
    """Return ``name`` on lines of at most ``width`` characters.

    Lines break after punctuation where possible.
    """
    # An escaped character stays whole.
    symbol = r"(?:\\?.)"
    return "\n".join(re.findall(rf"{symbol}{{1,{width}}}(?:(?<=[_,+-])|$)|{symbol}{{{width}}}", name))


def _short(word: str) -> str:
    """Return ``word`` on one line, cut if long, and safe for matplotlib."""
    word = plain(" ".join(word.split()))
    word = word if len(word) <= WORD_LENGTH else f"{word[: WORD_LENGTH - 1]}…"
    return word.replace("$", r"\$")


def late_stage(frame: pl.DataFrame) -> tuple[pl.DataFrame, str]:
    """Return the rows of the late stage, and its name.

    The late stage is the plateau, or the rising stage if no run has a plateau.
    """
    stage = "plateau" if (frame["stage"] == "plateau").any() else "rising"
    return frame.filter(frame["stage"] == stage), stage


def mark_boundary(ax: Axes, frame: pl.DataFrame) -> None:
    """Mark the stage boundary of every run with its 95% interval.

    One run has a line and a shaded interval. Several have a thin line each and their intervals as bars on top, because
    shaded intervals would cover each other.
    """
    columns = ("boundary_step", "boundary_low", "boundary_high")
    rows = [part.select(columns).row(0) for _, part in by_run(frame)]
    found = [row for row in rows if row[0] is not None]
    top = {"transform": ax.get_xaxis_transform(), "color": GREY}
    words = {**top, "va": "top", "fontsize": 7}
    if len(found) < len(rows):
        missing = f" in {len(rows) - len(found)} of {len(rows)} runs" if len(rows) > 1 else ""
        place = {"transform": ax.transAxes, "color": GREY, "fontsize": 7}
        ax.text(0.01, 1.0, f"no stage boundary found{missing}", ha="left", va="top", **place)
    if not found:
        return
    if len(rows) == 1:
        boundary, low, high = found[0]
        ax.axvspan(low, high, color=GREY, alpha=0.2, linewidth=0, zorder=0.5)
        ax.axvline(boundary, color=GREY, linewidth=0.9, zorder=0.6)
    else:
        step = min(0.022, 0.1 / len(found))
        for i, (boundary, low, high) in enumerate(sorted(found)):
            height = 0.99 - i * step
            ax.axvline(boundary, color=GREY, linewidth=0.7, linestyle=(0, (2, 2)), zorder=0.6)
            ax.hlines(height, low, high, linewidth=1, **top)
            ax.plot([boundary], [height], marker="o", markersize=2.5, linestyle="none", **top)
    if len(found) == len(rows):
        below = 1.0 if len(rows) == 1 else 0.98 - len(found) * min(0.022, 0.1 / len(found))
        ax.text(min(row[0] for row in found), below, "rising ", ha="right", **words)
        ax.text(max(row[0] for row in found), below, " plateau", ha="left", **words)


def span(values: Sequence[int | float] | pl.Series, noun: str = "") -> str:
    """Return a range such as ``7`` or ``7–12``; with a noun, ``7–12 prompts``.

    The noun is singular if the largest value is 1, as in ``1 prompt``.
    """
    low, high = min(values), max(values)
    text = f"{low:,}" if low == high else f"{low:,}–{high:,}"
    return f"{text} {noun}{'s' * (high != 1)}" if noun else text


def count(items: Sequence[object], noun: str) -> str:
    """Return ``1 run`` or ``3 runs``."""
    return f"{len(items)} {noun}{'s' * (len(items) != 1)}"
