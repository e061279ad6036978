"""What replacing a token costs, by its position in the response (claim T2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "One token of a response is replaced, and the response is continued several times from either prefix: accuracy "
    "with the original token minus accuracy with the alternative. The claim expects the line of right responses to "
    "rise: the later the token, the more depends on it."
)
KINDS = {True: ("right responses", style.BLUE, "o"), False: ("wrong responses", style.VERMILLION, "s")}


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draws mean impact over relative position, one colour for right and one for wrong responses."""
    for i, (_, run, line) in enumerate(style.by_series(frame)):
        for is_correct, (name, color, marker) in KINDS.items():
            part = run.filter(is_correct=is_correct)
            if part.is_empty():
                continue
            options = {"linestyle": line, "marker": marker, "markersize": 4}
            style.band(ax, part, "position_mid", "impact", color=color, label=name if i == 0 else None, **options)
    ax.axhline(0, color=style.INK, linewidth=0.7)
    style.label(
        ax,
        "relative position of the replaced token",
        "accuracy lost by replacing the token",
        f"{style.span(frame['num_interventions'])} replacements, {style.span(frame['num_prompts'])} prompts a point;\n"
        "band: 95 % interval over prompts",
    )
    ax.set_xlim(0, 1)
    style.legend(ax, loc="best")
    return ax
