"""Fit the autocorrelated errors of a series of steps.

The errors are sampling noise plus a drifting policy. With ``y`` one value per step and ``X`` the columns of its trend,

    y = X b + noise + state,    var(noise) = s,    state ~ AR(1) with autocorrelation r, variance L s.

``fit_posterior`` evaluates the posterior of r and L on a grid, with a flat prior on ``log s`` and ``b``. It averages
over everything that n steps cannot distinguish. A plug-in estimate (block length, bandwidth, or lag-1 autocorrelation)
would commit to one value and be wrong in one direction. The spread of prompts within a step measures s directly.

The discrete cosine transform nearly diagonalizes the covariance of an AR(1), so a likelihood costs O(n). The diagonal
itself is exact. Sources: Harville, Biometrika 61 (1974) for the likelihood of the residuals; Mueller, J. Bus. Econ.
Stat. 32 (2014) for the failure of plug-in corrections under strong autocorrelation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from entrace.analysis.statistics.shares import NO_ERROR

# Autocorrelation of the state between consecutive training steps, and its prior weight. Where the noise of steps is
# measured, the state is the variance in excess of it. Elsewhere only the order of the steps reveals a state, and slow
# states, which matter most, hide in the trend: slow states, and the presence of a state, get more prior weight.
CORRELATIONS = (0.0, 0.3, 0.5, 0.65, 0.8, 0.9, 0.95, 0.98)
MEASURED = (1.0, 0.7, 1.0, 1.0, 1.0, 1.5, 2.0, 1.5)
UNMEASURED = (0.5, 0.5, 1.0, 1.0, 1.0, 2.0, 4.0, 4.0)
# Variance of the state relative to that of the noise.
VARIANCE_RATIOS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2, 102.4, 409.6)
NO_STATE_MEASURED, NO_STATE_UNMEASURED = 0.5, 0.1
# Longer series are averaged over neighboring steps to this length.
MAX_STEPS = 600
# The measured noise counts at most this many times the degrees of freedom of the residuals: prompts are not exactly
# normal.
MAX_NOISE_WEIGHT = 10


@dataclass(frozen=True)
class Posterior:
    """Hold the posterior of noise and state over a grid.

    The grid has K pairs of autocorrelation and variance ratio.

    Attributes:
        weight: Weight of each pair, ``(K,)``; adds up to 1.
        noise: Variance of the noise, ``(K,)``: the center of a scaled inverse chi-squared distribution.
        df: Degrees of freedom of that distribution.
        ratio: Variance of the state relative to that of the noise, ``(K,)``.
        state: Spectrum of a state of variance 1: its variance by frequency, ``(K, n)``.
    """

    weight: np.ndarray
    noise: np.ndarray
    df: float
    ratio: np.ndarray
    state: np.ndarray

    @property
    def variance(self) -> np.ndarray:
        """Return the variance by frequency relative to the noise, ``(K, n)``."""
        return 1 + self.ratio[:, None] * self.state


def fit_posterior(
    y: np.ndarray,
    basis: np.ndarray,
    steps: np.ndarray,
    noise: np.ndarray | None,
    noise_df: float,
    persistence: tuple[float, ...] = MEASURED,
) -> Posterior | None:
    """Return the posterior of noise and state.

    The result is None if the series follows the trend exactly. Arguments as for ``contrasts.contrast``.
    """
    size, columns = basis.shape
    unit = np.sqrt(residual_variance(y, basis))
    if unit <= NO_ERROR * max(1.0, float(np.abs(y).max())):
        return None
    measured, extra = 0.0, 0.0
    if noise is not None and noise_df > 0:
        measured = float(noise.mean()) / unit**2
        extra = min(noise_df, float(MAX_NOISE_WEIGHT * size))
    spacing = float(np.median(np.diff(steps)))
    if extra > 0:
        state, ratio, prior = _grid(size, spacing, persistence, NO_STATE_MEASURED)
    else:
        state, ratio, prior = _grid(size, spacing, UNMEASURED, NO_STATE_UNMEASURED)
    variance = 1 + ratio[:, None] * state
    z, x = cosines(y / unit), cosines(basis)
    scaled = x / variance[:, :, None]
    gram, right = scaled.transpose(0, 2, 1) @ x, scaled.transpose(0, 2, 1) @ z
    explained = (right * np.linalg.solve(gram, right[..., None])[..., 0]).sum(1)
    squares = (z**2 / variance).sum(1) - explained + extra * measured
    df = size - columns + extra
    fit = -0.5 * (np.log(variance).sum(1) + np.linalg.slogdet(gram)[1] + df * np.log(squares))
    weight = prior * np.exp(fit - fit.max())
    return Posterior(weight / weight.sum(), unit**2 * squares / df, df, ratio, state)


def persistence_of(series: np.ndarray, basis: np.ndarray, steps: np.ndarray) -> tuple[float, ...]:
    """Return a run's prior weights of ``CORRELATIONS``, from its full series.

    A few captured steps cannot show how slowly the states of a policy drift; entropy and accuracy of all steps can. The
    result is the mean of the prior and of the posterior given all series, since states may differ in autocorrelation.

    Args:
        series: Series recorded at every step, ``(n, S)``.
        basis: Columns of their trend, ``(n, p)``.
        steps: Training steps, ascending.
    """
    weights = np.array(MEASURED)
    for values in series.T:
        posterior = fit_posterior(values, basis, steps, None, 0.0)
        if posterior is not None:
            by_correlation = posterior.weight[1:].reshape(len(CORRELATIONS), -1).sum(1)
            weights = weights * by_correlation / np.array(UNMEASURED)
    prior = np.array(MEASURED) / sum(MEASURED)
    return tuple(((prior + weights / weights.sum()) / 2).tolist())


def residual_variance(y: np.ndarray, basis: np.ndarray) -> float:
    """Return the variance of the residuals of a least-squares fit."""
    return float(np.var(y - basis @ np.linalg.lstsq(basis, y, rcond=None)[0]))


def cosines(values: np.ndarray) -> np.ndarray:
    """Return the orthonormal discrete cosine transform (type II) over the first axis."""
    return np.tensordot(_cosine_rows(len(values)), values, 1)


def from_cosines(values: np.ndarray) -> np.ndarray:
    """Return the inverse of ``cosines`` over the first axis."""
    return np.tensordot(_cosine_rows(len(values)).T, values, 1)


@lru_cache(maxsize=16)
def _cosine_rows(size: int) -> np.ndarray:
    """Return one cosine per row, ``(n, n)``.

    Row k is c_k cos(pi k (2 t + 1) / (2 n)), with c_0 = sqrt(1 / n) and c_k = sqrt(2 / n) otherwise.

    Series have at most ``MAX_STEPS`` steps, so that a product costs less than loading a fast transform.
    """
    rows = np.cos(np.pi / (2 * size) * np.outer(np.arange(size), 2 * np.arange(size) + 1))
    rows[0] /= np.sqrt(2)
    return rows * np.sqrt(2 / size)


def shorten(
    y: np.ndarray, basis: np.ndarray, weights: np.ndarray, noise: np.ndarray | None, steps: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
    """Average neighboring steps of series longer than ``MAX_STEPS``.

    Weights are summed to keep the estimate.
    """
    if len(y) <= MAX_STEPS:
        return y, basis, weights, noise, np.asarray(steps)
    starts = np.linspace(0, len(y), MAX_STEPS + 1).astype(int)[:-1]
    sizes = np.diff(np.append(starts, len(y)))

    def mean(values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values, starts, axis=0) / sizes.reshape(-1, *[1] * (values.ndim - 1))

    noise = None if noise is None else mean(noise) / sizes
    return mean(y), mean(basis), np.add.reduceat(weights, starts), noise, np.asarray(steps)[starts]


def _grid(
    size: int, spacing: float, weights: tuple[float, ...], no_state: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the spectrum of the state, its ratio to the noise, and the prior.

    The shapes are ``(K, n)``, ``(K,)``, and ``(K,)``.
    """
    state, ratio = _states(size, spacing)
    by_correlation = np.array(weights) / sum(weights) / len(VARIANCE_RATIOS)
    prior = np.concatenate([[no_state], (1 - no_state) * np.repeat(by_correlation, len(VARIANCE_RATIOS))])
    return state, ratio, prior


@lru_cache(maxsize=128)
def _states(size: int, spacing: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the spectrum of the state and its ratio to the noise.

    The first row has no state; the others are ordered by autocorrelation.
    """
    products = _lag_products(size)
    states = [products @ (correlation**spacing) ** np.arange(size) for correlation in CORRELATIONS]
    state = np.concatenate([np.zeros((1, size)), np.repeat(np.array(states), len(VARIANCE_RATIOS), axis=0)])
    return state, np.concatenate([[0.0], np.tile(VARIANCE_RATIOS, len(CORRELATIONS))])


def _lag_products(size: int) -> np.ndarray:
    """Return sums of products of each cosine with itself ``k`` steps apart.

    Both directions count. The shape is ``(n, n)``.
    """
    spectrum = np.abs(np.fft.rfft(_cosine_rows(size), 2 * size, axis=1)) ** 2
    products = np.fft.irfft(spectrum, axis=1)[:, :size]
    products[:, 1:] *= 2
    return products
