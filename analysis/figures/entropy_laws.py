"""Correlation of published formulas with the measured change of entropy (claims E2 to E4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Correlation within steps between the change of entropy that a formula predicts for a token and the change that "
    "the update made. Squares: what is left of it beyond a shuffle of tokens of equal sign and probability. Diamonds: "
    "beyond a random update, which depends on the probability and entropy of a token and not on its advantage. Below "
    "the line: properties of the token before the update, which any formula should outdo. The CSV file adds the "
    "entropy ratio, which is known only after the update."
)
# Columns of the value and its ends: legend entry, color, marker, vertical offset from the middle of the row.
SERIES = {
    "correlation": (("low", "high"), "correlation", style.INK, "o", -0.22),
    "shuffled": (("shuffled_low", "shuffled_high"), "beyond a shuffle", style.BLUE, "s", 0.0),
    "random": (("random_low", "random_high"), "beyond a random update", style.VERMILLION, "D", 0.22),
}
KINDS = ("formula", "gradient", "property")
SIZE = (4.4, 5.0)


def size(_: pl.DataFrame) -> tuple[float, float]:
    """Return the width and height in inches: one row per predictor."""
    return SIZE


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draw a row per predictor with its three correlations, for the stage that ``style.late_stage`` picks."""
    shown, stage = style.late_stage(frame)
    shown = shown.filter(shown["kind"].is_in(KINDS))
    rows = [name for kind in KINDS for name in shown.filter(kind=kind)["predictor"].unique(maintain_order=True)]
    shown = shown.with_columns(row=shown["predictor"].replace_strict(rows, range(len(rows))))
    ax.axvline(0, color=style.INK, linewidth=0.8)
    for value, (ends, label, color, marker, shift) in SERIES.items():
        part = shown.drop("low", "high", strict=False) if value != "correlation" else shown
        part = part.rename(dict(zip(ends, ("low", "high"), strict=True))).drop_nulls(value)
        look = {"color": color, "marker": marker, "linestyle": "none", "label": label}
        if not part.is_empty():
            style.points(ax, part, "row", value, shift=shift, is_horizontal=True, **look)
    first_property = sum(kind != "property" for kind in shown.unique("predictor")["kind"])
    ax.axhline(first_property - 0.5, color=style.GREY, linewidth=0.8)
    ax.set_yticks(range(len(rows)), [name.replace("_", " ") for name in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    style.label(
        ax,
        "correlation with the change of entropy",
        "",
        f"{stage}; {style.span(shown['num_tokens'], 'token')}, {style.span(shown['num_prompts'], 'prompt')} per run\n"
        f"bars: 95 % interval over steps and prompts{style.runs_note(shown, 'open dots')}",
    )
    style.legend(ax, ncols=2)
    return ax
