"""Fit the stages of training: slowdown, boundary, and shape (claim S1).

Each question has its own null:

- Does a series move less in the second half of the run than in the first? Null: a straight line, or only noise.
- Where do two lines that meet fit best? Null: one line. This boundary separates rising stage and plateau.
- Do two lines fit better than a smooth curve? Null: the best-fitting smooth curve.

All errors are autocorrelated; see ``autocorrelation``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from entrace.analysis.statistics.autocorrelation import MEASURED, persistence_of
from entrace.analysis.statistics.contrasts import contrast, draw_contrasts, draw_errors
from entrace.analysis.statistics.estimates import LEVEL, ONE_SD, Estimate

RISING, PLATEAU = "rising", "plateau"
MIN_STEPS = 20
MIN_SEGMENT = 5
MIN_SEGMENT_SHARE = 0.05
MAX_KNOTS = 200
MAX_P_VALUE = 0.05
BOOTSTRAPS = 400
DRAWS = 4000
# Longer runs are averaged over neighboring steps before fitting.
MAX_FITTED = 400
# Entropy is expected to fall and accuracy to rise.
EXPECTED_SIGNS = np.array([-1.0, 1.0])
# Interior knots, as shares of the run, of the piecewise linear trend that measures movement in each half.
QUARTERS = (0.25, 0.5, 0.75)
# Time constants of smooth curves, centers and widths of logistic ones, as shares of the run.
TIME_CONSTANTS = tuple(np.geomspace(0.03, 2, 16))
CENTERS, WIDTHS = tuple(np.linspace(0, 0.8, 9)), tuple(np.geomspace(0.04, 0.3, 6))


@dataclass(frozen=True)
class StageFit:
    """Hold a continuous two-segment fit of entropy and accuracy of one run.

    Both series have a common boundary.

    Attributes:
        first_step: First recorded step.
        last_step: Last recorded step.
        num_steps: Number of recorded steps.
        num_rising: Number of steps of the rising stage.
        boundary: Last step of the rising stage; None if the run has no boundary.
        low: Lower end of the 95% interval of the boundary.
        high: Upper end.
        reason: Reason why there is no boundary; empty if there is one.
        starts: Fitted entropy and accuracy at the first step of each stage, shape ``(stages, 2)``.
        slopes: Change per step, shape ``(stages, 2)``.
        slope_draws: Simulated slopes, shape ``(draws, 2, 2)``; empty without a boundary.
        steps: Fitted steps, shape ``(n,)``.
        values: Entropy and accuracy at the fitted steps, shape ``(n, 2)``.
        is_known: Whether entropy and accuracy were recorded, shape ``(2,)``; an unknown series is 0 throughout.
    """

    first_step: int
    last_step: int
    num_steps: int
    num_rising: int
    boundary: float | None
    low: float | None
    high: float | None
    reason: str
    starts: np.ndarray
    slopes: np.ndarray
    slope_draws: np.ndarray = field(repr=False)
    steps: np.ndarray = field(repr=False, default_factory=lambda: np.empty(0))
    values: np.ndarray = field(repr=False, default_factory=lambda: np.empty((0, 2)))
    is_known: tuple[bool, bool] = (True, True)

    def segments(self) -> list[dict[str, Any]]:
        """Return one row per stage, as in table ``stages``."""
        spans = {RISING: (self.first_step, self.last_step)}
        if self.boundary is not None:
            spans = {
                RISING: (self.first_step, int(self.boundary)),
                PLATEAU: (int(self.boundary) + 1, self.last_step),
            }
        return [
            {
                "stage": stage,
                "first_step": span[0],
                "last_step": span[1],
                "boundary_step": self.boundary,
                "boundary_low": self.low,
                "boundary_high": self.high,
                **self._measure("entropy", i, 0),
                **self._measure("accuracy", i, 1),
            }
            for i, (stage, span) in enumerate(spans.items())
        ]

    def _measure(self, name: str, stage: int, series: int) -> dict[str, float | None]:
        """Return start and slope of one series in one stage.

        With a boundary, the 95% interval of the slope is included. All values of an unknown series are None.
        """
        if not self.is_known[series]:
            return dict.fromkeys(f"{name}_{value}" for value in ("start", "slope", "slope_low", "slope_high"))
        ends = np.percentile(self.slope_draws[:, stage, series], LEVEL) if len(self.slope_draws) else (None, None)
        return {
            f"{name}_start": float(self.starts[stage, series]),
            f"{name}_slope": float(self.slopes[stage, series]),
            f"{name}_slope_low": None if ends[0] is None else float(ends[0]),
            f"{name}_slope_high": None if ends[1] is None else float(ends[1]),
        }

    def movement(self, series: int) -> tuple[np.ndarray, np.ndarray, float]:
        """Return the movement of one series in each half; see ``stages.movement``.

        Movement in the expected direction is positive.
        """
        return movement(self.steps, self.values[:, series] * EXPECTED_SIGNS[series])

    @cached_property
    def persistence(self) -> tuple[float, ...]:
        """Return prior weights of the states' autocorrelation; see ``persistence_of``."""
        if len(self.steps) < MIN_STEPS:
            return MEASURED
        return persistence_of(self.values, trend_weights(self, self.steps)[0], self.steps)

    @cached_property
    def two_stages(self) -> Estimate:
        """Return how much better two lines fit than the best smooth curve.

        See ``compare_shapes``.
        """
        return compare_shapes(self.steps, self.values)


