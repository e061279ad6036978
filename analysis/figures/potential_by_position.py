"""How far updates move tokens, by position in the response (claim T3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "How far one update moved the probability of the sampled tokens, up or down, along the response: all tokens, and "
    "the 20 % with the highest entropy. The claim expects high-entropy tokens to be moved most at the end. Where "
    "entropy itself is higher at the end, so is movement; the verdict compares tokens of equal entropy. The table "
    "adds the gradient norm and the direction."
)
KINDS = {"": ("-", "o", "all tokens"), "_high_entropy": ("--", "s", "high entropy")}


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draws mean movement by sign (colour), of all and of high-entropy tokens (line style), for the late stage."""
    shown, stage = style.late_stage(frame)
    for i, (_, run, _) in enumerate(style.by_run(shown)):
        for suffix, (line, marker, kind) in KINDS.items():
            for sign, color in style.SIGN_COLORS.items():
                part = _of_kind(run.filter(sample_sign=sign), suffix)
                if part.is_empty():
                    continue
                options = {"linestyle": line, "marker": marker, "markersize": 3}
                name = f"{sign}, {kind}" if i == 0 else None
                style.band(ax, part, "position_mid", "movement", color=color, label=name, **options)
    style.label(
        ax,
        "relative position in the response",
        "movement of probability, mean |Δp|",
        f"{stage}; {shown['num_tokens'].sum():,} tokens, {style.span(shown['num_prompts'])} prompts a point;\n"
        "band: 95 % interval over steps and prompts",
    )
    ax.set_xlim(0, 1)
    style.start_at_zero(ax)
    style.legend(ax, loc="upper center", ncols=2)
    return ax


def _of_kind(run: pl.DataFrame, suffix: str) -> pl.DataFrame:
    columns = {f"movement{suffix}": "movement"}
    if suffix:
        columns |= {f"movement{suffix}_{end}": end for end in ("low", "high")}
        run = run.drop("movement", "low", "high")
    return run.rename(columns).drop_nulls("movement")
