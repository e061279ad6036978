"""Draw heat maps of the atlas: weights of methods, and their correlations.

The heat maps show where methods put the weight, and which methods rank tokens alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np

from entrace.analysis.figures import style

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

RELATIVE = (
    "A cell is the share of a method's absolute weight in a bin divided by the share of tokens there: 1 is even, 2 "
    "twice as much. Methods with equal weights up to a constant share a row."
)
CAPTIONS = {
    "entropy": f"{RELATIVE} Bins are deciles of entropy over all tokens; 10 is the highest.",
    "position": f"{RELATIVE} Bins are tenths of the response.",
    "sign": f"{RELATIVE} The sign is that of the recorded advantage, before shaping.",
    "category": f"{RELATIVE} Categories come from the word list of the trace.",
    "correlations": (
        "Spearman's correlation between the weights of two methods within a step, averaged over tokens. Two methods "
        "with a correlation of 1 rank all tokens alike. Methods with equal weights up to a constant share a row."
    ),
}
XLABELS = {
    "entropy": "decile of entropy",
    "position": "relative position in the response",
    "sign": "sign of the advantage",
    "category": "kind of token",
}
# Ratios at which tokens were weighed.
WHEN = {"sampled": "at ratio 1", "after": "after the update"}
WIDTH, ROW_HEIGHT, MARGIN = 6.2, 0.2, 1.5


@contextmanager
def drawn(stem: str, methods: pl.DataFrame, weights: pl.DataFrame, correlations: pl.DataFrame) -> Iterator[Figure]:
    """Draw one of ``CAPTIONS`` without pyplot, and yield the figure.

    Save the figure inside the block, under the settings that hold there.
    """
    names = rows(methods)
    with style.canvas((WIDTH, MARGIN + ROW_HEIGHT * len(names))) as figure:
        ax = figure.subplots()
        if stem == "correlations":
            draw_correlations(correlations, names, ax)
        else:
            draw_shares(weights, names, ax, stem)
        yield figure


def rows(methods: pl.DataFrame) -> dict[tuple[str, str], str]:
    """Return the label of each row, by name and ratios of its method.

    Methods with equal weights share a row, which has the name of the first.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name, at, equals in methods.filter(methods["lacks"] == "").select("name", "at", "equals").rows():
        first = next((row for row in groups if row[1] == at and row[0] in equals.split(", ")), (name, at))
        groups.setdefault(first, []).append(name)
    twice = {name for name, at in groups if at == "after"} & {name for name, at in groups if at == "sampled"}
    labels = {}
    for (first, at), own in groups.items():
        label = f"{first}, after the update" if first in twice and at == "after" else first
        labels[first, at] = style.shorten(label + (f" (and {len(own) - 1} equal)" if len(own) > 1 else ""))
    return labels


def draw_shares(weights: pl.DataFrame, names: dict[tuple[str, str], str], ax: Axes, dimension: str) -> Axes:
    """Draw share of weight / share of tokens per bin, one row per method."""
    import seaborn as sns

    part = weights.filter(weights["dimension"] == dimension)
    bins = part["bin"].unique(maintain_order=True).to_list()
    table = [
        (own["weight_share"] / own["token_share"]).to_list()
        for name, at in names
        for own in [part.filter(method=name, at=at)]
    ]
    sns.heatmap(
        np.array(table, float),
        ax=ax,
        vmin=0,
        vmax=2,
        cmap=_colors(),
        annot=True,
        fmt=".2g",
        annot_kws={"fontsize": 6},
        linewidths=0.4,
        xticklabels=[name.replace("_", " ") for name in bins],
        yticklabels=list(names.values()),
        cbar_kws={"label": "share of weight / share of tokens", "shrink": 0.6},
    )
    tokens = {at: part.filter(method="none", at=at)["num_tokens"].sum() for _, at in names}
    counts = [f"{number:,} tokens {WHEN[at]}" for at, number in tokens.items()]
    style.label(ax, XLABELS[dimension], "", "; ".join(counts))
    ax.tick_params(axis="both", length=0, labelsize=7)
    return ax


def draw_correlations(correlations: pl.DataFrame, names: dict[tuple[str, str], str], ax: Axes) -> Axes:
    """Draw the rank correlation of each pair of methods."""
    import seaborn as sns

    labels: dict[str, str] = {}
    for (name, _), label in names.items():
        labels.setdefault(name, label)
    found = {(name, other): rho for name, other, rho in correlations.select("method", "other", "spearman").rows()}
    sns.heatmap(
        np.array([[found[name, other] for other in labels] for name in labels], float),
        ax=ax,
        vmin=-1,
        vmax=1,
        cmap=_colors(),
        linewidths=0.4,
        xticklabels=list(labels),
        yticklabels=list(labels.values()),
        cbar_kws={"label": "Spearman's correlation", "shrink": 0.6},
    )
    shown = correlations.filter(correlations["method"].is_in(list(labels)), correlations["other"].is_in(list(labels)))
    style.label(ax, "method", "", f"{style.span(shown['num_tokens'])} tokens per pair")
    ax.tick_params(axis="both", length=0, labelsize=7)
    ax.tick_params(axis="x", rotation=90)
    return ax


def _colors() -> Colormap:
    """Return few enough colors that a picture with a palette shows each as it is."""
    return mpl.colormaps["RdBu_r"].resampled(21)
