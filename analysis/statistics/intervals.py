"""Intervals of everything that is reported: one implementation for scorecard, comparison, tables, figures, and SQL.

Two kinds of dependence matter. Tokens of a response, and responses of a prompt, are drawn together: prompts are the
clusters. Steps share the policy, which drifts: the mean of a step is a drifting state plus the noise of that step's
prompts.

``contrast`` handles the second kind. With ``y`` a value per step, ``X`` the columns of its trend (one column of ones
for a level), and ``a`` weights with estimate ``a . y``,

    y = X b + noise + state,    var(noise) = s,    state ~ AR(1) with autocorrelation r, variance L s.

The interval is the posterior of ``a . y - a . X b`` over r and L, each on a grid (flat prior on ``log s`` and ``b``), a
mixture of Student's t distributions. It averages over what n steps cannot tell apart, where a plug-in (block length,
bandwidth, or lag-1 autocorrelation) would be wrong in one direction. The spread of prompts within steps measures s
directly. In the basis of the discrete cosine transform the covariance of an AR(1) is diagonal to good accuracy, so
that a likelihood costs O(n); its diagonal is exact. References: Harville, Biometrika 61 (1974) for the likelihood of
the residuals; Mueller, J. Bus. Econ. Stat. 32 (2014) for the failure of plug-in corrections under strong
autocorrelation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from entrace.analysis.statistics.estimates import CONFIDENCE, Estimate
from entrace.analysis.verdict_rules import MIN_RUNS

# Autocorrelation of the state from one training step to the next, and its prior weight. Where the noise of steps is
# measured, a state shows as what exceeds it. Where it is not, only the order of steps can tell, and slow states, which
# matter most, hide in the trend: they get more weight, and so does that there is a state at all.
CORRELATIONS = (0.0, 0.3, 0.5, 0.65, 0.8, 0.9, 0.95, 0.98)
MEASURED = (1.0, 0.7, 1.0, 1.0, 1.0, 1.5, 2.0, 1.5)
UNMEASURED = (0.5, 0.5, 1.0, 1.0, 1.0, 2.0, 4.0, 4.0)
# Variance of the state relative to that of the noise.
VARIANCE_RATIOS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2, 102.4, 409.6)
NO_STATE_MEASURED, NO_STATE_UNMEASURED = 0.5, 0.1
# Prior weight of runs whose effects are alike, so that they differ by their errors alone.
ALIKE = 0.2
# Longer series are averaged over neighboring steps until they are this short.
MAX_STEPS = 600
# Mixture components of less weight do not matter to an interval.
NEGLIGIBLE = 1e-6
# How often the degrees of freedom of the residuals the measured noise may count: prompts are not quite normal.
MAX_NOISE_WEIGHT = 10
# Below it an error is rounding.
NO_ERROR = 1e-9
# Of a step whose prompts all agree, and of a run whose steps do.
MIN_RELATIVE_NOISE = 0.05
MIN_BLOCKS = 3.0
# Beyond it, Student's t is normal.
MAX_DF = 1e9

# From totals, shape (..., values), to an effect, shape (...).
Effect = Callable[[np.ndarray], np.ndarray]


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
    """Estimate ``weights . y`` with an interval robust to autocorrelation; see the module.

    Args:
        y: One value per recorded step, shape ``(n,)``.
        basis: Columns of the trend, ``(n, p)``; the estimate depends on ``y`` through ``weights`` alone.
        weights: Shape ``(n,)``.
        steps: Training steps of the values, ascending.
        noise: Sampling variance of each value, ``(n,)``, where known from the prompts of the step.
        noise_df: Degrees of freedom behind ``noise``.
        num_relevant: Steps that the estimate is about, if not all; scales ``Estimate.blocks``.
        persistence: Prior weight of each of ``CORRELATIONS`` where the noise is known; see ``persistence_of``.
        of: What the estimate counts.
        n: Number of these; the number of steps if not given.

    Returns:
        ``blocks`` is the effective number of independent steps: their number over the factor by which autocorrelation
        inflates the variance, averaged over noise and state by their part in it.
    """
    value = float(weights @ y)
    count = len(y) if n is None else n
    y, basis, weights, noise, steps = _shorten(y, basis, weights, noise, steps)
    size, columns = basis.shape
    if size <= columns:
        return Estimate(value, -np.inf, np.inf, 1.0, count, of, np.nan, 0.0, 0.0)
    part = float(num_relevant or size)
    # Noise that hardly matters beside the state need not be known.
    if noise is not None and float(noise.mean()) * max(VARIANCE_RATIOS) <= _residual_variance(y, basis):
        noise = None
    if noise is not None and noise.mean() > 0:
        # In units of its own noise, every step has the same: one with few prompts says less. The noise of single steps
        # goes along with their values, which would pass for a state.
        unit = np.sqrt(np.maximum(_smooth(noise / noise.mean()), MIN_RELATIVE_NOISE))
        y, basis, weights = y / unit, basis / unit[:, None], weights * unit
    posterior = _posterior(y, basis, steps, noise, noise_df, persistence)
    if posterior is None:
        return Estimate.from_error(value, 0.0, size - columns, count, of, blocks=part)
    white = float(weights @ weights)
    drift = posterior.state @ _cosines(weights) ** 2
    spread = white + posterior.ratio * drift
    # The state repeats itself, the noise does not: each counts as far as it makes the error.
    inflation = (white + posterior.ratio * drift * drift / white) / spread
    blocks = part / float(posterior.weight @ inflation)
    scale = np.sqrt(posterior.noise * spread)
    return _from_mixture(value, posterior.weight, scale, posterior.df, count, of, min(blocks, part))


def draw_contrasts(
    y: np.ndarray, basis: np.ndarray, weights: np.ndarray, steps: np.ndarray, draws: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw several contrasts together from their posterior; arguments as for ``contrast``, ``weights`` ``(m, n)``.

    Returns:
        Shape ``(draws, m)``.
    """
    values = weights @ y
    y, basis, transposed, _, steps = _shorten(y, basis, weights.T, None, steps)
    posterior = _posterior(y, basis, steps, None, 0.0)
    if posterior is None:
        return np.tile(values, (draws, 1))
    a = _cosines(transposed)
    chosen = rng.choice(len(posterior.weight), size=draws, p=posterior.weight)
    noise = posterior.noise[chosen] * posterior.df / rng.chisquare(posterior.df, draws)
    roots = np.linalg.cholesky(np.einsum("fi,kf,fj->kij", a, posterior.variance, a))
    normal = rng.normal(size=(draws, len(values)))
    return values + np.sqrt(noise)[:, None] * np.einsum("dij,dj->di", roots[chosen], normal)


