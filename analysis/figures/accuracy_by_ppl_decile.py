"""Draw accuracy over perplexity across all prompts (claim I1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "All sampled responses of a stage, ranked by perplexity and cut into ten equal parts. Unlike correctness_by_ppl, "
    "this pools easy and hard prompts: easy prompts have responses that are both likely and right, so a falling line "
    "does not yet say anything about responses to the same prompt."
)


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draw accuracy over the decile of perplexity, one line per stage."""
    names = {stage: f"{stage} ({_edges(frame.filter(stage=stage))})" for stage in style.STAGE_COLORS}
    style.points_by_stage(ax, frame, "ppl_bin", "accuracy", names)
    bins = sorted(set(frame["ppl_bin"]))
    ends = {bins[0]: f"{bins[0]}\nlowest", bins[-1]: f"{bins[-1]}\nhighest"}
    ax.set_xticks(bins, [ends.get(number, str(number)) for number in bins])
    style.show_all_shares(ax)
    style.label(
        ax,
        "decile of perplexity, all prompts together",
        "accuracy",
        f"{frame['num_responses'].sum():,} responses, {style.span(frame['num_prompts'], 'prompt')} per decile and "
        f"run;\nbars: 95% interval over steps and prompts{style.runs_note(frame, 'open dots')}",
    )
    style.legend(ax, tick_lines=2)
    return ax


def _edges(part: pl.DataFrame) -> str:
    """Describe the upper edge of the lowest bin and the lower edge of the highest.

    The edges are extremes over all runs of a stage. Without rows, the text is empty.
    """
    if part.is_empty():
        return ""
    lowest, highest = (part.filter(part["ppl_bin"] == part["ppl_bin"].unique().sort()[i]) for i in (0, -1))
    return f"lowest: up to {lowest['ppl_high'].max():.2f}, highest: from {highest['ppl_low'].min():.2f}"
