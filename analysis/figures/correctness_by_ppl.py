"""Draw accuracy over perplexity within the group of a prompt (claim I1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "The responses to one prompt are ranked by perplexity and cut into equal parts. Only groups with correct and "
    "incorrect responses count, so easy and hard prompts cannot make the difference. Perplexity is compared at equal "
    "length, because perplexity depends on length for correct and incorrect responses alike. A line that falls to the "
    "right says that responses with low perplexity are more often correct."
)


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draw accuracy over the perplexity rank within the group, one line per stage."""
    names = {
        stage: f"{stage} ({frame.filter(stage=stage)['num_responses'].sum():,} responses)"
        for stage in style.STAGE_COLORS
    }
    style.points_by_stage(ax, frame, "ppl_bin", "accuracy", names)
    bins = sorted(set(frame["ppl_bin"]))
    ends = {bins[0]: f"{bins[0]}\nlowest", bins[-1]: f"{bins[-1]}\nhighest"}
    ax.set_xticks(bins, [ends.get(number, str(number)) for number in bins])
    style.show_all_shares(ax)
    style.label(
        ax,
        "perplexity within the prompt's group",
        "accuracy",
        f"{style.span(frame['num_prompts'], 'prompt')} per run; bars: 95% interval over steps and prompts"
        + style.runs_note(frame, "open dots"),
    )
    style.legend(ax, tick_lines=2, ncols=2)
    return ax
