"""Draw the most frequent words among high-entropy tokens (claims S6, T3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "The words that are most frequent among the 20% of tokens with the highest entropy, colored by function. The "
    "number beside a bar is the share of the word's own occurrences that have high entropy: a frequent word can be on "
    "the list with a small number."
)


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draw one bar with its interval per word, for the first run in the late stage."""
    shown, stage = style.late_stage(frame)
    name, run = style.by_run(shown)[0]
    high = run["high"].fill_null(run["share"])
    style.word_bars(ax, run, "rank", "text", "share")
    for rank, end, rate in zip(run["rank"], high, run["high_rate"], strict=True):
        ax.annotate(
            f"{rate:.0%}",
            (100 * end, rank),
            (3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            color=style.INK,
        )
    ax.margins(x=0.12)
    ax.set_xlim(left=0)
    runs = frame["run_id"].n_unique()
    style.label(
        ax,
        "share of high-entropy tokens (%)",
        "",
        f"{stage}{f' of {name}, the first of {runs} runs' if runs > 1 else ''}; "
        f"{run['num_high'].sum():,} high-entropy tokens ({run['share'].sum():.0%} of all)\n"
        "number: share of the word's own occurrences; "
        f"lines: 95% interval over {style.count(range(run['num_steps'][0]), 'step')}",
    )
    style.legend(ax, ncols=3)
    return ax
