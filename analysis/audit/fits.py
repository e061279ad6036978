"""Fit temperature and truncation to recorded values and to sampled tokens.

Recorded values have one distribution that reproduces each of them, up to rounding. Sampled tokens have a likelihood. If
both fits agree, the numbers describe the distribution that was sampled from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

from entrace.analysis.audit.distributions import MIN_P, NODES, TOP_K, TOP_P, Distributions, Truncation

# Difference at which a token counts as not explained, in nats; differences are clipped there in a fit.
FAR = 1.0
# Standard errors of an interval, and the error of interpolation in ln T.
Z, INTERPOLATION = 1.96, 2e-4
# Tokens with which truncations are searched.
SEARCHED = 2000
# Entropy from which a token tells about a truncation, in nats.
UNCERTAIN = 0.1
# Share of tokens that may be outside of a truncation, such as tokens that were not sampled.
OUTSIDE = 1e-3
# Loss of a fit without truncation, and its ratio to that with one, from which truncations are tried and preferred.
MIN_LOSS, MIN_RATIO = 2e-3, 2.0
# Share of tokens that the model hardly ever samples, from which these are not samples.
MAX_UNLIKELY = 0.003
# Gain in log-likelihood from which sampling counts as truncated.
MIN_GAIN = 12.0


@dataclass(frozen=True)
class Fit:
    """Hold the distribution that explains values best.

    Attributes:
        x: ln of the inverse temperature.
        error: Standard error of x.
        truncation: The truncation, or None.
        limits: Interval of its limit.
        loss: Mean difference, clipped to ``FAR``, in nats; for sampled tokens, the mean negative log-likelihood.
    """

    x: float
    error: float
    truncation: Truncation | None = None
    limits: tuple[float, float] = (0.0, 0.0)
    loss: float = 0.0

    @property
    def temperature(self) -> float:
        """Return the temperature."""
        return float(np.exp(-self.x))

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95% interval of the temperature."""
        width = Z * self.error
        return float(np.exp(-self.x - width)), float(np.exp(-self.x + width))

    def __str__(self) -> str:
        low, high = self.interval
        text = f"temperature {self.temperature:.3f} [{low:.3f}, {high:.3f}]"
        if self.truncation is None:
            return text
        if self.truncation.kind == TOP_K:
            return f"{text}, {TOP_K} {self.truncation.limit:.0f}"
        return f"{text}, {self.truncation} [{self.limits[0]:.3g}, {self.limits[1]:.3g}]"

    def logprob(self, model: Distributions) -> np.ndarray:
        """Return the log-probability of each token, (N,).

        The value is NaN where the truncation is unknown.
        """
        found = model.logprob(self.x)
        return found if self.truncation is None else found - model.log_mass(self.x, self.truncation)

    def entropy(self, model: Distributions) -> np.ndarray:
        """Return the entropy at each token, (N,); NaN where the truncation is unknown."""
        if self.truncation is None:
            return model.entropy(self.x)
        return model.truncated_entropy(self.x, self.truncation)


def fit_logprobs(model: Distributions, values: np.ndarray, responses: np.ndarray) -> Fit:
    """Fit temperature and truncation to recorded log-probabilities.

    Args:
        model: Distributions of the model at the tokens.
        values: Recorded values, (N,).
        responses: Response of each token, (N,), by which errors are clustered.
    """
    whole = fit_values(model.logprob, model.slope, values, responses)
    if whole.loss < MIN_LOSS:
        return whole
    cut = _fit_truncated(model, values, responses, whole.x)
    return cut if cut and whole.loss > MIN_RATIO * cut.loss else whole


