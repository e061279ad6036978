"""Draw accuracy against entropy, with the fitted exchange law (claim E1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from entrace.analysis.figures import marks, style
from entrace.analysis.statistics.contrasts import contrast
from entrace.analysis.statistics.stages import MIN_STEPS

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Each point is a training step. Each curve is the law accuracy = b - a exp(entropy) (arXiv 2505.22617), fitted to "
    "all steps of a run; b - a is the predicted accuracy at zero entropy. A good fit alone says little: both measures "
    "follow the step, and a batch of hard prompts moves both. The verdicts therefore take entropy and accuracy from "
    "different halves of each step's prompts, and compare the law with the step as a predictor."
)
# Entropies at which the band is drawn.
NUM_PLACES = 40


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draw the steps of each stage, and the fitted curve of each run with its band."""
    import seaborn as sns

    for stage, color in style.STAGE_COLORS.items():
        part = frame.filter(stage=stage)
        if not part.is_empty():
            look = {"color": color, "marker": style.STAGE_MARKERS[stage], "alpha": 0.55, "linewidth": 0}
            sns.scatterplot(part.to_pandas(), x="entropy", y="accuracy", s=13, label=stage, ax=ax, legend=False, **look)
            marks.remember(ax, part, "entropy", "accuracy")
    fitted = frame.filter(frame["a"].is_finite(), frame["b"].is_finite())
    for i, (_, run) in enumerate(style.by_run(fitted)):
        values = run["entropy"].to_numpy()
        entropy = np.linspace(values.min(), values.max(), NUM_PLACES)
        curve = run["b"][0] - run["a"][0] * np.exp(entropy)
        ax.plot(entropy, curve, color=style.INK, linewidth=1.2, label=None if i else "fit of a run")
        if run.height >= MIN_STEPS:
            ax.fill_between(entropy, *fit_band(run, entropy), color=style.INK, alpha=0.12, linewidth=0)
    lengths = [run.height for _, run in style.by_run(frame)]
    style.label(
        ax,
        "mean token entropy (nats)",
        "accuracy of sampled responses",
        f"n = {style.span(lengths, 'step')} in {style.count(lengths, 'run')}; band: 95% interval of the fit, steps "
        f"autocorrelated\n{describe_fit(fitted)}",
    )
    style.legend(ax, ncols=3)
    return ax


def fit_band(run: pl.DataFrame, entropy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the 95% interval of one run's fitted curve.

    See ``statistics.contrasts.contrast``.

    Args:
        run: Rows of one run in the order of steps.
        entropy: Where to evaluate the curve, nats, shape ``(n,)``.

    Returns:
        Lower and upper end of accuracy, shape ``(n,)`` each.
    """
    x, y, step = (run[name].to_numpy().astype(float) for name in ("exp_entropy", "accuracy", "step"))
    basis = np.column_stack((-x, np.ones_like(x)))
    weights = np.column_stack((-np.exp(entropy), np.ones_like(entropy))) @ np.linalg.pinv(basis)
    found = [contrast(y, basis, row, steps=step) for row in weights]
    return np.array([estimate.low for estimate in found]), np.array([estimate.high for estimate in found])


def describe_fit(frame: pl.DataFrame) -> str:
    """Describe the fit: coefficients, accuracy at zero entropy, and R².

    Values that differ between runs are ranges.
    """
    if frame.is_empty():
        return "no fit: entropy does not vary"
    a, b, ceiling, r2 = (_range(frame[name]) for name in ("a", "b", "ceiling", "r2"))
    return f"a = {a}, b = {b}, R² = {r2}, b - a = {ceiling}"


def _range(values: pl.Series) -> str:
    low, high = (f"{value:.2f}" for value in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"
