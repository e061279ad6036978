"""Accuracy by perplexity over all prompts together (claim I1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "All sampled responses of a stage, ranked by perplexity and cut into ten equal parts. This pools easy and hard "
    "prompts, unlike correctness_by_ppl: easy prompts have responses that are both likely and right, so that a line "
    "that falls says nothing yet about responses to the same prompt."
)
STAGES = {"rising": (style.ORANGE, "o", -0.08), "plateau": (style.BLUE, "s", 0.08)}


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draws accuracy over the decile of perplexity, one line a stage."""
    for i, (_, run, line) in enumerate(style.by_run(frame)):
        for stage, (color, marker, offset) in STAGES.items():
            part = run.filter(stage=stage)
            if part.is_empty():
                continue
            errors = [part["accuracy"] - part["low"], part["high"] - part["accuracy"]]
            ax.errorbar(
                part["ppl_bin"] + offset,
                part["accuracy"],
                yerr=[error.fill_null(0) for error in errors],
                color=color,
                marker=marker,
                markersize=4,
                linestyle=line,
                elinewidth=1,
                capsize=2,
                label=f"{stage} ({_edges(part)})" if i == 0 else None,
            )
    bins = sorted(set(frame["ppl_bin"]))
    ends = {bins[0]: f"{bins[0]}\nlowest", bins[-1]: f"{bins[-1]}\nhighest"}
    ax.set_xticks(bins, [ends.get(number, str(number)) for number in bins])
    style.label(
        ax,
        "decile of perplexity, all prompts together",
        "accuracy",
        f"{frame['num_responses'].sum():,} responses, {style.span(frame['num_prompts'])} prompts a decile;\n"
        "bars: 95 % interval, clustered by prompt",
    )
    ax.set_ylim(0, 1)
    style.legend(ax)
    return ax


def _edges(part: pl.DataFrame) -> str:
    return f"lowest: up to {part['ppl_high'][0]:.2f}, highest: from {part['ppl_low'][-1]:.2f}"
