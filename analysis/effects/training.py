"""Estimate the effects behind claims about training, one function per part.

Every function takes the runs and the run_ids to estimate from, and returns an ``Estimate``. ``claims.toml`` states the
statistic, unit, and null of each part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from entrace.analysis.effects import entropy_laws, exchange, potential
from entrace.analysis.effects.estimate import (
    Estimator,
    NoEffectError,
    change_of,
    count,
    fetch,
    mean_of_runs,
    mean_of_steps,
    over_runs,
    plateau_level,
    prompts_level,
    ratio,
    require_plateau,
    require_rising,
    rising_change,
)
from entrace.analysis.runs import Runs
from entrace.analysis.statistics.clusters import Effect
from entrace.analysis.statistics.combination import MAX_DF, combine
from entrace.analysis.statistics.estimates import LEVEL, ONE_SD, Estimate
from entrace.analysis.statistics.stages import MIN_STEPS, StageFit, slowdown
from entrace.analysis.trace.errors import InputError, nearest

if TYPE_CHECKING:
    import polars as pl

# Number of bins of response length within which token shares are compared.
LENGTH_BINS = 12


def of_policy(estimator: Estimator) -> Estimator:
    """Return an estimator that rejects runs without the policy's entropy.

    An example is an imported run whose entropies are another model's.
    """

    def estimate(runs: Runs, run_ids: Sequence[str]) -> Estimate:
        for run in run_ids:
            if reason := (runs.manifests.get(run, {}).get("unknown") or {}).get("policy.entropy"):
                raise NoEffectError(str(reason))
        return estimator(runs, run_ids)

    return estimate


# As in ``StageFit``.
MEASURES = ("the entropy", "the accuracy")


def slows(series: int) -> Estimator:
    """Return an estimator of the slowdown between halves (S1); see ``slowdown``.

    ``series`` is 0 for entropy and 1 for accuracy.
    """

    def estimate(runs: Runs, run_ids: Sequence[str]) -> Estimate:
        fits = [_long_enough(runs, run) for run in run_ids]
        if not all(fit.is_known[series] for fit in fits):
            raise NoEffectError(f"{MEASURES[series]} of the steps was not recorded")
        num_steps = sum(fit.num_steps for fit in fits)
        movements = [fit.movement(series) for fit in fits]
        return slowdown_of(movements, num_steps, f"steps, {count(run_ids, 'run')}")

    return estimate


def slowdown_of(movements: Sequence[tuple[np.ndarray, np.ndarray, float]], num_steps: int, of: str) -> Estimate:
    """Return the slowdown of the mean movement of runs; see ``stages.movement``.

    Runs are averaged before the halves are compared, since a ratio of two noisy movements is bounded and skewed.

    Args:
        movements: Values, draws, and effective steps of each run.
        num_steps: Number of steps of all runs.
        of: Name of the units.

    Raises:
        NoEffectError: the series does not move.
    """
    moved = np.mean([values for values, _, _ in movements], axis=0)
    if not np.abs(moved).sum() > 0:
        raise NoEffectError("the series does not move", is_recorded=True)
    draws, blocks = movements[0][1], movements[0][2]
    if len(movements) > 1:
        # The draws are scaled to the uncertainty of the mean over runs in each half, and keep their correlation.
        halves = [
            combine([Estimate.from_error(v[half], d[:, half].std(), MAX_DF, 0, of, b) for v, d, b in movements], of)
            for half in (0, 1)
        ]
        # Draws of all runs use equal random numbers; shifting them makes the runs independent.
        shifted = [np.roll(d - v, i * len(d) // len(movements), axis=0) for i, (v, d, _) in enumerate(movements)]
        errors = np.mean(shifted, axis=0)
        own = np.diff(np.percentile(errors, LEVEL, axis=0), axis=0)[0]
        wanted = np.array([half.width for half in halves])
        draws = moved + errors * np.divide(wanted, own, out=np.ones(2), where=own > 0)
        blocks = min(half.blocks for half in halves)
    value, drawn = float(slowdown(moved)), slowdown(draws)
    low, high = np.percentile(drawn, LEVEL)
    # A slowdown is both v1 > v2 and v1 > -v2. Its opposite is either of two events, hence another factor of 2.
    rate = max(np.mean(draws[:, 0] <= sign * draws[:, 1]) for sign in (1, -1))
    p_value = float(np.clip(2 * rate if value > 0 else 4 * (1 - rate), 1 / len(draws), 1))
    error = float(np.diff(np.percentile(drawn, ONE_SD))[0]) / 2
    ends = float(min(low, value)), float(max(high, value))
    return Estimate(value, *ends, p_value, num_steps, of, error, MAX_DF, blocks)


def two_stages(runs: Runs, run_ids: Sequence[str]) -> Estimate:
    """Return how much better two lines fit than a smooth curve (S1).

    See ``stages.compare_shapes``.
    """
    fits = [_long_enough(runs, run) for run in run_ids]
    for run, fit in zip(run_ids, fits, strict=True):
        if fit.boundary is None:
            raise NoEffectError(f"run {run} has no boundary: {fit.reason}", is_recorded=True)
    return mean_of_runs([fit.two_stages for fit in fits], f"steps, {count(run_ids, 'run')}")


def rising(stem: str, values: Sequence[str], effect: Effect) -> Estimator:
    """Return an estimator of the change of an effect over the rising stage.

    The effect is on the totals of a step, and the change is end minus start.
    """

    def estimate(runs: Runs, run_ids: Sequence[str]) -> Estimate:
        require_rising(runs, run_ids)
        return rising_change(runs, fetch(runs, stem, run_ids), run_ids, values, effect)

    return estimate


def share_at_equal_length(column: str) -> Estimator:
    """Return an estimator of the rising-stage change of a token share (S3).

    Shares are compared at equal response length.
    """

    def estimate(runs: Runs, run_ids: Sequence[str]) -> Estimate:
        require_rising(runs, run_ids)

        def change(run: str, part: pl.DataFrame) -> Estimate:
            steps, shares = shares_at_equal_length(
                *(part[name].to_numpy().astype(float) for name in ("step", "response_length", "tokens", column))
            )
            return change_of(runs, run, steps, shares)

        return over_runs(fetch(runs, "category_by_length", run_ids), run_ids, change, "steps")

    return estimate


def shares_at_equal_length(
    step: np.ndarray, length: np.ndarray, tokens: np.ndarray, matching: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the share of matching tokens by step, at equal response length.

    Shares are adjusted to an equal distribution of response lengths. They are fitted as step effect + length effect, by
    least squares weighted by tokens. The length effect absorbs all effects of length on the mix of tokens, such as an
    opening phrase in every response. Neighboring steps share lengths, so all steps are comparable along a chain, even
    if the first and the last have no length in common.

    Args:
        step: Step of each cell, ``(cells,)``.
        length: Response length of each cell, tokens.
        tokens: Number of tokens in each cell.
        matching: Number of matching tokens in each cell.

    Returns:
        Steps in order, and shares with the length effect averaged over all tokens.

    Raises:
        NoEffectError: steps have no lengths in common.
    """
    edges = np.unique(np.quantile(length, np.linspace(0, 1, LENGTH_BINS + 1)[1:-1]))
    bins = np.searchsorted(edges, length, side="right")
    steps, at = np.unique(step, return_inverse=True)
    _, bins = np.unique(bins, return_inverse=True)
    num_bins = int(bins.max()) + 1
    weight, matched = np.zeros((len(steps), num_bins)), np.zeros((len(steps), num_bins))
    np.add.at(weight, (at, bins), tokens)
    np.add.at(matched, (at, bins), matching)
    by_step = weight.sum(1)
    # Normal equations with step effects eliminated. They do not determine the mean of the length effects.
    within = np.diag(weight.sum(0)) - weight.T @ (weight / by_step[:, None])
    right = matched.sum(0) - weight.T @ (matched.sum(1) / by_step)
    if np.linalg.matrix_rank(within, tol=1e-9 * weight.sum()) < num_bins - 1:
        raise NoEffectError("responses of different steps have no lengths in common", is_recorded=True)
    effect = np.linalg.pinv(within) @ right
    return steps, (matched.sum(1) - weight @ effect) / by_step + weight.sum(0) @ effect / weight.sum()


