"""Which kinds of tokens an update moves (claim S6)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Mean change of the probability of the sampled token by one update, by the token's function. To the right of zero "
    "a kind is reinforced, to the left suppressed. The table adds mean |Δp| and gradient norm."
)
SPREAD = 0.5


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draws a dot with its interval for every category, run and sign, for the stage that ``style.late_stage`` picks."""
    shown, stage = style.late_stage(frame)
    categories = [name for name in style.CATEGORY_COLORS if name in set(shown["category"])]
    signs = [sign for sign in style.SIGN_COLORS if sign in set(shown["sample_sign"])]
    runs = style.by_run(shown)
    ax.axvline(0, color=style.INK, linewidth=0.8)
    for i, (_, run, _) in enumerate(runs):
        for j, sign in enumerate(signs):
            part = run.filter(sample_sign=sign)
            offset = SPREAD * ((j * len(runs) + i + 0.5) / (len(signs) * len(runs)) - 0.5)
            ax.errorbar(
                100 * part["dp"],
                [categories.index(category) + offset for category in part["category"]],
                xerr=[100 * error for error in style.errors(part, "dp")],
                color=style.SIGN_COLORS[sign],
                linestyle="none",
                marker="o" if sign == "positive" else "s",
                markersize=4,
                elinewidth=1.2,
                capsize=2,
                label=f"{sign} samples" if i == 0 else None,
            )
    ax.set_yticks(range(len(categories)), [name.replace("_", "\n") for name in categories])
    # Room for the legend above the first category.
    ax.set_ylim(len(categories) - 0.5, -1.2)
    style.label(
        ax,
        "mean change of probability, Δp (percentage points)",
        "",
        f"{stage}; {shown['num_tokens'].sum():,} tokens, {style.span(shown['num_prompts'])} prompts a dot\n"
        "bars: 95 % interval over steps and prompts",
    )
    style.legend(ax, loc="upper center", ncols=2)
    return ax