def fit_stages(
    step: np.ndarray,
    entropy: np.ndarray,
    accuracy: np.ndarray,
    rng: np.random.Generator | None = None,
) -> StageFit:
    """Find the boundary between rising stage and plateau.

    Both series are standardized and fitted jointly by least squares with lines that meet at one boundary, a recorded
    step with at least 5 steps and 5% of the run on either side. Its interval is the middle 95% of the boundaries
    found in simulations of the fit, with errors from ``contrasts.draw_errors``.

    There is no boundary if any of these holds:

    - The run has fewer than 20 steps.
    - Two segments fit no better than one line: p > .05, by simulations of the line with the largest improvement over
      all boundaries.
    - The second segment is faster, in standardized change per step of both series together.
    - The first segment does not move in the expected direction (entropy down, accuracy up, both together).
    - The best boundary is the first or the last allowed step.

    Args:
        step: Steps in order, shape ``(n,)``.
        entropy: Mean token entropy per step, nats. A series that is NaN throughout is unknown, and takes no part.
        accuracy: Accuracy per step, likewise.
        rng: Source of randomness (default: seed 0 for every run).
    """
    rng = rng or np.random.default_rng(0)
    recorded = np.asarray(step, dtype=float)
    series = np.column_stack((entropy, accuracy)).astype(float)
    is_known = (not np.isnan(series[:, 0]).all(), not np.isnan(series[:, 1]).all())
    # A constant series has no weight in the fit.
    x, y = _average(recorded, np.where(is_known, series, 0.0))
    spans = (int(recorded[0]), int(recorded[-1]), len(recorded))
    fit = _fit(spans, recorded, x, y, rng)
    return replace(fit, is_known=is_known)


