"""Draw words that became more or less frequent in the rising stage (claim S3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Share of each word in the last steps of the rising stage minus its share in the first steps of the run, for the "
    "words that changed most. Selecting words by their change overstates it: read which kinds of words rise and fall, "
    "not how far one word goes."
)
# Rises, and as many falls.
ROWS_PER_SIDE = 8


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draw one bar per word for the first run, with the largest rise on top."""
    name, run = style.by_run(frame)[0]
    is_shown = (run["rank_rise"] <= ROWS_PER_SIDE) | (run["rank_fall"] <= ROWS_PER_SIDE)
    shown = run.filter(is_shown).with_row_index("place")
    style.word_bars(ax, shown, "place", "word", "change")
    ax.axvline(0, color=style.INK, linewidth=0.7)
    runs = frame["run_id"].n_unique()
    style.label(
        ax,
        "change in share of tokens (percentage points)",
        "",
        (f"{name}, the first of {runs} runs\n" if runs > 1 else "")
        + f"{run['num_tokens_start'][0]:,} and {run['num_tokens_end'][0]:,} tokens; lines: 95% interval over steps",
    )
    style.legend(ax, ncols=3)
    return ax
