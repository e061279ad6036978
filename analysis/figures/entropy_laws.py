"""Draw how published formulas correlate with entropy change (claims E2 to E4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Correlation between the change of entropy that a formula predicts for a token and the change that the update "
    "made. Dots: between tokens of a step. Squares: between tokens of equal sign and probability as well, which a "
    "shuffle reduces to 0. Diamonds: between tokens of equal probability and entropy as well, which a random update"
    " reduces to 0. Below the line: properties of the token before the update, which any formula should outdo. The "
    "CSV file adds the entropy ratio, which is known only after the update."
)
# Legend entry, color, marker, and vertical offset from the middle of the row.
SERIES = {
    "overall": ("tokens of a step", style.INK, "o", -0.22),
    "shuffle": ("at equal sign and probability", style.BLUE, "s", 0.0),
    "random": ("at equal probability and entropy", style.VERMILLION, "D", 0.22),
}
KINDS = ("formula", "gradient", "property")
SIZE = (4.4, 5.0)


def size(_: pl.DataFrame) -> tuple[float, float]:
    """Return the width and height in inches: one row per predictor."""
    return SIZE


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draw a row per predictor with its three correlations, in the late stage."""
    shown, stage = style.late_stage(frame)
    shown = shown.filter(shown["kind"].is_in(KINDS))
    rows = [name for kind in KINDS for name in shown.filter(kind=kind)["predictor"].unique(maintain_order=True)]
    shown = shown.with_columns(row=shown["predictor"].replace_strict(rows, range(len(rows))))
    ax.axvline(0, color=style.INK, linewidth=0.8)
    for comparison, (label, color, marker, shift) in SERIES.items():
        part = shown.filter(comparison=comparison)
        look = {"color": color, "marker": marker, "linestyle": "none", "label": label}
        if not part.is_empty():
            style.points(ax, part, "row", "correlation", shift=shift, is_horizontal=True, **look)
    first_property = sum(kind != "property" for kind in shown.unique("predictor")["kind"])
    ax.axhline(first_property - 0.5, color=style.GREY, linewidth=0.8)
    ax.set_yticks(range(len(rows)), [name.replace("_", " ") for name in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    style.label(
        ax,
        "correlation with the change of entropy",
        "",
        f"{stage}; {style.span(shown['num_tokens'], 'token')},\n{style.span(shown['num_prompts'], 'prompt')} per run\n"
        f"bars: 95% interval over steps and prompts{style.runs_note(shown, 'open dots')}",
    )
    style.legend(ax, ncols=2)
    return ax
