"""Draw probability changes by an update over token position (claim T3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Absolute change of the probability of the sampled tokens by one update along the response, for all tokens and for "
    "the 20% with the highest entropy. The claim expects high-entropy tokens to move most at the end. Movement is "
    "also higher where entropy itself is higher; the verdict compares tokens of equal entropy. The CSV file adds the "
    "gradient norm and the direction. The vertical axis is linear near zero and logarithmic above."
)
KINDS = {"": ("-", "o", "all tokens"), "_high_entropy": ("--", "s", "high entropy")}


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draw mean movement by sign and kind of token over position, in the late stage.

    Color marks the sign; line style marks all tokens or high-entropy tokens.
    """
    shown, stage = style.late_stage(frame)
    for suffix, (line, marker, kind) in KINDS.items():
        for sign, color in style.SIGN_COLORS.items():
            part = _of_kind(shown.filter(sample_sign=sign), suffix)
            if not part.is_empty():
                look = {"linestyle": line, "marker": marker, "markersize": 4, "label": f"{sign}, {kind}"}
                style.curve(ax, part, "position_mid", "movement", color=color, **look)
    typical = float(np.median(shown["movement"]))
    if typical > 0:
        # A few large movements would flatten everything else on a linear axis.
        linear = 10 ** np.floor(np.log10(typical))
        ax.set_yscale("symlog", linthresh=linear, linscale=0.6)
        # Below 0, so that marks close to 0 are whole.
        ax.set_ylim(bottom=-linear / 8)
    style.label(
        ax,
        "relative position in the response",
        "mean |Δp|",
        f"{stage}; {shown['num_tokens'].sum():,} tokens, {style.span(shown['num_prompts'], 'prompt')} per point and "
        "run;\n"
        f"band: 95% interval over steps and prompts{style.runs_note(shown)}",
    )
    ax.set_xlim(0, 1)
    style.legend(ax, ncols=2)
    return ax


def _of_kind(rows: pl.DataFrame, suffix: str) -> pl.DataFrame:
    """Return the rows of one kind with ``movement``, ``low``, and ``high``.

    ``suffix`` names the kind of token; an empty suffix stands for all tokens.
    """
    columns = {f"movement{suffix}": "movement"}
    if suffix:
        columns |= {f"movement{suffix}_{end}": end for end in ("low", "high")}
        rows = rows.drop("movement", "low", "high")
    return rows.rename(columns).drop_nulls("movement")
