"""Draw each arm's performance profile at its last evaluation (claims M1, M2).

Agarwal et al., "Deep reinforcement learning at the edge of the statistical precipice", NeurIPS 2021, section 4.2; here
a score is the accuracy of one run on one held-out prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace.analysis.figures import arms, style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Share of pairs of a seed and a held-out prompt on which more than τ of the k samples are right. The left end "
    "(τ = 0) counts prompts that are solved at least once, the right end prompts that are solved every time. A curve "
    "that lies above another everywhere is better by any criterion; curves that cross trade prompts that are solved "
    "sometimes against prompts that are solved reliably."
)
MEAN_OF, AT = "share", ("benchmark", "tau")
size = arms.panels_size


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draw the share over tau, one color or one panel per arm."""
    arms.lines(ax, frame, "tau")
    x = f"τ (share of {style.span(frame['k'], 'sample')} that are right)"
    style.label(ax, x, "share of (seed, prompt) above τ", arms.line_note(frame))
    return ax