def fit_entropies(
    model: Distributions, values: np.ndarray, responses: np.ndarray, truncation: Truncation | None = None
) -> Fit:
    """Fit a temperature to recorded entropies.

    The entropies are of the whole vocabulary or of the given truncation.
    """
    whole = fit_values(model.entropy, None, values, responses)
    if truncation is None or whole.loss < MIN_LOSS:
        return whole
    cut = fit_values(lambda x: model.truncated_entropy(x, truncation), None, values, responses)
    cut = replace(cut, truncation=truncation, limits=(truncation.limit, truncation.limit))
    return cut if whole.loss > MIN_RATIO * cut.loss else whole


def fit_values(
    predict: Callable[[float], np.ndarray],
    slope: Callable[[float], np.ndarray] | None,
    values: np.ndarray,
    responses: np.ndarray,
) -> Fit:
    """Fit x to values by the mean absolute difference, clipped to ``FAR``.

    The error is a sandwich estimate over responses.

    Args:
        predict: Return the values at x, (N,).
        slope: Return their derivative at x; None to difference ``predict``.
        values: Recorded values, (N,).
        responses: Response of each token, (N,).
    """

    def loss(x: float) -> float:
        return _loss(values - predict(x))

    losses = [loss(x) for x in NODES]
    best = int(np.argmin(losses))
    bounds = (NODES[max(best - 1, 0)], NODES[min(best + 1, len(NODES) - 1)])
    x = _minimum(loss, bounds)
    # Values of temperature 1 and of other nodes are exact there.
    x = min((x, *NODES), key=lambda at: loss(at) - (1e-5 if at in NODES else 0.0))
    return Fit(x, _error(predict, slope, values, responses, x), loss=loss(x))


def fit_sampling(model: Distributions) -> Fit:
    """Fit temperature and truncation to the sampled tokens by maximum likelihood.

    Tokens that a policy hardly ever samples, see ``is_unlikely``, are left out if there are many.
    """
    unlikely = is_unlikely(model)
    # Without a fault, leaving them out would bias the temperature.
    model = model.take(~unlikely) if unlikely.mean() > MAX_UNLIKELY else model

    def loss(x: float) -> float:
        return -float(model.logprob(x).mean())

    x = _minimize(loss)
    cut = _sampling_truncated(model)
    size = len(model)
    if cut and (loss(x) - cut.loss) * size > MIN_GAIN:
        return cut
    # The variance of the score is the information.
    information = float((np.exp(2 * x) * _variances(model, x)).sum())
    return Fit(x, 1 / np.sqrt(max(information, 1e-12)), loss=loss(x))


def is_unlikely(model: Distributions) -> np.ndarray:
    """Return which tokens are unlikely at every temperature up to 1.2, (N,).

    An unlikely token has a probability below exp(-7) / V. Less than exp(-7) = 0.1% of the tokens that a policy samples
    are unlikely.
    """
    limit = -np.log(model.num_entries) - 7
    return (model.logprob(0.0) < limit) & (model.logprob(-np.log(1.2)) < limit)


def _minimize(loss: Callable[[float], float]) -> float:
    best = int(np.argmin([loss(x) for x in NODES]))
    bounds = (NODES[max(best - 1, 0)], NODES[min(best + 1, len(NODES) - 1)])
    return _minimum(loss, bounds)


def _minimum(loss: Callable[[float], float], bounds: tuple[float, float]) -> float:
    found: Any = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-5})
    return float(found.x)


def _variances(model: Distributions, x: float) -> np.ndarray:
    """Return L'' at x, (N,), from the nearest node."""
    return model.variance[:, int(np.argmin(np.abs(NODES - x)))]


def _loss(difference: np.ndarray) -> float:
    known = difference[~np.isnan(difference)]
    return float(np.minimum(np.abs(known), FAR).mean()) if len(known) else FAR


