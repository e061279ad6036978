"""Draw the measured over the predicted change of entropy (claims E2 and E3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Mean change of entropy by an update where a formula predicts a larger or smaller change, both from the mean of "
    "the step, in bins of half a standard deviation of the prediction. Every prediction is scaled to fit best, so a "
    "formula that knows nothing predicts no differences. Points on the diagonal are calibrated. A formula is useful as "
    "far as its points reach to both sides, and misleading where they leave the diagonal."
)
COLORS = {
    "entropy": style.INK,
    "discriminator": style.BLUE,
    "covariance": style.VERMILLION,
    "omega": style.GREEN,
    "quadrants": style.PURPLE,
}


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draw one line per predictor, for the stage that ``style.late_stage`` picks."""
    shown, stage = style.late_stage(frame)
    for predictor, color in COLORS.items():
        part = style.pool(shown.filter(predictor=predictor), ["bin"], "measured", "predicted").sort("predicted")
        if not part.is_empty():
            style.band(ax, part, "predicted", "measured", color=color, label=predictor, marker="o", markersize=3)
    ends = (float(shown["predicted"].min()), float(shown["predicted"].max()))  # pyright: ignore
    ax.plot(ends, ends, color=style.GREY, linewidth=0.8, linestyle="--", label="calibrated")
    style.label(
        ax,
        "predicted change of entropy (nats per token)",
        "measured change (nats per token)",
        f"{stage}; {style.span(shown['num_tokens'], 'token')}, {style.span(shown['num_prompts'], 'prompt')} per point "
        "and run;\nband: 95% interval over steps and prompts" + style.runs_note(shown, None),
    )
    style.legend(ax, ncols=3)
    return ax
