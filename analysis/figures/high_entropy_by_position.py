"""Where in a response the high-entropy tokens stand (claims S6, T3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Share of tokens at each position that belong to the 20 % with the highest entropy of their stage. If position "
    "made no difference the lines would lie on the dashed one."
)
STAGES = {"rising": (style.ORANGE, "o"), "plateau": (style.BLUE, "s")}
TOP = 0.2


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draws the share of high-entropy tokens over relative position, one colour a stage."""
    for i, (_, run, line) in enumerate(style.by_run(frame)):
        for stage, (color, marker) in STAGES.items():
            part = run.filter(stage=stage)
            if part.is_empty():
                continue
            options = {"linestyle": line, "marker": marker, "markersize": 4}
            name = f"{stage} (from {_thresholds(frame, stage)} nats)" if i == 0 else None
            style.band(ax, part, "position_mid", "share", color=color, label=name, **options)
    ax.axhline(TOP, color=style.GREY, linestyle="--", linewidth=0.9, label="evenly spread")
    style.label(
        ax,
        "relative position in the response",
        "share of tokens with high entropy",
        f"{frame['num_tokens'].sum():,} tokens, {style.span(frame['num_prompts'])} prompts a point;\n"
        "band: 95 % interval over steps and prompts",
    )
    ax.set_xlim(0, 1)
    style.start_at_zero(ax)
    style.legend(ax, loc="upper center", ncols=2)
    return ax


def _thresholds(frame: pl.DataFrame, stage: str) -> str:
    thresholds = frame.filter(stage=stage)["entropy_threshold"]
    return "–".join(sorted({f"{end:.2f}" for end in (min(thresholds), max(thresholds))}))
