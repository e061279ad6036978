"""Estimate linear functions of a series of autocorrelated steps.

A contrast is ``weights . y`` of a series ``y`` of steps, such as its level, or its change between two steps. Its
interval is the posterior of ``weights . (y - X b)`` under the model of ``autocorrelation``: a mixture of Student's t
distributions, one per pair of autocorrelation and variance ratio.
"""

from __future__ import annotations

import numpy as np

from entrace.analysis.statistics.autocorrelation import (
    MEASURED,
    VARIANCE_RATIOS,
    cosines,
    fit_posterior,
    from_cosines,
    residual_variance,
    shorten,
)
from entrace.analysis.statistics.estimates import Estimate
from entrace.analysis.statistics.mixture import summarize_mixture

# Smallest noise of a step relative to the average step: a step whose prompts all agree still has some.
MIN_RELATIVE_NOISE = 0.05


def contrast(
    y: np.ndarray,
    basis: np.ndarray,
    weights: np.ndarray,
    *,
    steps: np.ndarray,
    noise: np.ndarray | None = None,
    noise_df: float = 0.0,
    num_relevant: int | None = None,
    persistence: tuple[float, ...] = MEASURED,
    of: str = "steps",
    n: int | None = None,
) -> Estimate:
    """Estimate ``weights . y``; the interval accounts for autocorrelation.

    The module describes the model.

    Args:
        y: One value per recorded step, shape ``(n,)``.
        basis: Columns of the trend, ``(n, p)``; they affect the interval, not the value.
        weights: Weight of each step, ``(n,)``.
        steps: Training steps of the values, ascending.
        noise: Sampling variance of each value, ``(n,)``, from the prompts of the step; None if unknown.
        noise_df: Degrees of freedom behind ``noise``.
        num_relevant: Number of steps that the estimate is about (default all); scales ``Estimate.blocks``.
        persistence: Prior weights of ``CORRELATIONS`` if the noise is known; see ``autocorrelation.persistence_of``.
        of: Name of the units.
        n: Number of units (default the number of steps).

    Returns:
        The estimate. ``blocks`` is the effective number of independent steps: the number of steps divided by the factor
        by which autocorrelation inflates the variance, averaged over noise and state by their contribution to it.
    """
    value = float(weights @ y)
    count = len(y) if n is None else n
    y, basis, weights, noise, steps = shorten(y, basis, weights, noise, steps)
    size, columns = basis.shape
    if size <= columns:
        return Estimate(value, -np.inf, np.inf, 1.0, count, of, np.nan, 0.0, 0.0)
    part = float(num_relevant or size)
    # Noise that is negligible beside the state need not be known.
    if noise is not None and float(noise.mean()) * max(VARIANCE_RATIOS) <= residual_variance(y, basis):
        noise = None
    if noise is not None and noise.mean() > 0:
        # Scaling by its noise gives every step unit noise, so steps with few prompts count less. The noise is smoothed
        # because that of a single step correlates with its value, which would look like a state.
        unit = np.sqrt(np.maximum(_smooth(noise / noise.mean()), MIN_RELATIVE_NOISE))
        y, basis, weights = y / unit, basis / unit[:, None], weights * unit
    posterior = fit_posterior(y, basis, steps, noise, noise_df, persistence)
    if posterior is None:
        return Estimate.from_error(value, 0.0, size - columns, count, of, blocks=part)
    white = float(weights @ weights)
    drift = posterior.state @ cosines(weights) ** 2
    spread = white + posterior.ratio * drift
    # Only the state is autocorrelated: noise and state count by their contribution to the error.
    inflation = (white + posterior.ratio * drift * drift / white) / spread
    blocks = part / float(posterior.weight @ inflation)
    scale = np.sqrt(posterior.noise * spread)
    return summarize_mixture(value, posterior.weight, scale, posterior.df, count, of, min(blocks, part))


def draw_contrasts(
    y: np.ndarray, basis: np.ndarray, weights: np.ndarray, steps: np.ndarray, draws: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw several contrasts jointly from their posterior.

    Arguments as for ``contrast``, with ``weights`` of shape ``(m, n)``.

    Returns:
        Draws, shape ``(draws, m)``.
    """
    values = weights @ y
    y, basis, transposed, _, steps = shorten(y, basis, weights.T, None, steps)
    posterior = fit_posterior(y, basis, steps, None, 0.0)
    if posterior is None:
        return np.tile(values, (draws, 1))
    a = cosines(transposed)
    chosen = rng.choice(len(posterior.weight), size=draws, p=posterior.weight)
    noise = posterior.noise[chosen] * posterior.df / rng.chisquare(posterior.df, draws)
    roots = np.linalg.cholesky(np.einsum("fi,kf,fj->kij", a, posterior.variance, a))
    normal = rng.normal(size=(draws, len(values)))
    return values + np.sqrt(noise)[:, None] * np.einsum("dij,dj->di", roots[chosen], normal)


def draw_errors(
    residuals: np.ndarray, basis: np.ndarray, steps: np.ndarray, draws: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw errors (noise plus drifting state) of several series from their posterior.

    The draws keep the correlation between series of their residuals, which shared prompts cause.

    Args:
        residuals: Residuals of the series around a trend, ``(n, S)``, at most ``MAX_STEPS`` steps.
        basis: Columns of that trend, ``(n, p)``.
        steps: Training steps, ascending.
        draws: Number of draws.
        rng: Source of randomness.

    Returns:
        Draws, shape ``(n, S, draws)``.
    """
    size, series = residuals.shape
    spread = residuals.std(0) > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = np.atleast_2d(np.corrcoef(residuals.T))
    correlation[~(spread[:, None] & spread[None, :])] = 0
    np.fill_diagonal(correlation, 1)
    values, vectors = np.linalg.eigh(correlation)
    root = vectors * np.sqrt(np.maximum(values, 0))
    errors = np.einsum("st,ntd->nsd", root, rng.normal(size=(size, series, draws)))
    for i in range(series):
        posterior = fit_posterior(residuals[:, i], basis, steps, None, 0.0)
        if posterior is None:
            errors[:, i] = 0
            continue
        chosen = rng.choice(len(posterior.weight), size=draws, p=posterior.weight)
        noise = posterior.noise[chosen] * posterior.df / rng.chisquare(posterior.df, draws)
        errors[:, i] *= np.sqrt(noise * posterior.variance[chosen].T)
    return from_cosines(errors)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Return the moving average over a tenth of the series."""
    window = np.ones(2 * (len(values) // 20) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
