"""Draw the share of high-entropy tokens over position (claims S6, T3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Share of tokens at each position that are among the 20% with the highest entropy of their stage. Without an "
    "effect of position, both lines would follow the dashed line."
)
TOP = 0.2


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draw the share of high-entropy tokens over position, one color per stage.

    The position is relative to the length of the response.
    """
    for stage, color in style.STAGE_COLORS.items():
        part = frame.filter(stage=stage)
        if not part.is_empty():
            name = f"{stage} (from {_thresholds(part)} nats)"
            look = {"marker": style.STAGE_MARKERS[stage], "markersize": 4.5, "label": name}
            style.curve(ax, part, "position_mid", "share", color=color, **look)
    ax.axhline(TOP, color=style.GREY, linestyle="--", linewidth=0.9, label="no effect of position")
    style.label(
        ax,
        "relative position in the response",
        "share of tokens with high entropy",
        f"{frame['num_tokens'].sum():,} tokens, {style.span(frame['num_prompts'], 'prompt')} per point and run;\n"
        f"band: 95% interval over steps and prompts{style.runs_note(frame)}",
    )
    ax.set_xlim(0, 1)
    ax.set_ylim(bottom=0)
    style.legend(ax, ncols=2)
    return ax


def _thresholds(part: pl.DataFrame) -> str:
    """Return the range over runs of the entropy from which a token counts."""
    thresholds = part["entropy_threshold"]
    return "–".join(sorted({f"{end:.2f}" for end in (min(thresholds), max(thresholds))}))