def plateau(stem: str, values: Sequence[str], effect: Effect) -> Estimator:
    """Return an estimator of an effect over the plateau.

    The effect is on sums of query ``stem``; see ``estimate.plateau_level``.
    """

    def estimate(runs: Runs, run_ids: Sequence[str]) -> Estimate:
        require_plateau(runs, run_ids)
        return plateau_level(runs, fetch(runs, stem, run_ids), run_ids, values, effect)

    return estimate


def excess(estimator: Estimator) -> Estimator:
    """Return an estimator of a ratio minus 1, from an estimator of its logarithm.

    The interval is symmetric on the log scale; around the ratio itself it could extend below 0. Several runs are
    combined by the geometric mean.
    """

    def estimate(runs: Runs, run_ids: Sequence[str]) -> Estimate:
        found = estimator(runs, run_ids)
        value, low, high = np.expm1([found.value, found.low, found.high]).tolist()
        return replace(found, value=value, low=low, high=high, error=found.error * (1 + value))

    return estimate


def moved(values: Sequence[str], effect: Effect) -> Estimator:
    """Return an estimator of an effect on ``movement_sums`` over the plateau.

    Updates must exceed rounding.
    """

    def estimate(runs: Runs, run_ids: Sequence[str]) -> Estimate:
        require_plateau(runs, run_ids)
        frame = fetch(runs, "movement_sums", run_ids)
        potential.require_movement(frame)
        return plateau_level(runs, frame, run_ids, values, effect)

    return estimate


