"""One look for all figures: colours that colour-blind readers tell apart, sizes for one column of a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.ticker import MaxNLocator

from entrace.analysis.trace.plain import plain

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

# Okabe and Ito's palette.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
INK, GREY = "#222222", "#777777"
SIGN_COLORS = {"negative": VERMILLION, "positive": BLUE}
CATEGORY_COLORS = {
    "formal_reasoning": BLUE,
    "logical_structuring": ORANGE,
    "metacognitive": PURPLE,
    "semantic_support": GREEN,
    "special": GREY,
}
ARM_COLORS = (INK, BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
# Colour, marker and a shift to the side that keeps error bars apart.
STAGE_POINTS = {"rising": (ORANGE, "o", -0.07), "plateau": (BLUE, "s", 0.07)}
RUN_STYLES = ("-", "--", ":", "-.")
SIZE = (5.0, 3.2)
NOTE_LENGTH = 78
NAME_LENGTH = 40
WORD_LENGTH = 14
STEP = "training step"

# Any, because matplotlib's stubs want its own literal types for the keys.
RC: Any = {
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.labelsize": 9,
    "axes.titlesize": 8,
    "axes.spines.top": False,
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
    "savefig.dpi": 180,
    "pdf.fonttype": 42,
    # Ids in vector files are random unless salted.
    "svg.hashsalt": "entrace",
}


def new_axes(size: tuple[float, float] = SIZE) -> Axes:
    """Returns the Axes of a new figure of column width; ``size`` in inches."""
    import matplotlib.pyplot as plt

    with mpl.rc_context(RC):
        _, ax = plt.subplots(figsize=size)
    return ax


def label(ax: Axes, x: str, y: str, note: str) -> None:
    """Sets axis labels, and the ``note`` on n and interval above the Axes."""
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    # A line that would run out of the column breaks at its last semicolon.
    lines = [line if len(line) <= NOTE_LENGTH else ";\n".join(line.rsplit("; ", 1)) for line in note.split("\n")]
    ax.set_title("\n".join(lines), loc="left", fontsize=7.5, color=GREY)
    ax.spines[["top"]].set_visible(False)
    if x == STEP:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def start_at_zero(ax: Axes) -> None:
    """Lets the vertical axis begin at 0, with room above the data for a legend."""
    ax.set_ylim(0, ax.get_ylim()[1] * 1.35)


def legend(ax: Axes, **options: Any) -> None:
    """Draws a frameless legend."""
    ax.legend(frameon=False, fontsize=8, handlelength=1.6, **options)


def legend_above_shares(ax: Axes, **options: Any) -> None:
    """Scales the axis to shares from 0 to 1, and draws the legend above the highest that there can be."""
    ax.set_ylim(0, 1.25)
    ax.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    legend(ax, loc="upper left", **options)


def band(ax: Axes, frame: pl.DataFrame, x: str, y: str, **line: Any) -> None:
    """Draw ``y`` over ``x`` with the band between columns ``low`` and ``high``.

    The widest twentieth of the steps may reach beyond the axes: a step of two prompts would flatten all others.
    """
    ax.plot(frame[x], frame[y], **line)
    low, high = (frame[name].cast(float).fill_null(float("nan")) for name in ("low", "high"))
    limits = ax.dataLim.frozen()
    ax.fill_between(frame[x], low, high, color=line["color"], alpha=0.16, linewidth=0)
    known = frame.drop_nulls("low")
    if x == "step" and not known.is_empty():
        ends = [np.quantile(known[end], part, method="nearest") for end, part in (("low", 0.05), ("high", 0.95))]
        ax.dataLim.set(limits)
        ax.update_datalim([(known[x][0], end) for end in ends])


def by_run(frame: pl.DataFrame) -> list[tuple[str, pl.DataFrame, str]]:
    """Name of each run, its rows, and a line style of its own."""
    parts = frame.partition_by("run_id", maintain_order=True, as_dict=True)
    lines = cycle(RUN_STYLES)
    return [(shorten(str(run)), part, next(lines)) for (run,), part in parts.items()]


def by_series(frame: pl.DataFrame) -> list[tuple[str, pl.DataFrame, str]]:
    """Return ``by_run``, with a line of its own for every series of interventions of a run."""
    import polars as pl

    if frame["series"].n_unique() > 1:
        frame = frame.with_columns(run_id=pl.concat_str("run_id", "series", separator=", ", ignore_nulls=True))
    return by_run(frame)


def errors(frame: pl.DataFrame, y: str, low: str = "low", high: str = "high") -> list[pl.Series]:
    """Distances of ``y`` to both ends of its interval, 0 where there is none, as error bars want them."""
    return [(frame[y] - frame[low]).fill_null(0), (frame[high] - frame[y]).fill_null(0)]


def points_by_stage(ax: Axes, frame: pl.DataFrame, x: str, y: str, name: Callable[[str, pl.DataFrame], str]) -> None:
    """Draws ``y`` over the whole numbers ``x``, a line with error bars for each stage of each run.

    ``name`` makes the legend's entry from the stage and its rows.
    """
    for i, (_, run, line) in enumerate(by_run(frame)):
        for stage, (color, marker, offset) in STAGE_POINTS.items():
            part = run.filter(stage=stage)
            if part.is_empty():
                continue
            ax.errorbar(
                part[x] + offset,
                part[y],
                yerr=errors(part, y),
                color=color,
                marker=marker,
                markersize=4,
                linestyle=line,
                elinewidth=1,
                capsize=2,
                label=name(stage, part) if i == 0 else None,
            )


def word_bars(ax: Axes, frame: pl.DataFrame, place: str, words: str, share: str) -> None:
    """Draws ``share`` in percent, one horizontal bar a word, coloured by its function, first place on top."""
    percent = frame.with_columns(100 * frame[name] for name in (share, "low", "high"))
    for category, color in CATEGORY_COLORS.items():
        part = percent.filter(category=category)
        if part.is_empty():
            continue
        ax.barh(
            part[place],
            part[share],
            xerr=errors(part, share),
            color=color,
            height=0.7,
            error_kw={"elinewidth": 1, "ecolor": INK},
            label=category.replace("_", " "),
        )
    ax.set_yticks(frame[place], [_short(word) for word in frame[words]], fontsize=7.5)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")


def shorten(name: str) -> str:
    """``name`` with its middle left out if it is long, and with nothing in it that matplotlib would act on."""
    # A label that begins with an underscore stays out of the legend.
    return f"{' ' * name.startswith('_')}{plain(name, NAME_LENGTH)}".replace("$", r"\$")


def _short(word: str) -> str:
    """``word`` on one line, cut, and with nothing in it that matplotlib would typeset."""
    word = plain(" ".join(word.split()))
    word = word if len(word) <= WORD_LENGTH else f"{word[: WORD_LENGTH - 1]}…"
    return word.replace("$", r"\$")


def late_stage(frame: pl.DataFrame) -> tuple[pl.DataFrame, str]:
    """Rows of the plateau, where training is slow; of the rising stage if no run has a plateau. And which it is."""
    stage = "plateau" if (frame["stage"] == "plateau").any() else "rising"
    return frame.filter(frame["stage"] == stage), stage


def mark_boundary(ax: Axes, frame: pl.DataFrame) -> None:
    """Shades the 95 % interval of the stage boundary of every run in ``frame`` and draws the boundary itself."""
    for i, (_, part, style) in enumerate(by_run(frame)):
        boundary, low, high = part.select("boundary_step", "boundary_low", "boundary_high").row(0)
        if boundary is None:
            text = "no stage boundary found"
            ax.text(0.01, 1.0, text, transform=ax.transAxes, ha="left", va="top", color=GREY, fontsize=7.5)
            continue
        ax.axvspan(low, high, color=GREY, alpha=0.2, linewidth=0, zorder=0.5)
        ax.axvline(boundary, color=GREY, linestyle=style, linewidth=0.9, zorder=0.6)
        # Words of several runs would lie over each other.
        words = () if i else (("rising ", boundary, "right"), (" plateau", boundary, "left"))
        for text, side, align in words:
            ax.text(side, 1.0, text, transform=ax.get_xaxis_transform(), ha=align, va="top", color=GREY, fontsize=7.5)


def span(values: Sequence[int | float] | pl.Series) -> str:
    """``7`` or ``7-12``: the range of a count that varies."""
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def count(items: Sequence[object], noun: str) -> str:
    """``1 run`` or ``3 runs``."""
    return f"{len(items)} {noun}{'s' * (len(items) != 1)}"