def _fit(
    spans: tuple[int, int, int], recorded: np.ndarray, x: np.ndarray, y: np.ndarray, rng: np.random.Generator
) -> StageFit:
    """Fit ``y`` at ``x``, the averages of neighboring recorded steps."""
    if len(x) < MIN_STEPS:
        return _one_stage(spans, x, y, f"the run has {len(x)} steps; a boundary needs {MIN_STEPS}")
    center, scale = y.mean(0), y.std(0)
    z = (y - center) / np.where(scale > 0, scale, 1)
    search = _Family(_two_lines(x))
    line = np.column_stack((np.ones_like(x), x - x[0]))

    best = int(search.best(z[:, :, None])[0])
    coefficients = search.coefficients(z[:, :, None], np.array([best]))[0]
    fitted = search.bases[best] @ coefficients
    errors = draw_errors(z - fitted, search.bases[best], x, BOOTSTRAPS, rng)
    on_line = line @ np.linalg.lstsq(line, z, rcond=None)[0]
    improvement = _improvement(search, line, z[:, :, None])[0]
    p_value = float(np.mean(_improvement(search, line, on_line[:, :, None] + errors) >= improvement))
    knots = _knots(x)
    slopes = _slopes(coefficients)
    rising, plateau = np.abs(slopes).sum(1)
    if p_value > MAX_P_VALUE:
        return _one_stage(spans, x, y, f"two segments fit no better than one line (p = {p_value:.2f})")
    if plateau >= rising:
        return _one_stage(spans, x, y, f"the run is faster after step {knots[best]:.0f} than before")
    if slopes[0] @ EXPECTED_SIGNS <= 0:
        return _one_stage(spans, x, y, "entropy and accuracy do not move in the expected direction")
    if best in (0, len(knots) - 1):
        return _one_stage(spans, x, y, f"the best boundary, step {knots[best]:.0f}, is at the edge of the run")

    simulated = fitted[:, :, None] + errors
    found = search.best(simulated)
    low, high = np.percentile(knots[found], LEVEL)
    after = int(np.searchsorted(x, knots[best], side="right"))
    return StageFit(
        *spans,
        num_rising=int(np.searchsorted(recorded, knots[best], side="right")),
        boundary=float(knots[best]),
        low=float(min(low, knots[best])),
        high=float(max(high, knots[best])),
        reason="",
        starts=fitted[[0, after]] * scale + center,
        slopes=slopes * scale,
        slope_draws=_slopes(search.coefficients(simulated, found)) * scale,
        steps=x,
        values=y,
    )