def relative_movement(kind: str) -> Estimator:
    """Return an estimator of the log movement of a kind of tokens (S6).

    The movement is relative to the rest, beyond that of random updates. A random update changes logits by equal amounts
    or, since larger logits come from larger weights and activations, in proportion to their margin; see
    ``beyond_nulls``.
    """
    sides = [(f"{side}_{kind}_movement", f"{side}_{kind}") for side in ("high", "low")]
    by_null = [
        moved([name for movement, side in sides for name in (movement, f"{side}_{null}")], log_relative)
        for null in ("potential", "margin")
    ]

    return beyond_nulls(*by_null)


def beyond_nulls(first: Estimator, second: Estimator) -> Estimator:
    """Return an estimator of the effect that remains under either of two nulls.

    ``first`` and ``second`` estimate it against one null each. A run between two nulls is compatible with a null in
    between: its effect is 0. The interval extends from the lower end of one comparison to the upper end of the other.
    """

    def estimate(runs: Runs, run_ids: Sequence[str]) -> Estimate:
        low, high = sorted((against(runs, run_ids) for against in (first, second)), key=lambda found: found.value)
        ends = min(low.low, high.low), max(low.high, high.high)
        if low.value <= 0 <= high.value:
            return replace(low, value=0.0, low=ends[0], high=ends[1], p_value=1.0)
        nearer = low if low.value > 0 else high
        return replace(nearer, low=ends[0], high=ends[1])

    return estimate


def beyond_shuffle_and_random(predictor: str) -> Estimator:
    """Return an estimator of a prediction beyond both nulls (E2, E4)."""
    return of_policy(
        beyond_nulls(*(entropy_laws.beyond(null, predictor) for null in ("shuffle", "random"))),
    )


def against_random(effect: Effect) -> Estimator:
    """Return an estimator of movement against random logit changes (S5).

    ``effect`` compares the two; see ``potential``.
    """

    def estimate(runs: Runs, run_ids: Sequence[str]) -> Estimate:
        require_plateau(runs, run_ids)
        sums = fetch(runs, "movement_sums", run_ids)
        potential.require_movement(sums)
        frame = potential.with_bins(sums, fetch(runs, "movement_potential", run_ids))
        return mean_of_steps(runs, frame, run_ids, potential.VALUES, effect)

    return estimate


def end_at_equal_entropy(column: str) -> Estimator:
    """Return an estimator of ``column`` at the end of responses over the middle (T3).

    The effect is the log ratio of the last fifth to the middle, at equal entropy.
    """

    def estimate(runs: Runs, run_ids: Sequence[str]) -> Estimate:
        require_plateau(runs, run_ids)
        potential.require_movement(fetch(runs, "movement_sums", run_ids))
        frame = potential.spread_parts(fetch(runs, "end_by_entropy", run_ids), column)
        return plateau_level(runs, frame, run_ids, potential.PARTS, potential.end_over_middle)

    return estimate


def interventions(values: Sequence[str], effect: Effect) -> Callable[..., Estimate]:
    """Return an estimator of an effect on ``impact_sums``, optionally of one series."""

    def estimate(runs: Runs, run_ids: Sequence[str], series: Series | None = None) -> Estimate:
        import polars as pl

        frame = fetch(runs, "impact_sums", run_ids)
        if series is not None:
            frame = frame.filter(pl.col(name).eq_missing(pl.lit(value)) for name, value in series.items())
        return prompts_level(frame, sorted(frame["run_id"].unique()), values, effect, bounds=(-2.0, 2.0))

    return estimate


