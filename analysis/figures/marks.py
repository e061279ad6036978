"""Remember which rows the marks of a figure show.

A page can then tell what is under the pointer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Marks:
    """Marks that one call drew.

    Attributes:
        axes: Axes that hold them.
        frame: One row per mark.
        x: Column on the horizontal axis.
        y: Column on the vertical axis.
        points: Places in the coordinates of the axes, ``(n, 2)``.
    """

    axes: Axes
    frame: pl.DataFrame
    x: str
    y: str
    points: np.ndarray


# Attribute of a figure with its marks, which live as long as it does: they refer to its axes.
KEPT = "_entrace_marks"


def remember(
    ax: Axes,
    frame: pl.DataFrame,
    x: str,
    y: str,
    *,
    at_x: Sequence[float] | np.ndarray | pl.Series | None = None,
    at_y: Sequence[float] | np.ndarray | pl.Series | None = None,
) -> None:
    """Remember that ``ax`` shows every row of ``frame`` as a mark.

    Args:
        ax: Where the marks are.
        frame: One row per mark.
        x: Column on the horizontal axis.
        y: Column on the vertical axis.
        at_x: Horizontal places, if they are not the values of ``x``.
        at_y: Vertical places, if they are not the values of ``y``.
    """
    figure = ax.get_figure(root=True)
    assert figure is not None
    places = [frame[name] if at is None else at for name, at in ((x, at_x), (y, at_y))]
    points = np.column_stack([np.asarray(place, dtype=float) for place in places]) if frame.height else np.empty((0, 2))
    vars(figure).setdefault(KEPT, []).append(Marks(ax, frame, x, y, points))


def located(figure: Figure) -> Iterator[tuple[Marks, np.ndarray]]:
    """Yield the marks of a figure with their places, ``(n, 2)``.

    A place is a share of the figure's width and one of its height, from the upper left. A mark outside its axes, or
    whose value is unknown, is at NaN.
    """
    figure.draw_without_rendering()
    for marks in vars(figure).get(KEPT, []):
        pixels = marks.axes.transData.transform(marks.points) if len(marks.points) else marks.points
        box = marks.axes.bbox.padded(1)
        is_inside = ((pixels >= box.min) & (pixels <= box.max)).all(axis=1)
        shares = pixels / [figure.bbox.width, figure.bbox.height]
        yield marks, np.where(is_inside[:, None], shares * [1, -1] + [0, 1], np.nan)
