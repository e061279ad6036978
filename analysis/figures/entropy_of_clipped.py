"""Draw the change of entropy of clipped tokens and of comparable ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Mean change of entropy by an update at tokens whose gradient the ratio clip removed in at least one mini-batch, "
    "and at tokens of equal step, sign, and probability that were not clipped. The comparison does not say what "
    "clipping caused: a token is clipped because earlier mini-batches had already moved it far."
)
KINDS = ("clipped", "comparable")


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draw a dot with its interval per kind and sign, in the late stage."""
    shown, stage = style.late_stage(frame)
    shown = shown.with_columns(row=shown["kind"].replace_strict(KINDS, range(len(KINDS))))
    ax.axvline(0, color=style.INK, linewidth=0.8)
    style.points_by_sign(ax, shown, "row", "change", shift=0.12)
    ax.set_yticks(range(len(KINDS)), KINDS)
    ax.set_ylim(len(KINDS) - 0.5, -0.5)
    style.label(
        ax,
        "mean change of entropy (nats)",
        "",
        f"{stage}; {style.span(shown['num_tokens'], 'token')}, {style.span(shown['num_prompts'], 'prompt')} per dot "
        f"and run\nbars: 95% interval over steps and prompts{style.runs_note(shown, 'open dots')}",
    )
    style.legend(ax, ncols=2)
    return ax