def movement(step: np.ndarray, series: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the rise of a series over each half of the run, with posterior draws.

    The trend has four lines that meet at the quarters of the run.

    Args:
        step: Steps in order, shape ``(n,)``.
        series: Shape ``(n,)``.

    Returns:
        Values ``(2,)``, draws ``(DRAWS, 2)``, and the effective number of independent steps.
    """
    x = (step - step[0]) / (step[-1] - step[0])

    def columns(at: np.ndarray) -> np.ndarray:
        return np.column_stack((np.ones_like(at), at, *(np.maximum(at - knot, 0) for knot in QUARTERS)))

    basis = columns(x)
    weights = np.diff(columns(np.array([0.0, 0.5, 1.0])), axis=0) @ np.linalg.pinv(basis)
    draws = draw_contrasts(series, basis, weights, step, DRAWS, np.random.default_rng(0))
    blocks = contrast(series, basis, weights[0] - weights[1], steps=step).blocks
    return weights @ series, draws, blocks


def slowdown(movements: np.ndarray) -> np.ndarray:
    """Return (v1 - |v2|) / (|v1| + |v2|) of the movements in both halves.

    Movements have shape ``(..., 2)``. 0 is a straight line. 1 is a standstill in the second half. -1 is a standstill in
    the first half, or a movement in the opposite direction from the start.
    """
    first, second = movements[..., 0], np.abs(movements[..., 1])
    with np.errstate(divide="ignore", invalid="ignore"):
        return (first - second) / (np.abs(first) + second)


def compare_shapes(step: np.ndarray, values: np.ndarray) -> Estimate:
    """Compare two lines that meet with the best smooth curve, in squared error.

    Curves are exponential, logarithmic, or logistic in the step plus a line, with one time constant for both series, so
    they have at least as many parameters as two lines. The advantage of a shape is 1 - its squared error / that of the
    other shape. It is compared with simulations of the other shape, with errors from ``contrasts.draw_errors``, because
    noise alone lets either shape fit better at times.

    Args:
        step: Steps in order, shape ``(n,)``.
        values: Series, ``(n, S)``.

    Returns:
        If two lines fit better: their advantage in excess of its median if the curve were true, positive. Otherwise the
        same for the curve if two lines were true, negative.
    """
    rng = np.random.default_rng(0)
    scale = values.std(0)
    z = ((values - values.mean(0)) / np.where(scale > 0, scale, 1))[:, :, None]
    families = _Family(_two_lines(step)), _Family(_curves(step))
    best = [int(family.best(z)[0]) for family in families]
    fits = [f.bases[i] @ f.coefficients(z, np.array([i]))[0] for f, i in zip(families, best, strict=True)]
    advantage = float(_advantage(families, z)[0])
    better, other = (0, 1) if advantage > 0 else (1, 0)
    errors = draw_errors(z[:, :, 0] - fits[better], families[better].bases[best[better]], step, BOOTSTRAPS, rng)
    null = _advantage(families, fits[other][:, :, None] + errors)
    low, middle, high = np.percentile(null, (ONE_SD[0], 50, ONE_SD[1]))
    return Estimate.from_error(advantage - float(middle), float(high - low) / 2, np.inf, len(step), "steps")


def trend_weights(fit: StageFit, step: np.ndarray, noise: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the columns of the trend, and weights of the rising-stage change.

    The trend has two lines within each stage, all of which meet, so that a slowdown within a stage does not count as
    noise. It is fitted by least squares, weighted if the noise of steps is known.

    Args:
        fit: Stages of the run; a single stage if it has no boundary.
        step: Steps at which the series is known, shape ``(n,)``.
        noise: Sampling variance of the series at these steps; None if unknown.

    Returns:
        Columns ``(n, p)``, and weights ``(n,)``. Weights times the series are the fitted value at the end of the rising
        stage minus that at the first step.
    """
    x = np.asarray(step, dtype=float)
    first, last = fit.first_step, fit.last_step
    end = last if fit.boundary is None else fit.boundary
    knots = [(first + end) / 2]
    if (x > end).sum() >= MIN_SEGMENT:
        knots += [end, (end + last) / 2]

    def columns(at: np.ndarray) -> np.ndarray:
        return np.column_stack((np.ones_like(at), at - first, *(np.maximum(at - knot, 0) for knot in knots)))

    basis = columns(x)
    # Half of the average noise represents the state of the policy, which more prompts do not average out.
    precision = np.ones_like(x) if noise is None or not noise.mean() > 0 else 1 / (noise + noise.mean() / 2)
    solver = np.linalg.pinv(basis * np.sqrt(precision)[:, None]) * np.sqrt(precision)
    return basis, np.diff(columns(np.array([first, end], dtype=float)), axis=0)[0] @ solver


def decompose_fall(tokens: np.ndarray, entropy_sum: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Decompose the fall of mean token entropy by sample sign (claim S2).

    The fall is that between two phases. Let w be the share of a sign in the tokens, and m its mean entropy. The fall is
    exactly the sum over signs of mean(w) (m_start - m_end), the change within the sign, and (w_start - w_end) mean(m),
    the change of its share (symmetric decomposition of Marshall and Edgeworth).

    Args:
        tokens: Number of tokens, shape ``(..., 2 phases, signs)``, start first.
        entropy_sum: Sum of token entropy, nats, same shape.

    Returns:
        ``within`` and ``between``, nats, shape ``(..., signs)``. For a sign without tokens in one phase, ``within`` is
        0.
    """
    share = tokens / tokens.sum(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = entropy_sum / tokens
    mean = np.where(np.isfinite(mean), mean, mean[..., ::-1, :])
    mean = np.where(np.isfinite(mean), mean, 0.0)
    within = share.mean(-2) * (mean[..., 0, :] - mean[..., 1, :])
    between = (share[..., 0, :] - share[..., 1, :]) * mean.mean(-2)
    return within, between


class _Family:
    """Fit all shapes of a family by least squares.

    Series have shape ``(n, S, draws)``.
    """

    def __init__(self, bases: np.ndarray) -> None:
        """Store the columns of each shape and their QR decompositions.

        ``bases`` has shape ``(shapes, n, p)``.
        """
        self.bases = bases
        self._q, self._r = np.linalg.qr(bases)

    def squared_error(self, z: np.ndarray) -> np.ndarray:
        """Return the squared error of every shape and draw, ``(shapes, draws)``."""
        total = (z**2).sum((0, 1))
        projected = np.einsum("knp,nm->kpm", self._q, z.reshape(len(z), -1), optimize=True)
        return total - (projected**2).reshape(len(self._q), -1, *z.shape[1:]).sum((1, 2))

    def best(self, z: np.ndarray) -> np.ndarray:
        """Return the index of the best shape of each draw."""
        return self.squared_error(z).argmin(0)

    def smallest(self, z: np.ndarray) -> np.ndarray:
        """Return the squared error of the best shape of each draw."""
        return np.maximum(self.squared_error(z).min(0), 1e-12)

    def coefficients(self, z: np.ndarray, shapes: np.ndarray) -> np.ndarray:
        """Return the coefficients of the given shape of each draw, ``(draws, p, S)``."""
        found = np.empty((z.shape[2], self.bases.shape[2], z.shape[1]))
        for shape in np.unique(shapes):
            draws = shapes == shape
            solver = np.linalg.solve(self._r[shape], self._q[shape].T)
            found[draws] = np.moveaxis(np.tensordot(solver, z[:, :, draws], axes=(1, 0)), 2, 0)
        return found


def _knots(x: np.ndarray) -> np.ndarray:
    """Return the allowed boundaries."""
    margin = max(MIN_SEGMENT, int(np.ceil(MIN_SEGMENT_SHARE * len(x))))
    allowed = x[margin - 1 : -margin]
    return allowed[np.unique(np.linspace(0, len(allowed) - 1, MAX_KNOTS).round().astype(int))]


def _two_lines(x: np.ndarray) -> np.ndarray:
    """Return the columns of two lines that meet, one shape per allowed boundary."""
    hinge = np.maximum(x[None, :] - _knots(x)[:, None], 0)
    ones = np.ones_like(hinge)
    return np.stack((ones, ones * (x - x[0]), hinge), axis=2)


def _curves(x: np.ndarray) -> np.ndarray:
    """Return the columns of the smooth curves, each with a line."""
    time = (x - x[0]) / (x[-1] - x[0])
    shapes = [np.exp(-time / constant) for constant in TIME_CONSTANTS]
    shapes += [np.log1p(time / constant) for constant in TIME_CONSTANTS]
    shapes += [1 / (1 + np.exp(-(time - center) / width)) for center in CENTERS for width in WIDTHS]
    curves = np.array(shapes)
    ones = np.ones_like(curves)
    return np.stack((ones, ones * time, curves), axis=2)


def _improvement(search: _Family, line: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Return the largest relative reduction of the squared error of each draw.

    The comparison is with one line.
    """
    q = np.linalg.qr(line)[0]
    one = (z**2).sum((0, 1)) - (np.tensordot(q, z, axes=(0, 0)) ** 2).sum((0, 1))
    two = search.smallest(z)
    return (one - two) / two


def _advantage(families: tuple[_Family, _Family], z: np.ndarray) -> np.ndarray:
    """Return the relative difference in squared error, in [-1, 1].

    The result is positive if the first family fits better.
    """
    first, second = (family.smallest(z) for family in families)
    return (second - first) / np.maximum(first, second)


def _slopes(coefficients: np.ndarray) -> np.ndarray:
    """Return the slopes of both stages from ``(..., 3, S)`` coefficients."""
    return np.stack((coefficients[..., 1, :], coefficients[..., 1, :] + coefficients[..., 2, :]), axis=-2)


def _average(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average groups of neighboring steps if there are too many.

    A group is named by its last step.
    """
    if len(x) <= MAX_FITTED:
        return x, y
    groups = np.array_split(np.arange(len(x)), MAX_FITTED)
    return x[[group[-1] for group in groups]], np.array([y[group].mean(0) for group in groups])


def _one_stage(spans: tuple[int, int, int], x: np.ndarray, y: np.ndarray, reason: str) -> StageFit:
    slope, start = np.polyfit(x - x[0], y, 1) if len(x) > 1 else (np.zeros(2), y[0])
    return StageFit(
        *spans,
        num_rising=spans[2],
        boundary=None,
        low=None,
        high=None,
        reason=reason,
        starts=start[None],
        slopes=slope[None],
        slope_draws=np.empty((0, 2, 2)),
        steps=x,
        values=y,
    )
