"""Draw the probability change by an update per token category (claim S6)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Mean change of the probability of the sampled token by one update, by the function of the token. A category to "
    "the right of zero is reinforced, to the left suppressed. The CSV file adds mean |Δp| and gradient norm."
)


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draw a dot with its interval per category and sign, in the late stage."""
    shown, stage = style.late_stage(frame)
    categories = [name for name in style.CATEGORY_COLORS if name in set(shown["category"])]
    percent = [100 * shown[name] for name in ("dp", "low", "high")]
    shown = shown.with_columns(*percent, row=shown["category"].replace_strict(categories, range(len(categories))))
    ax.axvline(0, color=style.INK, linewidth=0.8)
    style.points_by_sign(ax, shown, "row", "dp")
    ax.set_yticks(range(len(categories)), [name.replace("_", "\n") for name in categories])
    ax.set_ylim(len(categories) - 0.5, -0.5)
    style.label(
        ax,
        "mean change of probability, Δp (percentage points)",
        "",
        f"{stage}; {shown['num_tokens'].sum():,} tokens, {style.span(shown['num_prompts'], 'prompt')} per dot\n"
        f"bars: 95% interval over steps and prompts{style.runs_note(shown, 'open dots')}",
    )
    style.legend(ax, ncols=2)
    return ax
