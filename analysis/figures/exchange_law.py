"""Accuracy against entropy over training, with the exchange law fitted (claim E1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from entrace.analysis.figures import style
from entrace.analysis.statistics.intervals import contrast
from entrace.analysis.statistics.stages import MIN_STEPS

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Each point is a training step. The curve is accuracy = b - a exp(entropy) (arXiv 2505.22617), fitted to all steps "
    "of a run; b - a is the accuracy that it predicts at zero entropy. A good fit alone says little: both measures "
    "follow the step, and a batch of hard prompts moves both. The verdicts therefore take entropy and accuracy from "
    "different halves of each step's prompts, and compare the law with the step as a predictor."
)
# Entropies at which the band is drawn.
NUM_PLACES = 40
STAGES = {"rising": (style.ORANGE, "o"), "plateau": (style.BLUE, "s")}


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draws the steps of each stage, the fitted curve of each run and its band."""
    for stage, (color, marker) in STAGES.items():
        part = frame.filter(stage=stage)
        if not part.is_empty():
            ax.scatter(part["entropy"], part["accuracy"], s=12, color=color, marker=marker, alpha=0.6, label=stage)
    fitted = frame.filter(frame["a"].is_finite(), frame["b"].is_finite())
    for _, run, line in style.by_run(fitted):
        values = run["entropy"].to_numpy()
        entropy = np.linspace(values.min(), values.max(), NUM_PLACES)
        ax.plot(entropy, run["b"][0] - run["a"][0] * np.exp(entropy), color=style.INK, linestyle=line)
        if run.height >= MIN_STEPS:
            ax.fill_between(entropy, *fit_band(run, entropy), color=style.INK, alpha=0.16, linewidth=0)
    lengths = [run.height for _, run, _ in style.by_run(frame)]
    style.label(
        ax,
        "mean token entropy (nats)",
        "accuracy of sampled responses",
        f"n = {style.span(lengths)} steps in {style.count(lengths, 'run')}; band: 95 % interval, steps autocorrelated",
    )
    ax.set_xlim(left=0)
    ax.set_ylim(0, 1)
    style.legend(ax, loc="best", title=describe_fit(fitted), title_fontsize=7.5, alignment="left")
    return ax


def fit_band(run: pl.DataFrame, entropy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the 95 % interval of one run's fitted curve; see ``statistics.intervals.contrast``.

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
    """Coefficients, ceiling and share of variance explained, in words; ranges where runs differ."""
    if frame.is_empty():
        return "no fit: entropy does not vary"
    a, b, ceiling, r2 = (_range(frame[name]) for name in ("a", "b", "ceiling", "r2"))
    return f"accuracy = b - a exp(entropy)\na = {a}, b = {b}, R² = {r2}\nat entropy 0: {ceiling}"


def _range(values: pl.Series) -> str:
    low, high = (f"{value:.2f}" for value in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"
