"""Draw contributions of kinds of tokens to the change of entropy (claim E2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Where updates change entropy: the change in each bin of probability, category, and position, per token of the "
    "stage. The bins of one breakdown, over both signs, add up to the mean change by an update. Left of zero, entropy "
    "is lost."
)
PROBABILITIES = ("p < .1", "p .1 to .5", "p .5 to .9", "p .9 to .99", "p > .99")
SIZE = (4.4, 4.8)


def size(_: pl.DataFrame) -> tuple[float, float]:
    """Return the width and height in inches: one row per bin."""
    return SIZE


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draw a dot with its interval per bin and sign, in the late stage."""
    shown, stage = style.late_stage(frame)
    known = set(shown["bin"])
    bins = [
        *(name for name in PROBABILITIES if name in known),
        *(name for name in style.CATEGORY_COLORS if name in known),
        *sorted(name for name in known if name.startswith("fifth")),
    ]
    shown = shown.filter(shown["bin"].is_in(bins))
    shown = shown.with_columns(row=shown["bin"].replace_strict(bins, range(len(bins))))
    thousandths = [1000 * shown[name] for name in ("contribution", "low", "high")]
    shown = shown.with_columns(*thousandths)
    ax.axvline(0, color=style.INK, linewidth=0.8)
    style.points_by_sign(ax, shown, "row", "contribution")
    ax.set_yticks(range(len(bins)), [name.replace("_", " ") for name in bins])
    ax.set_ylim(len(bins) - 0.5, -0.5)
    total = shown.filter(breakdown="position")
    style.label(
        ax,
        "contribution to Δ entropy (0.001 nats per token)",
        "",
        f"{stage}; {total['num_tokens'].sum():,} tokens, {style.span(total['num_prompts'], 'prompt')} per run\n"
        f"bars: 95% interval over steps and prompts{style.runs_note(shown, 'open dots')}",
    )
    style.legend(ax, ncols=2)
    return ax
