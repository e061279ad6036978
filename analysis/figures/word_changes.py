"""Words that became more and less frequent in the rising stage (claim S3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Share of each word in the last steps of the rising stage minus its share in the run's first steps, for the words "
    "that changed most. They were chosen for their change, so that it is overstated: read which kinds of words rise "
    "and fall, not how far a single one goes."
)
ROWS_A_SIDE = 8


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draws one bar a word, the largest rise on top, for the first run in ``frame``."""
    name, run, _ = style.by_run(frame)[0]
    shown = run.filter((run["rank_rise"] <= ROWS_A_SIDE) | (run["rank_fall"] <= ROWS_A_SIDE)).with_row_index("place")
    style.word_bars(ax, shown, "place", "word", "change")
    ax.axvline(0, color=style.INK, linewidth=0.7)
    runs = frame["run_id"].n_unique()
    style.label(
        ax,
        "change in share of tokens, rising stage (percentage points)",
        "",
        (f"{name}, the first of {runs} runs\n" if runs > 1 else "")
        + f"{run['num_tokens_start'][0]:,} and {run['num_tokens_end'][0]:,} tokens; bars: 95 % interval over steps",
    )
    style.legend(ax, loc="best")
    return ax