def estimators(
    claim: str, part: str, spec: Mapping[str, Any], runs: Runs, run_ids: Sequence[str]
) -> Iterator[tuple[str, Callable[[], Estimate]]]:
    """Yield the estimators of a part of a claim.

    Claims about interventions have one estimator per series. Series that differ in checkpoint, selection, seed, or
    temperature measure different quantities and are never pooled.

    Yields:
        Name of the series (empty if there is at most one), and a function that returns the estimate.
    """
    estimator = declared(spec) if "sql" in spec else PARTS[claim][part]
    frame = runs.query_once("impact_sums", run_ids).select(SERIES).unique() if claim in INTERVENED else None
    if frame is None or frame.height < 2:
        yield "", partial(estimator, runs, run_ids)
        return
    for series in frame.sort(SERIES).iter_rows(named=True):
        known = {name.removesuffix("_step"): value for name, value in series.items() if value is not None}
        yield ", ".join(f"{name} {value}" for name, value in known.items()), partial(estimator, runs, run_ids, series)


# Columns that distinguish series of interventions, and the claims about them.
SERIES = ("checkpoint_step", "selection", "seed", "temperature")
INTERVENED = ("I2", "T2")
Series = Mapping[str, object]


def declared(spec: Mapping[str, Any]) -> Estimator:
    """Return the estimator that a part of a user's ledger declares.

    The effect is on sums, over all steps or a stage. ``sql`` is a query with one row per run, step, and prompt (or
    group). ``values`` names two of its columns, a sum and a number, for the mean; or four, for the difference of two
    means. ``over`` is a key of ``SPANS``.
    """
    values = list(spec["values"])
    effect = ratio(0, 1) if len(values) == 2 else difference
    return SPANS[spec["over"]](spec["sql"], values, effect)


def check_declared(runs: Runs, spec: Mapping[str, Any], name: str) -> None:
    """Refuse a declared part whose SQL lacks what ``declared`` reads.

    Args:
        runs: Runs with the question that the part names.
        spec: The part.
        name: Name of the part, for the message.

    Raises:
        InputError: a column is missing or not a number, the parameter ``$runs`` is missing, or DuckDB rejects the SQL.
    """
    import polars as pl

    stem, columns = spec["sql"], runs.columns(spec["sql"])
    place = f"{runs.questions.location(stem)}: {name}"
    if "runs" not in runs.questions.parameter_names(stem):
        raise InputError(f"{place}: a claim chooses runs; filter with $runs is null or list_contains($runs, run_id)")
    for column in ("run_id", "step", "prompt_id", *spec["values"]):
        if column not in columns:
            raise InputError(f'{place}: the query has no column "{column}"{nearest(column, columns)}')
    for column in spec["values"]:
        if not (columns[column].is_numeric() or columns[column] == pl.Boolean):
            raise InputError(f'{place}: column "{column}" has type {columns[column]}, expected a number')


def all_steps(stem: str, values: Sequence[str], effect: Effect) -> Estimator:
    """Return an estimator of the mean over steps of an effect on their totals."""

    def estimate(runs: Runs, run_ids: Sequence[str]) -> Estimate:
        return mean_of_steps(runs, fetch(runs, stem, run_ids), run_ids, values, effect)

    return estimate


def fall(estimator: Estimator) -> Estimator:
    """Return an estimator of the fall of a quantity, from an estimator of its rise."""

    def estimate(runs: Runs, run_ids: Sequence[str]) -> Estimate:
        found = estimator(runs, run_ids)
        return replace(found, value=-found.value, low=-found.high, high=-found.low)

    return estimate


def log_ratio(totals: np.ndarray) -> np.ndarray:
    """Return the logarithm of the first total over the second."""
    return np.log(totals[..., 0] / totals[..., 1])


def difference(totals: np.ndarray) -> np.ndarray:
    """Return the first mean minus the second.

    The totals are sum, number, sum, number.
    """
    return ratio(0, 1)(totals) - ratio(2, 3)(totals)


def log_relative(totals: np.ndarray) -> np.ndarray:
    """Return the log of movement over potential of a kind, relative to the rest.

    The totals are movement and potential of the kind, then those of the rest.
    """
    return np.log(ratio(0, 1)(totals) / ratio(2, 3)(totals))


def direction(totals: np.ndarray) -> np.ndarray:
    """Return the change in positive minus negative samples, over the movement.

    All three are means. The totals are the sum and the number of each.
    """
    return difference(totals[..., :4]) / ratio(4, 5)(totals)


