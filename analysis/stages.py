"""The two stages of training: where the boundary lies, how fast each goes, and who lost the entropy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from analysis.stats import DRAWS, LEVEL, block_length, resample_blocks

RISING, PLATEAU = "rising", "plateau"
MIN_STEPS = 20
MIN_SEGMENT = 5
MIN_SEGMENT_SHARE = 0.05
MAX_KNOTS = 200
MAX_P_VALUE = 0.05
BOOTSTRAPS = 500
# Entropy is to fall and accuracy to rise.
EXPECTED_SIGNS = np.array([-1.0, 1.0])


@dataclass(frozen=True)
class StageFit:
    """Continuous two-segment line through entropy and accuracy of one run, one boundary for both.

    Attributes:
        first_step: First recorded step.
        last_step: Last recorded step.
        num_steps: Recorded steps.
        num_rising: Those of the rising stage.
        boundary: Last step of the rising stage; None where the run shows no boundary.
        low: Lower end of the boundary's 95 % interval.
        high: Upper end.
        reason: Why there is no boundary; empty where there is one.
        starts: Fitted entropy and accuracy at the first step of each stage, shape ``(stages, 2)``.
        slopes: Change per step, shape ``(stages, 2)``.
        slope_draws: Bootstrapped slopes, shape ``(draws, 2, 2)``; empty without a boundary.
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

    def segments(self) -> list[dict[str, Any]]:
        """One row a stage, as table ``stages`` holds it."""
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
        """Start and slope of one series in one stage, with the slope's 95 % interval where there is a boundary."""
        ends = np.percentile(self.slope_draws[:, stage, series], LEVEL) if len(self.slope_draws) else (None, None)
        return {
            f"{name}_start": float(self.starts[stage, series]),
            f"{name}_slope": float(self.slopes[stage, series]),
            f"{name}_slope_low": None if ends[0] is None else float(ends[0]),
            f"{name}_slope_high": None if ends[1] is None else float(ends[1]),
        }


def fit_stages(
    step: np.ndarray,
    entropy: np.ndarray,
    accuracy: np.ndarray,
    rng: np.random.Generator | None = None,
) -> StageFit:
    """Finds the boundary between rising stage and plateau (claim S1).

    Both series are standardised and fitted together by least squares with lines that meet at one boundary, a recorded
    step with at least 5 steps and 5 % of the run on either side. The interval is the percentile interval of a
    moving-block bootstrap of the residuals within each stage, since noise often shrinks with entropy; the same blocks
    for both series.

    There is no boundary inside the run if it has fewer than 20 steps; or the two segments do not fit better than one
    line (p > .05 by a bootstrap of the largest improvement over all boundaries, blocks of the line's residuals); or
    the second segment is the faster one (standardised change per step, both series together); or the best boundary
    is the first or the last that is allowed.

    Args:
        step: Steps in order, shape ``(n,)``.
        entropy: Mean token entropy per step, nats.
        accuracy: Accuracy per step.
        rng: Source of randomness; the same for every run if not given.
    """
    rng = rng or np.random.default_rng(0)
    x = np.asarray(step, dtype=float)
    y = np.column_stack((entropy, accuracy)).astype(float)
    line = np.column_stack((np.ones_like(x), x))
    if len(x) < MIN_STEPS:
        return _one_stage(x, y, f"the run has {len(x)} steps, a boundary needs {MIN_STEPS}")
    center, scale = y.mean(0), y.std(0)
    z = (y - center) / np.where(scale > 0, scale, 1)
    search = _Search(x)

    on_line = line @ np.linalg.lstsq(line, z, rcond=None)[0]
    blocks = resample_blocks(len(x), rng, BOOTSTRAPS)
    null = on_line[:, :, None] + np.moveaxis((z - on_line)[blocks], 2, 1)
    p_value = float(np.mean(search.improvement(null) >= search.improvement(z[:, :, None])[0]))
    best = int(search.best(z[:, :, None])[0])
    coefficients = search.coefficients(z[:, :, None], np.array([best]))[0]
    rising, plateau = np.abs(_slopes(coefficients)).sum(1)
    if p_value > MAX_P_VALUE:
        return _one_stage(x, y, f"two segments fit no better than one line (p = {p_value:.2f})")
    if plateau >= rising:
        return _one_stage(x, y, f"the run is faster after step {search.knots[best]:.0f} than before")
    if best in (0, len(search.knots) - 1):
        return _one_stage(x, y, f"the best boundary, step {search.knots[best]:.0f}, lies at the edge of the run")

    fitted = search.bases[best] @ coefficients
    after = int(np.searchsorted(x, search.knots[best], side="right"))
    residuals = (z - fitted) * _inflation(len(x), search.bases.shape[2])
    resampled = fitted[:, :, None] + np.moveaxis(residuals[_blocks_by_stage(after, len(x), rng, BOOTSTRAPS)], 2, 1)
    knots = search.best(resampled)
    low, high = np.percentile(search.knots[knots], LEVEL)
    return StageFit(
        first_step=int(x[0]),
        last_step=int(x[-1]),
        num_steps=len(x),
        num_rising=after,
        boundary=float(search.knots[best]),
        low=float(low),
        high=float(high),
        reason="",
        starts=fitted[[0, after]] * scale + center,
        slopes=_slopes(coefficients) * scale,
        slope_draws=_slopes(search.coefficients(resampled, knots)) * scale,
    )


