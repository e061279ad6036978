"""Draw how well formulas forecast changes between evaluations (claim E5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from entrace.analysis.figures import style
from entrace.analysis.statistics.partial import beyond_trend, to_correlation

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

CAPTION = (
    "Correlation between the change of entropy from one evaluation to the next and the change that a formula predicts "
    "from the updates between them. Dots: of the changes as they are, which proves nothing, because both may shrink or "
    "grow over training. Diamonds: beyond a smooth trend, the entropy before, and the size of the updates; E5 judges "
    "these. A random update, or a policy that loses entropy whatever it samples, reduces them to 0. Runs with few "
    "evaluations have no diamonds."
)
# Legend entry, color, marker, and vertical offset from the middle of the row.
SERIES = {
    "changes": ("changes as they are", style.INK, "o", -0.15),
    "beyond": ("beyond trend, entropy, and size of updates", style.VERMILLION, "D", 0.15),
}
ROWS = ("covariance", "discriminator", "omega", "quadrants", "first_order")


def draw(frame: pl.DataFrame, ax: Axes) -> Axes:
    """Draw a row per predictor with both correlations."""
    import polars as pl

    parts = frame.partition_by("run_id", "predictor", maintain_order=True)
    shown = pl.DataFrame([row for part in parts for row in _correlations(part)], infer_schema_length=None)
    rows = [name for name in ROWS if name in set(shown["predictor"])]
    shown = shown.with_columns(row=shown["predictor"].replace_strict(rows, range(len(rows)), return_dtype=pl.Int64))
    ax.axvline(0, color=style.INK, linewidth=0.8)
    for kind, (label, color, marker, shift) in SERIES.items():
        part = shown.filter(pl.col("kind") == kind).drop_nulls("correlation")
        look = {"color": color, "marker": marker, "linestyle": "none", "label": label}
        if not part.is_empty():
            style.points(ax, part, "row", "correlation", shift=shift, is_horizontal=True, **look)
    ax.set_yticks(range(len(rows)), [name.replace("_", " ") for name in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlim(-1.05, 1.05)
    bars = "bars: 95% interval over changes" if shown["low"].count() else "too few for a 95% interval"
    count = f"n = {style.span(shown['num_changes'], 'change')} between evaluations per run"
    style.label(
        ax, "correlation with the change of entropy", "", f"{count}\n{bars}{style.runs_note(shown, 'open dots')}"
    )
    style.legend(ax)
    return ax


def _correlations(part: pl.DataFrame) -> list[dict[str, object]]:
    """Return both correlations of one run and predictor.

    They are null where a run is too short.
    """
    x, y = (part[name].to_numpy() for name in ("predicted", "measured"))
    common = {"run_id": part["run_id"][0], "predictor": part["predictor"][0], "num_changes": part.height}
    plain = float(np.corrcoef(x, y)[0, 1]) if min(np.ptp(x), np.ptp(y)) > 0 else None
    found = beyond_trend(part)
    given = to_correlation(found) if found else None
    return [
        {**common, "kind": "changes", "correlation": plain, "low": None, "high": None},
        {
            **common,
            "kind": "beyond",
            "correlation": given.value if given else None,
            "low": given.low if given else None,
            "high": given.high if given else None,
        },
    ]
