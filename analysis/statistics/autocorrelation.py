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
class Grid:
    """Hold a grid of K pairs of autocorrelation and variance ratio.

    It is for series of n steps. The first pair has no state; the others are ordered by autocorrelation.

    Attributes:
        ratio: Variance of the state relative to that of the noise, ``(K,)``.
        state: Spectrum of a state of variance 1: its variance by frequency, ``(K, n)``.
        precision: One over the variance by frequency relative to the noise, ``(K, n)``.
        log_variance: Sum of the logarithms of that variance over frequencies, ``(K,)``.
    """

    ratio: np.ndarray
    state: np.ndarray
    precision: np.ndarray
    log_variance: np.ndarray


@dataclass(frozen=True)
class Posteriors:
    """Hold the posteriors of noise and state of L series over one grid.

    Attributes:
        weight: Weight of each pair, ``(L, K)``; those of a series add up to 1.
        noise: Variance of the noise, ``(L, K)``: the center of a scaled inverse chi-squared distribution.
        df: Degrees of freedom of that distribution, ``(L,)``.
        is_exact: Whether the series follows its trend exactly, ``(L,)``; it then has no posterior, and the degrees of
            freedom are those of its residuals.
        grid: The grid.
    """

    weight: np.ndarray
    noise: np.ndarray
    df: np.ndarray
    is_exact: np.ndarray
    grid: Grid


@dataclass(frozen=True)
class Posterior:
    """Hold the posterior of noise and state of one series; see ``Posteriors``."""

    weight: np.ndarray
    noise: np.ndarray
    df: float
    grid: Grid

    @property
    def variance(self) -> np.ndarray:
        """Return the variance by frequency relative to the noise, ``(K, n)``."""
        return 1 / self.grid.precision


def fit_posterior(y: np.ndarray, basis: np.ndarray, steps: np.ndarray) -> Posterior | None:
    """Return the posterior of noise and state of one series.

    The noise is not measured. The result is None if the series follows the trend exactly. Arguments as for
    ``contrasts.contrast``.
    """
    found = fit_posteriors(y[None], basis[None], float(spacing_of(steps)), np.full(1, np.nan), np.zeros(1))
    return None if found.is_exact[0] else Posterior(found.weight[0], found.noise[0], float(found.df[0]), found.grid)


def fit_posteriors(
    y: np.ndarray,
    basis: np.ndarray,
    spacing: float,
    noise: np.ndarray,
    noise_df: np.ndarray,
    persistence: tuple[float, ...] = MEASURED,
) -> Posteriors:
    """Return the posteriors of noise and state of L series.

    With z and x the cosine transforms of a series and of its trend, and v the variance by frequency of a pair, the
    likelihood depends on the series by its sums of z z / v, z x / v, and x x / v over the frequencies.

    Args:
        y: Series, ``(L, n)``.
        basis: Columns of their trends, ``(L, n, p)``.
        spacing: Training steps between consecutive values.
        noise: Mean sampling variance of the values of each series, ``(L,)``; nan if unknown.
        noise_df: Degrees of freedom behind ``noise``, ``(L,)``.
        persistence: Prior weights of ``CORRELATIONS`` if the noise is known.
    """
    num, size, columns = basis.shape
    unit = np.sqrt(residual_variances(y, basis))
    is_exact = unit <= NO_ERROR * np.maximum(1.0, np.abs(y).max(1))
    unit = np.where(is_exact, 1.0, unit)
    is_measured = np.isfinite(noise) & (noise_df > 0)
    is_measured &= ~is_exact
    extra = np.where(is_measured, np.minimum(noise_df, MAX_NOISE_WEIGHT * size), 0.0)
    squares_of_noise = np.where(is_measured, extra * np.where(is_measured, noise, 0.0) / unit**2, 0.0)
    grid = _grid(size, spacing)
    prior = np.stack((_prior(UNMEASURED, NO_STATE_UNMEASURED), _prior(persistence, NO_STATE_MEASURED)))
    both = cosines_of_each(np.concatenate((basis, (y / unit[:, None])[:, :, None]), axis=2))
    products = (both[:, :, :, None] * both[:, :, None, :]).reshape(num, size, -1)
    sums = (grid.precision @ products).reshape(num, -1, columns + 1, columns + 1)
    gram, right, squares = sums[..., :columns, :columns], sums[..., :columns, columns], sums[..., columns, columns]
    if columns == 1:
        explained, log_gram = right[..., 0] ** 2 / gram[..., 0, 0], np.log(gram[..., 0, 0])
    else:
        explained = (right * np.linalg.solve(gram, right[..., None])[..., 0]).sum(-1)
        log_gram = np.linalg.slogdet(gram)[1]
    squares = np.where(is_exact[:, None], 1.0, squares - explained + squares_of_noise[:, None])
    df = size - columns + extra
    fit = -0.5 * (grid.log_variance + log_gram + df[:, None] * np.log(squares))
    weight = prior[is_measured.astype(int)] * np.exp(fit - fit.max(1, keepdims=True))
    weight /= weight.sum(1, keepdims=True)
    return Posteriors(weight, unit[:, None] ** 2 * squares / df[:, None], df, is_exact, grid)


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
        posterior = fit_posterior(values, basis, steps)
        if posterior is not None:
            by_correlation = posterior.weight[1:].reshape(len(CORRELATIONS), -1).sum(1)
            weights = weights * by_correlation / np.array(UNMEASURED)
    prior = np.array(MEASURED) / sum(MEASURED)
    return tuple(((prior + weights / weights.sum()) / 2).tolist())


