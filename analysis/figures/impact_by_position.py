"""Draw the impact of replacing a token over its position (claim T2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "One token of a response is replaced, and the response is continued several times from either prefix: accuracy "
    "with the original token minus accuracy with the alternative. The claim expects the line of correct responses to "
    "rise: the later the token, the more depends on it."
)
KINDS = {True: ("correct responses", style.BLUE, "o"), False: ("incorrect responses", style.VERMILLION, "s")}


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draw mean impact over relative position, for correct and incorrect responses."""
    series = list(style.by_series(frame))
    for name, part, line in series:
        for is_correct, (kind, color, marker) in KINDS.items():
            own = part.filter(is_correct=is_correct)
            if not own.is_empty():
                look = {"linestyle": line, "marker": marker, "markersize": 4.5, "label": f"{kind}{name}"}
                style.curve(ax, own, "position_mid", "impact", color=color, **look)
    ax.axhline(0, color=style.INK, linewidth=0.7)
    style.label(
        ax,
        "relative position of the replaced token",
        "accuracy lost by replacing the token",
        f"{style.span(frame['num_interventions'], 'replacement')}, {style.span(frame['num_prompts'], 'prompt')} per "
        f"point and run;\nband: 95% interval over prompts{style.runs_note(frame)}",
    )
    ax.set_xlim(0, 1)
    style.legend(ax, ncols=2 if len(series) == 1 else 1)
    return ax