def draw_errors(
    residuals: np.ndarray, basis: np.ndarray, steps: np.ndarray, draws: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw errors (noise plus drifting state) of several series from their posterior; see the module.

    Series keep the correlation of their residuals, which prompts of a common batch cause.

    Args:
        residuals: Of the series around a trend, ``(n, S)``, at most ``MAX_STEPS`` steps.
        basis: Columns of that trend, ``(n, p)``.
        steps: Training steps, ascending.
        draws: Number of draws.
        rng: Source of randomness.

    Returns:
        Shape ``(n, S, draws)``.
    """
    from scipy import fft

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
        posterior = _posterior(residuals[:, i], basis, steps, None, 0.0)
        if posterior is None:
            errors[:, i] = 0
            continue
        chosen = rng.choice(len(posterior.weight), size=draws, p=posterior.weight)
        noise = posterior.noise[chosen] * posterior.df / rng.chisquare(posterior.df, draws)
        errors[:, i] *= np.sqrt(noise * posterior.variance[chosen].T)
    return np.asarray(fft.idct(errors, type=2, norm="ortho", axis=0))


@dataclass(frozen=True)
class _Posterior:
    """Posterior of noise and state of a series over the grid of K pairs of autocorrelation and variance ratio.

    Attributes:
        weight: Of each pair, ``(K,)``, adds up to 1.
        noise: Variance of the noise, ``(K,)``, the center of a scaled inverse chi-squared with ``df``.
        df: Degrees of freedom.
        ratio: Variance of the state relative to that of the noise, ``(K,)``.
        state: Variance of a state of variance 1 by frequency, ``(K, n)``.
    """

    weight: np.ndarray
    noise: np.ndarray
    df: float
    ratio: np.ndarray
    state: np.ndarray

    @property
    def variance(self) -> np.ndarray:
        """Variance by frequency relative to the noise, ``(K, n)``."""
        return 1 + self.ratio[:, None] * self.state


def persistence_of(series: np.ndarray, basis: np.ndarray, steps: np.ndarray) -> tuple[float, ...]:
    """Return prior weights of ``CORRELATIONS`` for a run, from series that it recorded at every step.

    States of one policy are taken to persist alike: a few captured steps cannot tell how slowly they drift, but entropy
    and accuracy of all steps can. Half of the weight is the prior, half the prior times the likelihood of each
    autocorrelation in each series: states need not all be alike.

    Args:
        series: Such series, ``(n, S)``.
        basis: Columns of their trend, ``(n, p)``.
        steps: Training steps, ascending.
    """
    weights = np.array(MEASURED)
    for values in series.T:
        posterior = _posterior(values, basis, steps, None, 0.0)
        if posterior is not None:
            by_correlation = posterior.weight[1:].reshape(len(CORRELATIONS), -1).sum(1)
            weights = weights * by_correlation / np.array(UNMEASURED)
    prior = np.array(MEASURED) / sum(MEASURED)
    return tuple(((prior + weights / weights.sum()) / 2).tolist())


def _posterior(
    y: np.ndarray,
    basis: np.ndarray,
    steps: np.ndarray,
    noise: np.ndarray | None,
    noise_df: float,
    persistence: tuple[float, ...] = MEASURED,
) -> _Posterior | None:
    """Return the posterior of noise and state, or None for a series that follows the trend exactly."""
    size, columns = basis.shape
    unit = np.sqrt(_residual_variance(y, basis))
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
    z, x = _cosines(y / unit), _cosines(basis)
    scaled = x / variance[:, :, None]
    gram, right = scaled.transpose(0, 2, 1) @ x, scaled.transpose(0, 2, 1) @ z
    explained = (right * np.linalg.solve(gram, right[..., None])[..., 0]).sum(1)
    squares = (z**2 / variance).sum(1) - explained + extra * measured
    df = size - columns + extra
    fit = -0.5 * (np.log(variance).sum(1) + np.linalg.slogdet(gram)[1] + df * np.log(squares))
    weight = prior * np.exp(fit - fit.max())
    return _Posterior(weight / weight.sum(), unit**2 * squares / df, df, ratio, state)


def level(
    steps: np.ndarray,
    prompts: np.ndarray,
    sums: np.ndarray,
    effect: Effect,
    of: str | None = None,
    persistence: tuple[float, ...] = MEASURED,
) -> Estimate:
    """Estimate an effect on totals over the steps of one run.

    The effect is linearized: a row contributes its sums times the gradient of the effect at the totals (infinitesimal
    jackknife). Contributions of a step form a series for ``contrast``, with the spread of its prompts as noise. Where
    prompts return at several steps, the wider of that interval and one over prompts holds.

    Args:
        steps: Step of each row, ``(rows,)``.
        prompts: Prompt or group of each row, integers.
        sums: What the row adds to the totals, ``(rows, values)``.
        effect: See ``Effect``; a homogeneous function of degree 0, such as a ratio.
        of: What the estimate counts.
        persistence: See ``contrast``.
    """
    totals = sums.sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(effect(totals))
    if not np.isfinite(value):
        return Estimate(value, np.nan, np.nan, 1.0, len(sums), of or "prompts", np.nan, 0.0, 0.0)
    influence = sums @ _gradient(effect, totals)
    found, where = np.unique(steps, return_inverse=True)
    clusters = np.unique(prompts)
    of = of or f"prompts in {len(found)} steps"
    num_steps = len(found)
    if num_steps == 1:
        return replace(over_clusters(sums, prompts, effect, of), blocks=1.0)
    series, noise, noise_df = _series(where, prompts, influence, num_steps)
    over_time = contrast(
        series * num_steps + value,
        np.ones((num_steps, 1)),
        np.full(num_steps, 1 / num_steps),
        steps=found,
        noise=None if noise is None else noise * num_steps**2,
        noise_df=noise_df,
        persistence=persistence,
        n=len(clusters),
        of=of,
    )
    # Influences add up to 0 for ratios, so that the series averages to the value; the value itself is exact.
    over_time = over_time.moved_to(value)
    if len(clusters) == len(np.unique(np.column_stack((where, prompts)), axis=0)):
        return over_time
    over_prompts = over_clusters(sums, prompts, effect, of)
    return over_time if over_prompts.width <= over_time.width else replace(over_prompts, blocks=over_time.blocks)


def step_values(
    steps: np.ndarray, prompts: np.ndarray, sums: np.ndarray, effect: Effect
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, float]:
    """Return an effect on the totals of each step as a series for ``contrast``.

    Arguments as for ``level``. Steps on which the effect is undefined are left out.

    Returns:
        Steps, values, sampling variances of the values (None if unknown), and their degrees of freedom.
    """
    found, where = np.unique(steps, return_inverse=True)
    totals = np.zeros((len(found), sums.shape[1]))
    np.add.at(totals, where, sums)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.asarray(effect(totals), dtype=float)
        gradients = np.array([_gradient(effect, row) for row in totals]).reshape(totals.shape)
    gradients = np.where(np.isfinite(gradients), gradients, 0.0)
    influence = (sums * gradients[where]).sum(1)
    _, noise, noise_df = _series(where, prompts, influence, len(found))
    defined = np.isfinite(values)
    return found[defined], values[defined], None if noise is None else noise[defined], noise_df


def _series(
    where: np.ndarray, prompts: np.ndarray, influence: np.ndarray, num_steps: int
) -> tuple[np.ndarray, np.ndarray | None, float]:
    """Return sums of influences by step, their variance from the spread of prompts, and its degrees of freedom."""
    by_prompt, keys = _sum_by(np.column_stack((where, prompts)), influence)
    step = keys[:, 0]
    counts = np.bincount(step, minlength=num_steps)
    series = np.bincount(step, by_prompt, minlength=num_steps)
    squares = np.bincount(step, (by_prompt - (series / counts)[step]) ** 2, minlength=num_steps)
    several = counts > 1
    if not several.any():
        return series, None, 0.0
    noise = np.where(several, squares * counts / np.maximum(counts - 1, 1), np.nan)
    return series, np.where(several, noise, np.nanmean(noise)), float((counts - 1)[several].sum())


def over_clusters(
    sums: np.ndarray, clusters: np.ndarray, effect: Effect, of: str, bounds: tuple[float, float] | None = None
) -> Estimate:
    """Estimate an effect on totals over independent clusters, such as prompts, by the jackknife.

    Degrees of freedom are the effective number of clusters, ``(sum m)^2 / sum m^2`` with m the rows' last column (a
    count) by cluster, less one: a few large clusters say less than many equal ones.

    Args:
        sums: What each row adds to the totals, ``(rows, values)``.
        clusters: Cluster of each row, ``(rows,)``.
        effect: See ``Effect``.
        of: What the estimate counts.
        bounds: Of the effect, if it has any; see ``bounded``.
    """
    _, where = np.unique(clusters, return_inverse=True)
    num = int(where.max()) + 1 if len(where) else 0
    by_cluster = np.zeros((num, sums.shape[1]))
    np.add.at(by_cluster, where, sums)
    totals = by_cluster.sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(effect(totals))
        without = effect(totals - by_cluster)
    without = without[np.isfinite(without)]
    size = by_cluster[:, -1]
    effective = float(size.sum() ** 2 / max((size**2).sum(), 1e-300))
    if len(without) < max(2, num - 1):
        return Estimate(value, -np.inf, np.inf, 1.0, num, of, np.nan, 0.0)
    left = len(without)
    error = float(np.sqrt((left - 1) / left * ((without - without.mean()) ** 2).sum()))
    if bounds is not None:
        return bounded(value, error, effective - 1, num, of, bounds)
    return Estimate.from_error(value, error, effective - 1, num, of)


def bounded(
    value: float, error: float, df: float, n: int, of: str, bounds: tuple[float, float] = (0.0, 1.0)
) -> Estimate:
    """Return an estimate whose interval stays within bounds, with a width even where all of a few clusters agree.

    Student's t on the logit scale, mapped back. Where the value is at a bound, or no error can be estimated because all
    clusters agree, Wilson's score interval over the ``n`` clusters (J. Am. Stat. Assoc. 22, 1927) with Student's t in
    place of the normal quantile.

    Args:
        value: The estimate, within the bounds.
        error: Its standard error; 0 where all clusters agree.
        df: Degrees of freedom of the error.
        n: Number of clusters.
        of: What they are.
        bounds: Lowest and highest possible value.
    """
    from scipy import special, stats

    low, high = bounds
    span = high - low
    share = min(max((value - low) / span, 0.0), 1.0)
    if df <= 0 or not np.isfinite(error):
        return Estimate(value, low, high, 1.0, n, of, np.nan, 0.0)
    t = float(stats.t.ppf((1 + CONFIDENCE) / 2, df))
    relative = error / span
    zero = -low / span
    if relative <= NO_ERROR or share in (0.0, 1.0):
        center = (share + t**2 / (2 * n)) / (1 + t**2 / n)
        half = t / (1 + t**2 / n) * np.sqrt(share * (1 - share) / n + t**2 / (4 * n**2))
        ends = center - half, center + half
        # The p-value of 0 follows from its score, as the interval does.
        spread = np.sqrt(max(zero * (1 - zero), 0.0) / n)
        p_value = 2 * stats.t.sf(abs(share - zero) / spread, df) if spread > 0 else float(share == zero)
        error = max(error, span * half / t)
    else:
        half = t * relative / (share * (1 - share))
        ends = special.expit(special.logit(share) - half), special.expit(special.logit(share) + half)
        p_value = 2 * stats.t.sf(abs(value) / error, df)
    lower, upper = (float(low + span * min(max(end, 0.0), 1.0)) for end in ends)
    return Estimate(value, min(lower, value), max(upper, value), float(p_value), n, of, float(error), df)


def combine(estimates: Sequence[Estimate], of: str) -> Estimate:
    """Return the mean of the estimates of independent runs, with an interval for other runs of the kind.

    Effects of R runs scatter around their mean with some variance u, beyond the error e within each run, so that the
    mean has variance sum(e^2 + u) / R^2. A few runs cannot determine u: the interval averages over its posterior, on a
    grid relative to the mean of e^2 (likelihood of the residuals, as in the module). Errors within runs add up with
    Welch and Satterthwaite's degrees of freedom. Student's t over runs takes their place where they hardly
    matter beside u, and, given ``MIN_RUNS`` runs, where they are unknown or rest on too few steps (``MIN_BLOCKS``).

    Args:
        estimates: One per run; a single one is returned as it is, about that run alone.
        of: What the mean counts.
    """
    if len(estimates) == 1:
        return replace(estimates[0], of=of)
    num = len(estimates)
    values = np.array([found.value for found in estimates])
    squares = np.array([found.error for found in estimates]) ** 2
    df = np.array([found.df for found in estimates])
    value, between = float(values.mean()), float(values.var(ddof=1))
    n = sum(found.n for found in estimates)
    blocks = min(found.blocks for found in estimates)
    is_known = bool(np.isfinite(squares).all() and (df > 0).all())
    unit = float(squares.mean())
    if num >= MIN_RUNS and (not is_known or blocks < MIN_BLOCKS):
        return Estimate.from_error(value, float(np.sqrt(between / num)), num - 1, n, of)
    if not is_known:
        return Estimate(value, -np.inf, np.inf, 1.0, n, of, np.nan, 0.0, blocks)
    if between >= unit * max(VARIANCE_RATIOS):
        return Estimate.from_error(value, float(np.sqrt(between / num)), num - 1, n, of, blocks=blocks)
    ratios = np.array((0.0, *VARIANCE_RATIOS))
    # A run without error of its own would leave no likelihood at u = 0.
    own = np.maximum(squares / unit, MIN_RELATIVE_NOISE**2)
    total = own + ratios[:, None]
    part = 1 / total
    center = (part @ values) / part.sum(1)
    fit = -0.5 * (np.log(total).sum(1) + np.log(part.sum(1)) + (part * (values - center[:, None]) ** 2).sum(1) / unit)
    weight = np.full(len(ratios), (1 - ALIKE) / len(VARIANCE_RATIOS))
    weight[0] = ALIKE
    weight *= np.exp(fit - fit.max())
    pooled = total.sum(1) ** 2 / (own**2 / np.minimum(df, MAX_DF)).sum()
    scale = np.sqrt(unit * total.sum(1)) / num
    return _from_mixture(value, weight / weight.sum(), scale, pooled, n, of, blocks)


def mean_of_parts(estimates: Sequence[Estimate], of: str, bounds: tuple[float, float]) -> Estimate:
    """Return the unweighted mean of independent estimates, with an interval for the mean of these very parts.

    Unlike the runs of ``combine``, the parts, such as benchmarks, are not a sample of others: their differences are not
    an error. The errors within them add up, with Welch and Satterthwaite's degrees of freedom. Nothing bounds the mean
    beyond ``bounds`` where the error of a part is unknown.

    Args:
        estimates: One per part; a single one is returned as it is.
        of: What the mean counts; ``n`` is the sum over the parts.
        bounds: Lowest and highest possible value; see ``bounded``.
    """
    if len(estimates) == 1:
        return replace(estimates[0], of=of)
    squares = np.array([found.error for found in estimates]) ** 2
    df = np.array([found.df for found in estimates])
    value = float(np.mean([found.value for found in estimates]))
    n = sum(found.n for found in estimates)
    if not np.isfinite(squares).all() or (df <= 0).any():
        return bounded(value, np.nan, 0.0, n, of, bounds)
    pooled = float(squares.sum() ** 2 / (squares**2 / np.minimum(df, MAX_DF)).sum())
    return bounded(value, float(np.sqrt(squares.sum())) / len(estimates), pooled, n, of, bounds)


def ratio(totals: np.ndarray) -> np.ndarray:
    """Effect: the first total divided by the second."""
    return totals[..., 0] / totals[..., 1]


def _from_mixture(
    value: float, weights: np.ndarray, scale: np.ndarray, df: float | np.ndarray, n: int, of: str, blocks: float
) -> Estimate:
    """Summarize a mixture of central t distributions around ``value``, as wide as ``scale``."""
    from scipy import special

    kept = weights > NEGLIGIBLE
    weights, scale = weights[kept] / weights[kept].sum(), scale[kept]
    df = np.broadcast_to(df, kept.shape)[kept]

    def below(x: float) -> float:
        return float(weights @ special.stdtr(df, x / scale))

    half = _solve(below, (1 + CONFIDENCE) / 2, float(scale.max()) * 40)
    one_sd = _solve(below, 0.841345, half)
    matched = _match_df(half / max(one_sd, 1e-300))
    error = half / float(special.stdtrit(matched, (1 + CONFIDENCE) / 2))
    p_value = 2 * (1 - below(abs(value)))
    p_value = float(min(max(p_value, 0.0), 1.0))
    return Estimate(value, value - half, value + half, p_value, n, of, error, matched, blocks)


def _solve(below: Callable[[float], float], level: float, high: float) -> float:
    """Return where a distribution function reaches ``level``, between 0 and ``high``."""
    low = 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < level else (low, middle)
    return (low + high) / 2


@lru_cache(maxsize=4096)
def _match_df_rounded(tail: float) -> float:
    from scipy import special

    low, high = 0.0, 4.0
    for _ in range(50):
        middle = (low + high) / 2
        df = 10**middle
        found = special.stdtrit(df, (1 + CONFIDENCE) / 2) / special.stdtrit(df, 0.841345)
        low, high = (middle, high) if found > tail else (low, middle)
    return float(10 ** ((low + high) / 2))


def _match_df(tail: float) -> float:
    """Return the degrees of freedom of the t distribution with this ratio of 97.5 % to one-sd quantile."""
    return _match_df_rounded(round(tail, 3))


def _smooth(values: np.ndarray) -> np.ndarray:
    """Return means over a tenth of the series, around each of its values."""
    window = np.ones(2 * (len(values) // 20) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def _residual_variance(y: np.ndarray, basis: np.ndarray) -> float:
    return float(np.var(y - basis @ np.linalg.lstsq(basis, y, rcond=None)[0]))


def _grid(
    size: int, spacing: float, weights: tuple[float, ...], no_state: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the state's variance by frequency ``(K, n)``, its ratio to the noise ``(K,)``, and the prior ``(K,)``."""
    state, ratio = _states(size, spacing)
    by_correlation = np.array(weights) / sum(weights) / len(VARIANCE_RATIOS)
    prior = np.concatenate([[no_state], (1 - no_state) * np.repeat(by_correlation, len(VARIANCE_RATIOS))])
    return state, ratio, prior