def _long_enough(runs: Runs, run: str) -> StageFit:
    """Return the stages of a run.

    Raises:
        NoEffectError: the run is too short for stages.
    """
    fit = runs.stage_fits[run]
    if fit.num_steps < MIN_STEPS:
        raise NoEffectError(f"the run has {count(range(fit.num_steps), 'step')}; a trend needs {MIN_STEPS}")
    return fit


# Steps that a declared effect is about: its mean over the run or the plateau, or its change over the rising stage.
SPANS: dict[str, Callable[[str, Sequence[str], Effect], Estimator]] = {
    "run": all_steps,
    "plateau": plateau,
    "rising": rising,
}

_DIRECTION = ["positive_dp", "positive_tokens", "negative_dp", "negative_tokens", "high_movement", "high_tokens"]

PARTS: dict[str, dict[str, Callable[..., Estimate]]] = {
    "S1": {
        "entropy slows": of_policy(slows(0)),
        "accuracy slows": of_policy(slows(1)),
        "two stages": of_policy(two_stages),
    },
    "E1": {"association": of_policy(exchange.association), "fit": of_policy(exchange.captured)},
    "E2": {
        **{name: beyond_shuffle_and_random(name) for name in entropy_laws.SHUFFLED},
        "quadrants": of_policy(entropy_laws.beyond("random", "quadrants")),
    },
    "E3": {name: of_policy(entropy_laws.more_than_entropy(name)) for name in entropy_laws.FORMULAS},
    "E4": {"own gradient": beyond_shuffle_and_random("own_gradient")},
    "E5": {name: of_policy(entropy_laws.between_evaluations(name)) for name in entropy_laws.FORMULAS},
    "S2": {
        "mainly negative": of_policy(fall(rising("sign_entropy", ["negative_sum", "positive_sum"], log_ratio))),
        "same prompt": of_policy(fall(rising("sign_entropy", ["negative_mean", "positive_mean"], log_ratio))),
    },
    "S3": {
        "reasoning": share_at_equal_length("reasoning"),
        "other words": fall(share_at_equal_length("semantic")),
    },
    "S4": {"any defect": fall(rising("defect_sums", ["defective", "responses"], ratio(0, 1)))},
    "S5": {
        "concentration": against_random(potential.concentration),
        "hardly move": against_random(potential.stillness),
    },
    "S6": {
        "high entropy": excess(relative_movement("entropy")),
        "large gradient": excess(relative_movement("gradient")),
        "direction": moved(_DIRECTION, direction),
    },
    "I1": {
        "accuracy": plateau("ppl_halves", ["difference", "num_groups"], ratio(0, 1)),
        "reasoning tokens": plateau(
            "high_entropy_terciles", ["low_excess", "low_tokens", "high_excess", "high_tokens"], difference
        ),
    },
    "I2": {
        "impact": interventions(["high_ppl_impact", "high_ppl_tokens", "low_ppl_impact", "low_ppl_tokens"], difference)
    },
    "T1": {
        "beginning": excess(plateau("position_fifths", ["first_sum", "middle_sum"], log_ratio)),
        "end": excess(plateau("position_fifths", ["last_sum", "middle_sum"], log_ratio)),
    },
    "T2": {"impact": interventions(["late_impact", "late_tokens", "early_impact", "early_tokens"], difference)},
    "T3": {
        "movement": excess(end_at_equal_entropy("movement")),
        "gradient": excess(end_at_equal_entropy("grad_norm")),
    },
}

# Questions that a claim, or one part of it, reads. The fit of S1 reads the columns that stage_dynamics shows.
_READ: dict[str, tuple[str, ...]] = {
    "S1": ("stage_dynamics",),
    "E1": ("exchange_halves",),
    **dict.fromkeys(("E2", "E3", "E4"), ("law_sums",)),
    "E5": ("entropy_forecasts",),
    "S2": ("sign_entropy",),
    "S3": ("category_by_length",),
    "S4": ("defect_sums",),
    "S5": ("movement_sums", "movement_potential"),
    "S6": ("movement_sums",),
    "I1 accuracy": ("ppl_halves",),
    "I1 reasoning tokens": ("high_entropy_terciles",),
    "I2": ("impact_sums",),
    "T1": ("position_fifths",),
    "T2": ("impact_sums",),
    "T3": ("movement_sums", "end_by_entropy"),
}


def questions_read(claim: str, part: str, spec: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the questions whose rows the estimator of a part reads."""
    return (spec["sql"],) if "sql" in spec else _READ.get(claim) or _READ[f"{claim} {part}"]
