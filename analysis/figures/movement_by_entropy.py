"""Draw the probability change by an update over token entropy (claim S6)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Mean change of the probability of the sampled token by one update, per decile of token entropy (1 = lowest). The "
    "claim expects lines that diverge toward the right: uncertain tokens are reinforced in positive samples and "
    "suppressed in negative samples. Uncertain tokens move most under any update; the verdicts divide movement by "
    "p (1 - p), which random logit changes would follow. The CSV file adds mean |Δp| and gradient norm."
)
DECILES = range(1, 11)


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draw one line per sample sign over the deciles, in the late stage."""
    shown, stage = style.late_stage(frame)
    shown = shown.with_columns(*(100 * shown[name] for name in ("dp", "low", "high")))
    ax.axhline(0, color=style.INK, linewidth=0.8)
    for sign, color in style.SIGN_COLORS.items():
        part = shown.filter(sample_sign=sign)
        if not part.is_empty():
            name = f"{sign} ({part['num_tokens'].sum():,} tokens)"
            style.curve(ax, part, "entropy_decile", "dp", color=color, label=name, marker="o", markersize=4)
    ends = {1: "1\nlowest", 10: "10\nhighest"}
    ax.set_xticks(DECILES, [ends.get(decile, str(decile)) for decile in DECILES])
    style.label(
        ax,
        "decile of token entropy",
        "mean Δp (percentage points)",
        f"{stage}; {style.span(shown['num_prompts'], 'prompt')} per point and run; band: 95% interval over steps and "
        f"prompts{style.runs_note(shown)}",
    )
    style.legend(ax, tick_lines=2, ncols=2)
    return ax