@lru_cache(maxsize=32)
def _states(size: int, spacing: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the state's variance by frequency and its ratio to the noise: no state first, then by correlation."""
    products = _lag_products(size)
    states = [products @ (correlation**spacing) ** np.arange(size) for correlation in CORRELATIONS]
    state = np.concatenate([np.zeros((1, size)), np.repeat(np.array(states), len(VARIANCE_RATIOS), axis=0)])
    return state, np.concatenate([[0.0], np.tile(VARIANCE_RATIOS, len(CORRELATIONS))])


def _lag_products(size: int) -> np.ndarray:
    """Return sums of products of each cosine with itself ``k`` steps later, both directions, shape ``(n, n)``."""
    rows = _cosines(np.eye(size))
    spectrum = np.abs(np.fft.rfft(rows, 2 * size, axis=1)) ** 2
    products = np.fft.irfft(spectrum, axis=1)[:, :size]
    products[:, 1:] *= 2
    return products


def _cosines(values: np.ndarray) -> np.ndarray:
    """Return the orthonormal discrete cosine transform (type II) over the first axis."""
    from scipy import fft

    return np.asarray(fft.dct(values, type=2, norm="ortho", axis=0))


def _shorten(
    y: np.ndarray, basis: np.ndarray, weights: np.ndarray, noise: np.ndarray | None, steps: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
    """Average neighboring steps of long series; weights add up, so that the estimate is nearly the same."""
    if len(y) <= MAX_STEPS:
        return y, basis, weights, noise, np.asarray(steps)
    starts = np.linspace(0, len(y), MAX_STEPS + 1).astype(int)[:-1]
    sizes = np.diff(np.append(starts, len(y)))

    def mean(values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values, starts, axis=0) / sizes.reshape(-1, *[1] * (values.ndim - 1))

    noise = None if noise is None else mean(noise) / sizes
    return mean(y), mean(basis), np.add.reduceat(weights, starts), noise, np.asarray(steps)[starts]


def _gradient(effect: Effect, totals: np.ndarray) -> np.ndarray:
    """Return the derivative of an effect by each total, by central differences."""
    size = np.maximum(np.abs(totals), 1e-6 * np.abs(totals).max() + 1e-300)
    step = 1e-5 * size
    shifted = totals + np.diag(step), totals - np.diag(step)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (effect(shifted[0]) - effect(shifted[1])) / (2 * step)


def _sum_by(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return sums of ``values`` by distinct row of the integer ``keys``, and these rows."""
    found, where = np.unique(keys, axis=0, return_inverse=True)
    return np.bincount(where.ravel(), values, minlength=len(found)), found