def relative_speed(slopes: np.ndarray) -> np.ndarray:
    """Speed of the plateau relative to that of the rising stage, signed: 0 = standstill, 1 = as fast as before.

    Args:
        slopes: Shape ``(..., 2 stages, 2 series)``, entropy first.

    Returns:
        Shape ``(..., 2)``: entropy, accuracy; nan where the rising stage does not move the expected way.
    """
    rising = slopes[..., 0, :] * EXPECTED_SIGNS
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(rising > 0, slopes[..., 1, :] / slopes[..., 0, :], np.nan)


def fitted_ends(
    fit: StageFit, step: np.ndarray, series: np.ndarray, rng: np.random.Generator, draws: int = DRAWS
) -> tuple[np.ndarray, np.ndarray]:
    """Fitted values of further series at the first step and at the end of the rising stage, with their bootstrap.

    Each series is fitted by least squares with the run's two segments, which meet at the boundary already found (one
    line over all steps where there is none). Residuals are resampled as for the stages themselves, the same blocks for
    all series: what neighbouring steps share, and what the series share, stays.

    Args:
        fit: The run's stages.
        step: Recorded steps, shape ``(n,)``.
        series: Values, shape ``(n, S)``.
        rng: Source of randomness.
        draws: Number of bootstrap samples.

    Returns:
        Fitted values, shape ``(2, S)``, start first, and draws of them, ``(draws, 2, S)``.
    """
    x = np.asarray(step, dtype=float)
    end = fit.last_step if fit.boundary is None else fit.boundary
    columns = [np.ones_like(x), x - fit.first_step]
    if fit.boundary is not None:
        columns.append(np.maximum(x - fit.boundary, 0))
    basis = np.column_stack(columns)
    solver = np.linalg.pinv(basis)
    fitted = basis @ (solver @ series)
    residuals = (series - fitted) * _inflation(len(x), basis.shape[1])
    rising = int(np.searchsorted(x, end, side="right"))
    resampled = fitted[:, None, :] + residuals[_blocks_by_stage(rising, len(x), rng, draws)]
    at_ends = np.zeros((2, basis.shape[1]))
    at_ends[:, 0] = 1
    at_ends[1, 1] = end - fit.first_step
    project = at_ends @ solver
    return project @ series, np.moveaxis(np.tensordot(project, resampled, axes=(1, 0)), 1, 0)