def residual_variances(y: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Return the variances of the residuals of least-squares fits, ``(L,)``.

    Args:
        y: Series, ``(L, n)``.
        basis: Columns of their trends, ``(L, n, p)``, or ``(1, n, 1)`` if equal.
    """
    if basis.shape[2] == 1:
        column = basis[:, :, 0]
        fitted = column * ((column * y).sum(1) / (column * column).sum(1))[:, None]
    else:
        pairs = zip(basis, y, strict=True)
        fitted = np.array([columns @ np.linalg.lstsq(columns, values, rcond=None)[0] for columns, values in pairs])
    return np.var(y - fitted, axis=1)


def spacing_of(steps: np.ndarray) -> np.ndarray:
    """Return the median distance of consecutive steps, over the last axis."""
    return np.median(np.diff(steps), axis=-1)


def cosines(values: np.ndarray) -> np.ndarray:
    """Return the orthonormal discrete cosine transform (type II) over the first axis."""
    return np.tensordot(_cosine_rows(len(values)), values, 1)


def cosines_of_each(values: np.ndarray) -> np.ndarray:
    """Return the ``cosines`` of each array of a stack, ``(L, n, m)``.

    Each array has its own matrix product: its digits do not depend on the others.
    """
    return _cosine_rows(values.shape[1]) @ values


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

    Weights are summed to keep the estimate. Steps are along the first axis of each array.
    """
    if len(y) <= MAX_STEPS:
        return y, basis, weights, noise, np.asarray(steps)
    starts = np.linspace(0, len(y), MAX_STEPS + 1).astype(int)[:-1]
    sizes = np.diff(np.append(starts, len(y)))

    def mean(values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values, starts, axis=0) / sizes.reshape(-1, *[1] * (values.ndim - 1))

    noise = None if noise is None else (mean(noise).T / sizes).T
    return mean(y), mean(basis), np.add.reduceat(weights, starts), noise, np.asarray(steps)[starts]


@lru_cache(maxsize=128)
def _prior(weights: tuple[float, ...], no_state: float) -> np.ndarray:
    """Return the prior of the pairs of a grid, ``(K,)``."""
    by_correlation = np.array(weights) / sum(weights) / len(VARIANCE_RATIOS)
    return np.concatenate([[no_state], (1 - no_state) * np.repeat(by_correlation, len(VARIANCE_RATIOS))])


@lru_cache(maxsize=64)
def _grid(size: int, spacing: float) -> Grid:
    """Return the grid of a series of a number of steps."""
    products = _lag_products(size)
    states = [products @ (correlation**spacing) ** np.arange(size) for correlation in CORRELATIONS]
    state = np.concatenate([np.zeros((1, size)), np.repeat(np.array(states), len(VARIANCE_RATIOS), axis=0)])
    ratio = np.concatenate([[0.0], np.tile(VARIANCE_RATIOS, len(CORRELATIONS))])
    variance = 1 + ratio[:, None] * state
    return Grid(ratio, state, 1 / variance, np.log(variance).sum(1))


def _lag_products(size: int) -> np.ndarray:
    """Return sums of products of each cosine with itself ``k`` steps apart.

    Both directions count. The shape is ``(n, n)``.
    """
    spectrum = np.abs(np.fft.rfft(_cosine_rows(size), 2 * size, axis=1)) ** 2
    products = np.fft.irfft(spectrum, axis=1)[:, :size]
    products[:, 1:] *= 2
    return products
