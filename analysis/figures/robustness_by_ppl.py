"""Draw the impact of replacing a token, by perplexity (claim I2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "One token of a response is replaced, and the response is continued several times from either prefix: accuracy "
    "with the original token minus accuracy with the alternative. Above 0 the original was the better choice. The "
    "claim expects bars closer to 0 at low perplexity: such responses survive a replaced token."
)
KINDS = {True: ("correct responses", style.BLUE), False: ("incorrect responses", style.VERMILLION)}
TERCILES = {1: "lowest", 2: "middle", 3: "highest"}
WIDTH = 0.8
# Fades the bars of further series of interventions.
FADE = 0.6


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draw one bar with its interval per tercile, correctness, and series.

    A series is one set of interventions.
    """
    series = list(style.by_series(frame))
    width = WIDTH / (len(KINDS) * len(series))
    shift = -WIDTH / 2 + width / 2
    for is_correct, (kind, color) in KINDS.items():
        for i, (name, part, _) in enumerate(series):
            own = part.filter(is_correct=is_correct)
            look = {"width": 0.92 * width, "color": color, "alpha": FADE**i, "label": f"{kind}{name}"}
            if not own.is_empty():
                style.bars(ax, own, "ppl_tercile", "impact", shift=shift, **look)
            shift += width
    ax.axhline(0, color=style.INK, linewidth=0.7)
    ax.set_xticks(list(TERCILES), list(TERCILES.values()))
    ax.grid(visible=False, axis="x")
    style.label(
        ax,
        "perplexity within the prompt's group",
        "accuracy lost by replacing a token",
        f"{style.span(frame['num_interventions'], 'replaced token')}, "
        f"{style.span(frame['num_prompts'], 'prompt')} per bar and run;\n"
        f"bars: 95% interval over prompts{style.runs_note(frame, 'open dots')}",
    )
    style.legend(ax, ncols=2 if len(series) == 1 else 1)
    return ax
