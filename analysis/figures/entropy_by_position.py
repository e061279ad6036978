"""Draw entropy over the relative position in the response (claim T1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Mean token entropy along the response, from its first token (0) to its last (1). The claim expects a trough: "
    "higher entropy at both ends than in the middle."
)
STAGES = {"rising": (":", "o"), "plateau": ("-", "s")}


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draw one line per sample sign (color) and stage (line style)."""
    for stage, (line, marker) in STAGES.items():
        for sign, color in style.SIGN_COLORS.items():
            part = frame.filter(stage=stage, sample_sign=sign)
            if not part.is_empty():
                look = {"linestyle": line, "marker": marker, "markersize": 4}
                style.curve(ax, part, "position_mid", "entropy", color=color, label=f"{sign}, {stage}", **look)
    style.label(
        ax,
        "relative position in the response",
        "mean token entropy (nats)",
        f"{frame['num_tokens'].sum():,} tokens, {style.span(frame['num_prompts'], 'prompt')} per line and run;\n"
        f"band: 95% interval over steps and prompts{style.runs_note(frame)}",
    )
    ax.set_xlim(0, 1)
    ax.set_ylim(bottom=0)
    style.legend(ax, ncols=2)
    return ax
