"""How far an update moves the probability of a token: the whole distribution (claim S5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "How far one update moved the probability of each token that had been sampled, |Δp|, on a logarithmic scale; "
    "every bin is 0.25 of a power of ten wide. Most mass lies far to the left under any update, because most "
    "probabilities are near 1; the verdict compares the share below .01 with random logit changes of equal size."
)
SMALLEST = 1e-6
LEFT = SMALLEST / 10**0.25


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draws one stepped line a sample sign, with its band, for the stage that ``style.late_stage`` picks."""
    shown, stage = style.late_stage(frame)
    tokens = {sign: shown.filter(sample_sign=sign)["num_tokens"].sum() for sign in style.SIGN_COLORS}
    for i, (_, run, line) in enumerate(style.by_run(shown)):
        for sign, color in style.SIGN_COLORS.items():
            part = run.filter(sample_sign=sign)
            if part.is_empty():
                continue
            edges = [LEFT, *part["bin_high"]]
            name = f"{sign} ({tokens[sign]:,} tokens)" if i == 0 else None
            ax.stairs(part["share"], edges, color=color, linestyle=line, linewidth=1.5, label=name, baseline=None)
            low, high = (part[end].fill_null(part["share"]).to_numpy() for end in ("low", "high"))
            ax.stairs(high, edges, baseline=low, fill=True, color=color, alpha=0.16, linewidth=0)
    ax.set_xscale("log")
    powers = range(-5, 1)
    labels = ["≤$10^{-6}$", *(f"$10^{{{power}}}$" for power in powers)]
    ax.set_xticks([(LEFT * SMALLEST) ** 0.5, *(10.0**power for power in powers)], labels, minor=False)
    ax.minorticks_off()
    ax.set_xlim(LEFT, 1)
    style.label(
        ax,
        "change of the token's probability by the update, |Δp|",
        "share of tokens",
        f"{stage}; {style.span(shown['num_prompts'])} prompts a line; band: 95 % interval over steps and prompts",
    )
    style.start_at_zero(ax)
    style.legend(ax, loc="upper right")
    return ax