def _error(
    predict: Callable[[float], np.ndarray],
    slope: Callable[[float], np.ndarray] | None,
    values: np.ndarray,
    responses: np.ndarray,
    x: float,
) -> float:
    """Return the standard error of x: Huber's sandwich, clustered by response."""
    difference = values - predict(x)
    step = 1e-3
    slopes = slope(x) if slope else (predict(x + step) - predict(x - step)) / (2 * step)
    is_near = np.abs(difference) < FAR
    if not is_near.any():
        return 1.0
    difference, slopes, responses = difference[is_near], slopes[is_near], responses[is_near]
    bend = max(1.345 * 1.4826 * float(np.median(np.abs(difference))), 1e-6)
    weights = np.minimum(1.0, bend / np.maximum(np.abs(difference), 1e-12))
    scores = weights * difference * slopes
    sums = np.bincount(np.unique(responses, return_inverse=True)[1], scores)
    curvature = float((weights * slopes**2).sum())
    return float(np.sqrt((sums**2).sum()) / max(curvature, 1e-12)) + INTERPOLATION


def _fit_truncated(model: Distributions, values: np.ndarray, responses: np.ndarray, start: float) -> Fit | None:
    """Return the best fit with a truncation, or None without informative tokens.

    ``start`` is x without a truncation.
    """
    tells = np.flatnonzero(model.entropy(0.0) > UNCERTAIN)
    if len(tells) < 100:
        return None
    tells = tells[:: max(1, len(tells) // SEARCHED)]
    part, given = model.take(tells), values[tells]
    found: tuple[float, float, Truncation] | None = None
    for x in (start, *NODES):
        masses = part.masses(x)
        plain = part.logprob(x)
        for truncation, _ in _candidates(part, x, masses, np.exp(plain - given)):
            loss = _loss(given - plain + part.log_mass(x, truncation, masses))
            if found is None or loss < found[0]:
                found = (loss, float(x), truncation)
    if found is None:
        return None
    _, x, truncation = found
    limits = (truncation.limit, truncation.limit)
    # The limit and the temperature determine each other.
    for _ in range(2):
        x = _nearest(part, given, truncation, x)
        masses = part.masses(x)
        for other, of_other in _candidates(part, x, masses, np.exp(part.logprob(x) - given)):
            if other.kind == truncation.kind:
                truncation, limits = other, of_other

    def predict(at: float) -> np.ndarray:
        return model.logprob(at) - model.log_mass(at, truncation)

    x = _minimum(lambda at: _loss(values - predict(at)), (x - 0.01, x + 0.01))
    return Fit(x, _error(predict, model.slope, values, responses, x), truncation, limits, _loss(values - predict(x)))


def _nearest(model: Distributions, values: np.ndarray, truncation: Truncation, x: float) -> float:
    """Return the x near ``x`` at which a truncation explains values best."""

    def loss(at: float) -> float:
        return _loss(values - model.logprob(at) + model.log_mass(at, truncation))

    return float(min(np.linspace(x - 0.09, x + 0.09, 37), key=loss))


def _candidates(
    model: Distributions, x: float, masses: np.ndarray, kept: np.ndarray
) -> list[tuple[Truncation, tuple[float, float]]]:
    """Return one truncation per kind, which explains the kept masses best.

    Each truncation comes with the interval of its limit.

    Args:
        model: Distributions at N tokens.
        x: ln of the inverse temperature.
        masses: Masses of the likeliest entries, (N, M).
        kept: Mass that would explain the recorded value of each token, (N,).
    """
    number = np.abs(masses - kept[:, None]).argmin(1)
    rows = np.arange(len(model))
    # The whole vocabulary tells little, and a mass above 1 is impossible.
    tells = (kept < 1 - 1e-4) & (kept > 1e-3)
    if tells.sum() < 30:
        return []
    number, rows = number[tells], rows[tells]
    sizes = np.bincount(number + 1)
    size = int(sizes.argmax())
    found = [(Truncation(TOP_K, size), (float(size), float(size)))]
    low = np.where(number > 0, masses[rows, np.maximum(number - 1, 0)], 0.0)
    if limits := _most_covered(low, masses[rows, number]):
        found.append((Truncation(TOP_P, sum(limits) / 2), limits))
    ratios = np.exp(np.exp(x) * model.top)
    last = ratios.shape[1] - 1
    below = np.where(number < last, ratios[rows, np.minimum(number + 1, last)], 0.0)
    if limits := _most_covered(below, ratios[rows, number]):
        found.append((Truncation(MIN_P, sum(limits) / 2), limits))
    return found


def _most_covered(low: np.ndarray, high: np.ndarray) -> tuple[float, float] | None:
    """Return the range that most of the intervals (low, high] cover.

    The result is None if the intervals are empty.
    """
    ends = np.concatenate([low, high])
    signs = np.concatenate([np.ones(len(low)), -np.ones(len(high))])
    order = np.lexsort((signs, ends))
    covered = signs[order].cumsum()
    best = int(covered.argmax())
    if best + 1 >= len(ends):
        return None
    return float(ends[order][best]), float(ends[order][best + 1])


def _sampling_truncated(model: Distributions) -> Fit | None:
    """Return the likeliest temperature and truncation of the sampled tokens.

    The likelihood is (1 - e) q + e p, where q is the truncated distribution, p the whole one, and e = ``OUTSIDE``.
    """
    part = model.take(np.arange(0, len(model), max(1, len(model) // SEARCHED)))
    best: tuple[float, float, Truncation] | None = None
    for x in NODES[::2]:
        masses = part.masses(x)
        for truncation in _sampled_limits(part, x, masses):
            value = _sampling_loss(part, x, truncation, masses)
            if best is None or value < best[0]:
                best = (value, float(x), truncation)
    if best is None:
        return None
    kind, center = best[2].kind, best[1]
    best = None
    for x in np.linspace(center - 0.16, center + 0.16, 17):
        masses = model.masses(x)
        for truncation in _sampled_limits(model, x, masses):
            if truncation.kind != kind:
                continue
            value = _sampling_loss(model, x, truncation, masses)
            if best is None or value < best[0]:
                best = (value, float(x), truncation)
    if best is None:
        return None
    value, x, truncation = best
    step = 0.02
    around = [_sampling_loss(model, x + by, truncation) for by in (-step, step)]
    curvature = (sum(around) - 2 * value) / step**2 * len(model)
    error = 1 / np.sqrt(curvature) if curvature > 1 else 1.0
    return Fit(x, float(np.hypot(error, 0.01)), truncation, (truncation.limit, truncation.limit), value)


def _sampled_limits(model: Distributions, x: float, masses: np.ndarray) -> list[Truncation]:
    """Return truncations that exclude no sampled token, or a share ``OUTSIDE``."""
    rank = np.minimum(model.rank, model.top.shape[1] - 1)
    before = np.where(rank > 0, masses[np.arange(len(model)), np.maximum(rank - 1, 0)], 0.0)
    ratio = np.exp(np.exp(x) * model.own)
    found = []
    for share in (0.0, OUTSIDE):
        found.append(Truncation(TOP_P, float(np.quantile(before, 1 - share, method="higher")) + 1e-6))
        found.append(Truncation(MIN_P, max(float(np.quantile(ratio, share, method="lower")) * (1 - 1e-6), 1e-12)))
        if (size := int(np.quantile(model.rank, 1 - share, method="higher")) + 1) < model.top.shape[1]:
            found.append(Truncation(TOP_K, size))
    return found


def _sampling_loss(model: Distributions, x: float, truncation: Truncation, masses: np.ndarray | None = None) -> float:
    """Return the mean negative log-likelihood of the sampled tokens."""
    masses = model.masses(x) if masses is None else masses
    log_mass = np.nan_to_num(model.log_mass(x, truncation, masses))
    is_inside = model.rank < np.nan_to_num(model.kept(x, truncation, masses), nan=np.inf)
    whole = model.logprob(x) + np.log(OUTSIDE)
    kept = model.logprob(x) - log_mass + np.log1p(-OUTSIDE)
    return -float(np.where(is_inside, np.logaddexp(kept, whole), whole).mean())
