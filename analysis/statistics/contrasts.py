"""Estimate linear functions of a series of autocorrelated steps.

A contrast is ``weights . y`` of a series ``y`` of steps, such as its level, or its change between two steps. Its
interval is the posterior of ``weights . (y - X b)`` under the model of ``autocorrelation``: a mixture of Student's t
distributions, one per pair of autocorrelation and variance ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from entrace.analysis.statistics.autocorrelation import (
    MEASURED,
    VARIANCE_RATIOS,
    cosines,
    cosines_of_each,
    fit_posterior,
    fit_posteriors,
    from_cosines,
    residual_variances,
    shorten,
    spacing_of,
)
from entrace.analysis.statistics.estimates import Estimate, Estimates
from entrace.analysis.statistics.mixture import summarize_mixtures

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
    variances = np.full(size, np.nan) if noise is None else noise
    given = y[None], basis, weights, float(spacing_of(steps)), variances[None], np.full(1, noise_df)
    found = posterior_errors(*given, persistence)
    return found.estimates(np.array([value]), np.array([count]), np.array([part])).one(0, of)


@dataclass(frozen=True)
class Errors:
    """Hold the posteriors of the errors of L contrasts.

    Each is a mixture of K t distributions.

    Attributes:
        weight: Weight of each distribution, ``(L, K)``.
        scale: Scale of each distribution, ``(L, K)``.
        df: Degrees of freedom of all distributions of a mixture, ``(L,)``.
        inflation: Factor by which autocorrelation inflates the variance, ``(L,)``.
        is_exact: Whether a series follows its trend exactly, ``(L,)``; the error is then 0.
    """

    weight: np.ndarray
    scale: np.ndarray
    df: np.ndarray
    inflation: np.ndarray
    is_exact: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence[Errors]) -> Errors:
        """Return the errors of all parts, one after the other."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def estimates(
        self, values: np.ndarray, n: np.ndarray, steps: np.ndarray, with_errors: bool = True, with_p_values: bool = True
    ) -> Estimates:
        """Return the estimates of the contrasts.

        Args:
            values: Values of the contrasts, ``(L,)``.
            n: Number of units behind each, ``(L,)``.
            steps: Number of steps that each is about, ``(L,)``.
            with_errors: See ``mixture.summarize_mixtures``.
            with_p_values: See ``mixture.summarize_mixtures``.
        """
        # Values too large for floats have no posterior.
        is_mixture = ~self.is_exact & np.isfinite(self.weight).all(1) & np.isfinite(self.scale).all(1)
        found = Estimates.from_errors(values, np.where(self.is_exact, 0.0, np.nan), self.df, n, steps)
        if is_mixture.any():
            mixtures = values, self.weight, self.scale, self.df[:, None], n, np.minimum(steps / self.inflation, steps)
            kept = {"with_errors": with_errors, "with_p_values": with_p_values}
            found.put(is_mixture, summarize_mixtures(*(column[is_mixture] for column in mixtures), **kept))
        return found


def posterior_errors(
    y: np.ndarray,
    basis: np.ndarray,
    weights: np.ndarray,
    spacing: float,
    noise: np.ndarray,
    noise_df: np.ndarray,
    persistence: tuple[float, ...] = MEASURED,
) -> Errors:
    """Return the posteriors of the errors of one contrast of L series.

    Args:
        y: Series, ``(L, n)``, at most ``MAX_STEPS`` steps.
        basis: Columns of their trend, ``(n, p)``, p < n.
        weights: Weight of each step, ``(n,)``.
        spacing: Training steps between consecutive values.
        noise: Sampling variance of each value, ``(L, n)``; nan if unknown.
        noise_df: Degrees of freedom behind ``noise``, ``(L,)``.
        persistence: See ``contrast``.
    """
    mean_noise = noise.mean(1)
    # Noise that is negligible beside the state need not be known.
    is_known = mean_noise * max(VARIANCE_RATIOS) > residual_variances(y, basis[None])
    mean_noise = np.where(is_known, mean_noise, np.nan)
    # Scaling by its noise gives every step unit noise, so steps with few prompts count less. The noise is smoothed
    # because that of a single step correlates with its value, which would look like a state.
    unit = np.ones(y.shape)
    relative = noise[is_known] / mean_noise[is_known, None]
    unit[is_known] = np.sqrt(np.maximum(_smooth(relative), MIN_RELATIVE_NOISE))
    y, bases, weights = y / unit, basis / unit[:, :, None], weights * unit
    posterior = fit_posteriors(y, bases, spacing, mean_noise, noise_df, persistence)
    grid, white = posterior.grid, (weights * weights).sum(1, keepdims=True)
    squares = cosines_of_each(weights[:, :, None]) ** 2
    drift = (grid.state @ squares)[:, :, 0]
    spread = white + grid.ratio * drift
    # Only the state is autocorrelated: noise and state count by their contribution to the error.
    inflation = (white + grid.ratio * drift * drift / white) / spread
    scale = np.sqrt(posterior.noise * spread)
    inflation = (posterior.weight * inflation).sum(1)
    return Errors(posterior.weight, scale, posterior.df, inflation, posterior.is_exact)


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
    posterior = fit_posterior(y, basis, steps)
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
        posterior = fit_posterior(residuals[:, i], basis, steps)
        if posterior is None:
            errors[:, i] = 0
            continue
        chosen = rng.choice(len(posterior.weight), size=draws, p=posterior.weight)
        noise = posterior.noise[chosen] * posterior.df / rng.chisquare(posterior.df, draws)
        errors[:, i] *= np.sqrt(noise * posterior.variance[chosen].T)
    return from_cosines(errors)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Return the moving averages over a tenth of each series, ``(L, n)``."""
    size = values.shape[1]
    reach = size // 20
    if not reach:
        return values
    padded = np.zeros((len(values), size + 2 * reach))
    padded[:, reach : reach + size] = values
    place = np.arange(size)
    number = np.minimum(place + reach, size - 1) - np.maximum(place - reach, 0) + 1
    return sum(padded[:, start : start + size] for start in range(2 * reach + 1)) / number