def fit_exchange(
    exp_entropy: np.ndarray, accuracy: np.ndarray, num_rising: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Least-squares fit of accuracy = -a exp(H) + b (arXiv 2505.22617) over the steps of a run, with its bootstrap.

    Steps keep their entropy, because resampled pairs would often miss the few steps of high entropy that carry the fit;
    residuals are resampled in blocks within each stage.

    Args:
        exp_entropy: exp of mean token entropy per step, shape ``(n,)``, not all equal.
        accuracy: Accuracy per step.
        num_rising: Steps of the rising stage.
        rng: Source of randomness.

    Returns:
        a and b, shape ``(2,)``, and draws of them, ``(draws, 2)``.
    """
    basis = np.column_stack((-exp_entropy, np.ones_like(exp_entropy)))
    solver = np.linalg.pinv(basis)
    fitted = basis @ (solver @ accuracy)
    residuals = (accuracy - fitted) * _inflation(len(accuracy), 2)
    resampled = fitted[:, None] + residuals[_blocks_by_stage(num_rising, len(accuracy), rng, DRAWS)]
    return solver @ accuracy, (solver @ resampled).T


def num_rising_blocks(fit: StageFit) -> float:
    """Blocks of the moving-block bootstrap that the rising stage holds: how many of its steps count as independent."""
    return fit.num_rising / block_length(fit.num_rising)


def decompose_fall(tokens: np.ndarray, entropy_sum: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Splits the fall of mean token entropy between two windows into parts of each sample sign (claim S2).

    With w the share of a sign in the tokens and m its mean entropy, the fall is, exactly, the sum over signs of
    mean(w) (m_start - m_end), the change within the sign, and (w_start - w_end) mean(m), the change in its share
    (the symmetric decomposition of Marshall and Edgeworth).

    Args:
        tokens: Number of tokens, shape ``(..., 2 windows, signs)``, start first.
        entropy_sum: Sum of their entropy, nats, same shape.

    Returns:
        ``within`` and ``between``, nats, shape ``(..., signs)``. A sign without tokens in one window changes its share
        only.
    """
    share = tokens / tokens.sum(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = entropy_sum / tokens
    mean = np.where(np.isfinite(mean), mean, mean[..., ::-1, :])
    mean = np.where(np.isfinite(mean), mean, 0.0)
    within = share.mean(-2) * (mean[..., 0, :] - mean[..., 1, :])
    between = (share[..., 0, :] - share[..., 1, :]) * mean.mean(-2)
    return within, between


def _blocks_by_stage(rising: int, steps: int, rng: np.random.Generator, draws: int) -> np.ndarray:
    """Indices of a moving-block bootstrap that stays within each stage, shape ``(steps, draws)``."""
    parts = [resample_blocks(rising, rng, draws)]
    if rising < steps:
        parts.append(rising + resample_blocks(steps - rising, rng, draws))
    return np.concatenate(parts)


def _inflation(steps: int, coefficients: int) -> float:
    """Residuals of a fit are smaller than the noise by the inverse of this."""
    return float(np.sqrt(steps / (steps - coefficients)))


class _Search:
    """Least-squares fits of all allowed boundaries at once; series have shape ``(n, 2, draws)``."""

    def __init__(self, x: np.ndarray) -> None:
        margin = max(MIN_SEGMENT, int(np.ceil(MIN_SEGMENT_SHARE * len(x))))
        allowed = x[margin - 1 : -margin]
        self.knots = allowed[np.unique(np.linspace(0, len(allowed) - 1, MAX_KNOTS).round().astype(int))]
        hinge = np.maximum(x[None, :] - self.knots[:, None], 0)
        ones = np.ones_like(hinge)
        self.bases = np.stack((ones, ones * (x - x[0]), hinge), axis=2)
        self._q, self._r = np.linalg.qr(self.bases)

    def _squared_error(self, z: np.ndarray) -> np.ndarray:
        total = (z**2).sum((0, 1))
        projected = np.tensordot(self._q, z, axes=(1, 0))
        return total - (projected**2).sum((1, 2))

    def best(self, z: np.ndarray) -> np.ndarray:
        """Index of the best boundary of each draw."""
        return self._squared_error(z).argmin(0)

    def improvement(self, z: np.ndarray) -> np.ndarray:
        """Largest relative fall of the squared error against one line, per draw."""
        line = (z**2).sum((0, 1)) - (np.tensordot(self._q[0, :, :2], z, axes=(0, 0)) ** 2).sum((0, 1))
        two = np.maximum(self._squared_error(z).min(0), 1e-12)
        return (line - two) / two

    def coefficients(self, z: np.ndarray, knots: np.ndarray) -> np.ndarray:
        """Intercept, slope and change of slope at the boundary of each draw, shape ``(draws, 3, 2)``."""
        found = np.empty((z.shape[2], 3, z.shape[1]))
        for knot in np.unique(knots):
            draws = knots == knot
            solver = np.linalg.solve(self._r[knot], self._q[knot].T)
            found[draws] = np.moveaxis(np.tensordot(solver, z[:, :, draws], axes=(1, 0)), 2, 0)
        return found


def _slopes(coefficients: np.ndarray) -> np.ndarray:
    """Slopes of both stages from ``(..., 3, 2)`` coefficients."""
    return np.stack((coefficients[..., 1, :], coefficients[..., 1, :] + coefficients[..., 2, :]), axis=-2)


def _one_stage(x: np.ndarray, y: np.ndarray, reason: str) -> StageFit:
    slope, start = np.polyfit(x - x[0], y, 1) if len(x) > 1 else (np.zeros(2), y[0])
    return StageFit(
        first_step=int(x[0]),
        last_step=int(x[-1]),
        num_steps=len(x),
        num_rising=len(x),
        boundary=None,
        low=None,
        high=None,
        reason=reason,
        starts=start[None],
        slopes=slope[None],
        slope_draws=np.empty((0, 2, 2)),
    )
