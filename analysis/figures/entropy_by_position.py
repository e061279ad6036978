"""Entropy by relative position in the response (claim T1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Mean token entropy along the response, from its first token (0) to its last (1). The claim expects a trough: "
    "higher at both ends than in the middle."
)
STAGES = {"rising": (":", "o"), "plateau": ("-", "s")}


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draws one line a sample sign (colour) and stage (line style)."""
    for i, (_, run, _) in enumerate(style.by_run(frame)):
        for stage, (line, marker) in STAGES.items():
            for sign, color in style.SIGN_COLORS.items():
                part = run.filter(stage=stage, sample_sign=sign)
                if part.is_empty():
                    continue
                options = {"linestyle": line, "marker": marker, "markersize": 3}
                name = f"{sign}, {stage}" if i == 0 else None
                style.band(ax, part, "position_mid", "entropy", color=color, label=name, **options)
    style.label(
        ax,
        "relative position in the response",
        "mean token entropy (nats)",
        f"{frame['num_tokens'].sum():,} tokens, {style.span(frame['num_prompts'])} prompts a line; "
        "band: 95 % interval over steps and prompts",
    )
    ax.set_xlim(0, 1)
    ax.set_ylim(bottom=0)
    style.legend(ax, ncols=2)
    return ax
