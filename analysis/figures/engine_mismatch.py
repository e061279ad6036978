"""Draw engine-trainer differences by step, position, and entropy.

The differences are between the inference engine and the trainer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "KL divergence per token between the distribution that the inference engine sampled from and the trainer's "
    "distribution for the same weights, along the run, along the response, and from confident to uncertain tokens. "
    "Without a mismatch it is 0."
)
BREAKDOWNS = {"step": ("o", style.INK), "position": ("s", style.BLUE), "entropy": ("^", style.VERMILLION)}


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draw one line per breakdown."""
    for breakdown, (marker, color) in BREAKDOWNS.items():
        part = frame.filter(breakdown=breakdown)
        if not part.is_empty():
            style.curve(ax, part, "bin_mid", "kl", color=color, marker=marker, markersize=4, label=f"by {breakdown}")
    total = frame.filter(breakdown="position")
    tokens = int(total["num_tokens"].sum())
    far = float((total["ratio_share"] * total["num_tokens"]).sum()) / tokens
    style.label(
        ax,
        "share of the run, of the response, or of tokens by entropy",
        "KL(engine, trainer) (nats per token)",
        f"{tokens:,} tokens, {style.span(total['num_prompts'], 'prompt')} per bin and run;\n"
        f"ratio of probabilities outside [1/2, 2]: {far:.2%} of the tokens;\n"
        f"band: 95% interval over steps and prompts{style.runs_note(frame)}",
    )
    ax.set_xlim(0, 1)
    ax.set_ylim(bottom=0)
    style.legend(ax, ncols=3)
    return ax
