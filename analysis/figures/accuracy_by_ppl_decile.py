"""Accuracy by perplexity over all prompts together (claim I1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "All sampled responses of a stage, ranked by perplexity and cut into ten equal parts. This pools easy and hard "
    "prompts, unlike correctness_by_ppl: easy prompts have responses that are both likely and right, so that a line "
    "that falls says nothing yet about responses to the same prompt."
)


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draws accuracy over the decile of perplexity, one line a stage."""
    style.points_by_stage(ax, frame, "ppl_bin", "accuracy", lambda stage, part: f"{stage} ({_edges(part)})")
    bins = sorted(set(frame["ppl_bin"]))
    ends = {bins[0]: f"{bins[0]}\nlowest", bins[-1]: f"{bins[-1]}\nhighest"}
    ax.set_xticks(bins, [ends.get(number, str(number)) for number in bins])
    style.label(
        ax,
        "decile of perplexity, all prompts together",
        "accuracy",
        f"{frame['num_responses'].sum():,} responses, {style.span(frame['num_prompts'])} prompts a decile;\n"
        "bars: 95 % interval over steps and prompts",
    )
    style.legend_above_shares(ax)
    return ax


def _edges(part: pl.DataFrame) -> str:
    return f"lowest: up to {part['ppl_high'][0]:.2f}, highest: from {part['ppl_low'][-1]:.2f}"
