"""Correctness by perplexity within the group of one prompt (claim I1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "The responses to one prompt are ranked by perplexity and cut into equal parts. Only groups that hold right and "
    "wrong responses count, so that easy and hard prompts cannot make the difference. Perplexity is taken at equal "
    "length, because longer responses have other perplexities whether they are right or not. A line that falls to the "
    "right says that what the policy finds likely is more often right."
)


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draws accuracy over the perplexity rank within the group, one line a stage."""
    style.points_by_stage(
        ax, frame, "ppl_bin", "accuracy", lambda stage, part: f"{stage} ({part['num_responses'].sum():,} responses)"
    )
    bins = sorted(set(frame["ppl_bin"]))
    ends = {bins[0]: "lowest", bins[-1]: "highest"}
    ax.set_xticks(bins, [ends.get(number, str(number)) for number in bins])
    style.label(
        ax,
        "perplexity within the prompt's group",
        "accuracy",
        f"{style.span(frame['num_prompts'])} prompts; bars: 95 % interval over steps and prompts",
    )
    ax.set_ylim(0, 1)
    style.legend(ax)
    return ax
