"""Estimate the correlation of two series beyond trends and other series."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from entrace.analysis.statistics.contrasts import contrast
from entrace.analysis.statistics.estimates import Estimate

if TYPE_CHECKING:
    import polars as pl

# Fewer changes cannot tell a relation from a trend.
MIN_CHANGES = 20
# Values per interior knot of the smooth trend: slower movements than this are not evidence.
KNOT_EVERY = 10
# A series that the others explain up to this share of its standard deviation does not vary beyond them.
NO_VARIATION = 1e-6
# Fisher's z of a correlation of 1 is infinite.
MAX_CORRELATION = 0.999999


def beyond_trend(frame: pl.DataFrame) -> Estimate | None:
    """Correlate predicted and measured changes of one run beyond the trend.

    Args:
        frame: Rows of ``entropy_forecasts`` of one run and predictor, in order.

    Returns:
        None below ``MIN_CHANGES``, too.
    """
    if frame.height < MIN_CHANGES:
        return None
    predicted, measured, *controls, steps = (
        frame[name].to_numpy().astype(float)
        for name in ("predicted", "measured", "entropy_before", "update_size", "to_step")
    )
    return partial_correlation(predicted, measured, np.column_stack(controls), steps)


def partial_correlation(x: np.ndarray, y: np.ndarray, controls: np.ndarray, steps: np.ndarray) -> Estimate | None:
    """Return Fisher's z of the correlation of two series beyond the others.

    The trend is a line with a knot per ``KNOT_EVERY`` values, so that two series which both fall or rise do not
    correlate. The error is the larger one of two: that of ``contrast``, which allows for errors of ``y`` that are
    autocorrelated, and MacKinnon and White's HC3 (J. Econometrics 29, 1985), which allows for errors that shrink or
    grow along with ``x``. Apply ``to_correlation`` to the result, or to the mean of several.

    Args:
        x: First series, ``(n,)``.
        y: Second series, ``(n,)``.
        controls: Other series, ``(n, m)``.
        steps: Training steps of the values, ascending.

    Returns:
        None if ``x`` or ``y`` does not vary beyond the trend and the other series, or if there are too few values.
    """
    basis = _independent(np.column_stack((smooth_trend(steps), controls)))
    size, columns = basis.shape
    if size <= columns + 1:
        return None
    x_rest, y_rest = (values - basis @ (basis.T @ values) for values in (x, y))
    x_norm, y_norm = np.linalg.norm(x_rest), np.linalg.norm(y_rest)
    for norm, values in ((x_norm, x), (y_norm, y)):
        if not norm > NO_VARIATION * np.linalg.norm(values):
            return None
    weights = x_rest / x_norm**2
    full = np.column_stack((basis, x_rest / x_norm))
    slope = contrast(y, full, weights, steps=steps)
    errors = y - full @ (full.T @ y)
    robust = float(np.linalg.norm(weights * errors / (1 - (full**2).sum(1))))
    r = float(np.clip(x_rest @ y_rest / (x_norm * y_norm), -MAX_CORRELATION, MAX_CORRELATION))
    error = max(slope.error, robust) * x_norm / y_norm / np.sqrt(1 - r * r)
    df = min(slope.df, size - columns - 1)
    return Estimate.from_error(float(np.arctanh(r)), float(error), df, size, slope.of, blocks=slope.blocks)


def to_correlation(found: Estimate) -> Estimate:
    """Return a correlation with an interval within [-1, 1] from Fisher's z."""
    value, low, high = np.tanh([found.value, found.low, found.high]).tolist()
    return replace(found, value=value, low=low, high=high, error=found.error * (1 - value**2))


def smooth_trend(steps: np.ndarray) -> np.ndarray:
    """Return the columns of a trend, ``(n, 2 + n // KNOT_EVERY)``.

    They are a constant, a line in the step, and a line that starts at each knot.
    """
    time = (steps - steps[0]) / max(float(steps[-1] - steps[0]), 1.0)
    knots = np.linspace(0, 1, len(steps) // KNOT_EVERY + 2)[1:-1]
    return np.column_stack((np.ones(len(time)), time, *(np.maximum(time - knot, 0) for knot in knots)))


def _independent(columns: np.ndarray) -> np.ndarray:
    """Return an orthonormal basis of the columns.

    Columns that earlier columns explain are left out.
    """
    found: list[np.ndarray] = []
    for column in columns.T:
        rest = column
        for _ in range(2):
            rest = rest - sum((np.dot(rest, known) * known for known in found), np.zeros(len(column)))
        if np.linalg.norm(rest) > NO_VARIATION * np.linalg.norm(column):
            found.append(rest / np.linalg.norm(rest))
    return np.column_stack(found)
