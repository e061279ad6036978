"""Which tokens an update reinforces and which it suppresses, by their entropy (claim S6)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Mean change of the probability of the sampled token by one update, over tenths of the tokens by entropy (1 = "
    "lowest). The claim expects lines that part toward the right: what was uncertain is reinforced in positive samples "
    "and suppressed in negative ones. Uncertain tokens move most under any update; the verdicts divide movement by "
    "p (1 - p), which random logit changes would follow. The table adds mean |Δp| and gradient norm."
)
DECILES = range(1, 11)


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draws one line a sample sign over the deciles, for the stage that ``style.late_stage`` picks."""
    shown, stage = style.late_stage(frame)
    shown = shown.with_columns(*(100 * shown[name] for name in ("dp", "low", "high")))
    ax.axhline(0, color=style.INK, linewidth=0.8)
    tokens = {sign: shown.filter(sample_sign=sign)["num_tokens"].sum() for sign in style.SIGN_COLORS}
    for i, (_, run, line) in enumerate(style.by_run(shown)):
        for sign, color in style.SIGN_COLORS.items():
            part = run.filter(sample_sign=sign)
            if part.is_empty():
                continue
            name = f"{sign} ({tokens[sign]:,} tokens)" if i == 0 else None
            options = {"linestyle": line, "marker": "o", "markersize": 3, "label": name}
            style.band(ax, part, "entropy_decile", "dp", color=color, **options)
    ends = {1: "1\nlowest", 10: "10\nhighest"}
    ax.set_xticks(DECILES, [ends.get(decile, str(decile)) for decile in DECILES])
    style.label(
        ax,
        "decile of token entropy",
        "mean Δp (percentage points)",
        f"{stage}; {style.span(shown['num_prompts'])} prompts a point; band: 95 % interval over steps and prompts",
    )
    style.legend(ax, loc="best")
    return ax
