"""Effects that claims about training itself are judged by: one function for each part of a claim.

Every function takes the runs and the run_ids to look at, and returns an ``Estimate``. Statistic, unit, and null of each
part are in reports/claims.toml.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from entrace.analysis.effects import exchange, potential
from entrace.analysis.effects.estimate import (
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
from entrace.analysis.statistics.estimates import LEVEL, ONE_SD, Estimate
from entrace.analysis.statistics.intervals import MAX_DF, Effect, combine
from entrace.analysis.statistics.stages import MIN_STEPS, StageFit, slowdown

if TYPE_CHECKING:
    import polars as pl

# Bins of response length within which shares of tokens are compared.
LENGTH_BINS = 12

Judged = Callable[[Runs, Sequence[str]], Estimate]


def of_policy(judged: Judged) -> Judged:
    """Return a judge that refuses runs whose entropy is not that of the policy, as where another model scored it."""

    def judge(runs: Runs, run_ids: Sequence[str]) -> Estimate:
        for run in run_ids:
            if reason := (runs.manifests.get(run, {}).get("unknown") or {}).get("policy.entropy"):
                raise NoEffectError(str(reason))
        return judged(runs, run_ids)

    return judge


def slows(series: int) -> Judged:
    """S1: how much a series slows down from the first to the second half; 0 entropy, 1 accuracy. See ``slowdown``."""

    def judge(runs: Runs, run_ids: Sequence[str]) -> Estimate:
        fits = [_long_enough(runs, run) for run in run_ids]
        num_steps = sum(fit.num_steps for fit in fits)
        movements = [fit.movement(series) for fit in fits]
        return slowdown_of(movements, num_steps, f"steps, {count(run_ids, 'run')}")

    return judge


def slowdown_of(movements: Sequence[tuple[np.ndarray, np.ndarray, float]], num_steps: int, of: str) -> Estimate:
    """Return how much the mean movement of runs slows down, from values and draws of each; see ``stages.movement``.

    Runs are averaged before their movements are compared, since a ratio of two noisy movements is bounded and skewed.

    Raises:
        NoEffectError: the series does not move.
    """
    moved = np.mean([values for values, _, _ in movements], axis=0)
    if not np.abs(moved).sum() > 0:
        raise NoEffectError("the series does not move", is_recorded=True)
    draws, blocks = movements[0][1], movements[0][2]
    if len(movements) > 1:
        # As wide as the mean over runs is uncertain, in each half; the halves keep their correlation.
        halves = [
            combine([Estimate.from_error(v[half], d[:, half].std(), MAX_DF, 0, of, b) for v, d, b in movements], of)
            for half in (0, 1)
        ]
        # All runs draw the same random numbers.
        shifted = [np.roll(d - v, i * len(d) // len(movements), axis=0) for i, (v, d, _) in enumerate(movements)]
        errors = np.mean(shifted, axis=0)
        own = np.diff(np.percentile(errors, LEVEL, axis=0), axis=0)[0]
        wanted = np.array([half.width for half in halves])
        draws = moved + errors * np.divide(wanted, own, out=np.ones(2), where=own > 0)
        blocks = min(half.blocks for half in halves)
    value, drawn = float(slowdown(moved)), slowdown(draws)
    low, high = np.percentile(drawn, LEVEL)
    # To move less in the second half is both v1 > v2 and v1 > -v2; the opposite is one of two, hence twice.
    rate = max(np.mean(draws[:, 0] <= sign * draws[:, 1]) for sign in (1, -1))
    p_value = float(np.clip(2 * rate if value > 0 else 4 * (1 - rate), 1 / len(draws), 1))
    error = float(np.diff(np.percentile(drawn, ONE_SD))[0]) / 2
    ends = float(min(low, value)), float(max(high, value))
    return Estimate(value, *ends, p_value, num_steps, of, error, MAX_DF, blocks)


def two_stages(runs: Runs, run_ids: Sequence[str]) -> Estimate:
    """S1: how much better two lines fit than a smooth curve; see ``stages.compare_shapes``."""
    fits = [_long_enough(runs, run) for run in run_ids]
    for run, fit in zip(run_ids, fits, strict=True):
        if fit.boundary is None:
            raise NoEffectError(f"run {run} has no boundary: {fit.reason}", is_recorded=True)
    return mean_of_runs([fit.two_stages for fit in fits], f"steps, {count(run_ids, 'run')}")


def rising(stem: str, values: Sequence[str], effect: Effect) -> Judged:
    """Return a judge of the change, end minus start of the rising stage, of an effect on the totals of a step."""

    def judge(runs: Runs, run_ids: Sequence[str]) -> Estimate:
        require_rising(runs, run_ids)
        return rising_change(runs, fetch(runs, stem, run_ids), run_ids, values, effect)

    return judge


def share_at_equal_length(column: str) -> Judged:
    """S3: change of a share of tokens over the rising stage, among responses of equal length."""

    def judge(runs: Runs, run_ids: Sequence[str]) -> Estimate:
        require_rising(runs, run_ids)

        def change(run: str, part: pl.DataFrame) -> Estimate:
            steps, shares = shares_at_equal_length(
                *(part[name].to_numpy().astype(float) for name in ("step", "response_length", "tokens", column))
            )
            return change_of(runs, run, steps, shares)

        return over_runs(fetch(runs, "category_by_length", run_ids), run_ids, change, "steps")

    return judge


def shares_at_equal_length(
    step: np.ndarray, length: np.ndarray, tokens: np.ndarray, matching: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the share of matching tokens by step, had responses been equally long at every step.

    Shares are fitted as step effect + length effect, by least squares weighted by tokens; what length alone does to the
    mix of tokens, such as an opening phrase that every response has, is in the second one. A step shares lengths with
    its neighbors, so that steps are comparable along a chain even where first and last have no length in common.

    Args:
        step: Of each cell, ``(cells,)``.
        length: Response length of the cell, tokens.
        tokens: Tokens in the cell.
        matching: Of these, tokens of the kind.

    Returns:
        Steps in order and shares, the length effect averaged over all tokens.

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
    # Normal equations with step effects eliminated; they leave the mean of the length effects free.
    within = np.diag(weight.sum(0)) - weight.T @ (weight / by_step[:, None])
    right = matched.sum(0) - weight.T @ (matched.sum(1) / by_step)
    if np.linalg.matrix_rank(within, tol=1e-9 * weight.sum()) < num_bins - 1:
        raise NoEffectError("responses of different steps have no lengths in common", is_recorded=True)
    effect = np.linalg.pinv(within) @ right
    return steps, (matched.sum(1) - weight @ effect) / by_step + weight.sum(0) @ effect / weight.sum()


def plateau(stem: str, values: Sequence[str], effect: Effect) -> Judged:
    """Return a judge of an effect on sums of query ``stem`` over the plateau; see ``estimate.plateau_level``."""

    def judge(runs: Runs, run_ids: Sequence[str]) -> Estimate:
        require_plateau(runs, run_ids)
        return plateau_level(runs, fetch(runs, stem, run_ids), run_ids, values, effect)

    return judge


def excess(judged: Judged) -> Judged:
    """Return a judge of by how much a ratio exceeds 1, from one of its logarithm.

    On the logarithm an interval is symmetric; around the ratio itself it could reach below 0. Over several runs it is
    the geometric mean.
    """

    def judge(runs: Runs, run_ids: Sequence[str]) -> Estimate:
        found = judged(runs, run_ids)
        value, low, high = np.expm1([found.value, found.low, found.high]).tolist()
        return replace(found, value=value, low=low, high=high, error=found.error * (1 + value))

    return judge


def moved(values: Sequence[str], effect: Effect) -> Judged:
    """Return a judge of an effect on ``movement_sums`` over the plateau, of updates that did more than rounding."""

    def judge(runs: Runs, run_ids: Sequence[str]) -> Estimate:
        require_plateau(runs, run_ids)
        frame = fetch(runs, "movement_sums", run_ids)
        potential.require_movement(frame)
        return plateau_level(runs, frame, run_ids, values, effect)

    return judge


def relative_movement(kind: str) -> Judged:
    """S6: return a judge of the log of movement of a kind of tokens relative to the rest, beyond random updates.

    A random update changes logits by equal amounts, or, since larger logits come from larger weights and activations,
    in proportion to their margin. Where a run lies between the two, it is like some random update: the effect is 0, and
    its interval reaches from the lower end of one comparison to the upper end of the other.
    """
    sides = [(f"{side}_{kind}_movement", f"{side}_{kind}") for side in ("high", "low")]
    by_null = [
        moved([name for movement, side in sides for name in (movement, f"{side}_{null}")], log_relative)
        for null in ("potential", "margin")
    ]

    def judge(runs: Runs, run_ids: Sequence[str]) -> Estimate:
        equal, proportional = sorted((against(runs, run_ids) for against in by_null), key=lambda found: found.value)
        ends = min(equal.low, proportional.low), max(equal.high, proportional.high)
        if equal.value <= 0 <= proportional.value:
            return replace(equal, value=0.0, low=ends[0], high=ends[1], p_value=1.0)
        nearer = equal if equal.value > 0 else proportional
        return replace(nearer, low=ends[0], high=ends[1])

    return judge


def against_random(effect: Effect) -> Judged:
    """S5: return a judge of an effect that compares a step's movements with random logit changes; see ``potential``."""

    def judge(runs: Runs, run_ids: Sequence[str]) -> Estimate:
        require_plateau(runs, run_ids)
        sums = fetch(runs, "movement_sums", run_ids)
        potential.require_movement(sums)
        frame = potential.with_bins(sums, fetch(runs, "movement_potential", run_ids))
        return mean_of_steps(runs, frame, run_ids, potential.VALUES, effect)

    return judge


def end_at_equal_entropy(column: str) -> Judged:
    """T3: log ratio of ``column`` of high-entropy tokens, last fifth over the middle, at equal entropy."""

    def judge(runs: Runs, run_ids: Sequence[str]) -> Estimate:
        require_plateau(runs, run_ids)
        potential.require_movement(fetch(runs, "movement_sums", run_ids))
        frame = potential.spread_parts(fetch(runs, "end_by_entropy", run_ids), column)
        return plateau_level(runs, frame, run_ids, potential.PARTS, potential.end_over_middle)

    return judge


def interventions(values: Sequence[str], effect: Effect) -> Callable[..., Estimate]:
    """Return a judge of an effect on the rows of ``impact_sums``, of one series if the runs hold several."""

    def judge(runs: Runs, run_ids: Sequence[str], series: Series | None = None) -> Estimate:
        import polars as pl

        frame = fetch(runs, "impact_sums", run_ids)
        if series is not None:
            frame = frame.filter(pl.col(name).eq_missing(pl.lit(value)) for name, value in series.items())
        return prompts_level(frame, sorted(frame["run_id"].unique()), values, effect, bounds=(-2.0, 2.0))

    return judge


def judges(claim: str, part: str, runs: Runs, run_ids: Sequence[str]) -> Iterator[tuple[str, Callable[[], Estimate]]]:
    """Yield how to judge a part of a claim, once for each series of interventions where it is about those.

    Series with another checkpoint, selection, seed, or temperature measure another quantity, and are never pooled.

    Returns:
        Name of the series, empty where there is one or none, and a function that gives the estimate.
    """
    judge = PARTS[claim][part]
    frame = runs.query_once("impact_sums", run_ids).select(SERIES).unique() if claim in INTERVENED else None
    if frame is None or frame.height < 2:
        yield "", partial(judge, runs, run_ids)
        return
    for series in frame.sort(SERIES).iter_rows(named=True):
        known = {name.removesuffix("_step"): value for name, value in series.items() if value is not None}
        yield ", ".join(f"{name} {value}" for name, value in known.items()), partial(judge, runs, run_ids, series)


# What sets series of interventions apart, and the claims that are judged on them.
SERIES = ("checkpoint_step", "selection", "seed", "temperature")
INTERVENED = ("I2", "T2")
Series = Mapping[str, object]


def fall(judged: Judged) -> Judged:
    """Return a judge of how much a quantity falls, from one of how much it rises."""

    def judge(runs: Runs, run_ids: Sequence[str]) -> Estimate:
        found = judged(runs, run_ids)
        return replace(found, value=-found.value, low=-found.high, high=-found.low)

    return judge


def log_ratio(totals: np.ndarray) -> np.ndarray:
    """Return the logarithm of the first total over the second."""
    return np.log(totals[..., 0] / totals[..., 1])


def difference(totals: np.ndarray) -> np.ndarray:
    """Return the first mean minus the second; totals are sum, number, sum, number."""
    return ratio(0, 1)(totals) - ratio(2, 3)(totals)


def log_relative(totals: np.ndarray) -> np.ndarray:
    """Return the log of movement over potential of a kind, relative to the rest; totals are these four."""
    return np.log(ratio(0, 1)(totals) / ratio(2, 3)(totals))


def direction(totals: np.ndarray) -> np.ndarray:
    """Return the mean change in positive minus negative samples over mean movement; sums and numbers of each."""
    return difference(totals[..., :4]) / ratio(4, 5)(totals)


def _long_enough(runs: Runs, run: str) -> StageFit:
    """Return the run's stages, or raise ``NoEffectError`` where the run is too short for any."""
    fit = runs.stage_fits[run]
    if fit.num_steps < MIN_STEPS:
        raise NoEffectError(f"the run has {count(range(fit.num_steps), 'step')}, a trend needs {MIN_STEPS}")
    return fit


_DIRECTION = ["positive_dp", "positive_tokens", "negative_dp", "negative_tokens", "high_movement", "high_tokens"]

PARTS: dict[str, dict[str, Callable[..., Estimate]]] = {
    "S1": {
        "entropy slows": of_policy(slows(0)),
        "accuracy slows": of_policy(slows(1)),
        "two stages": of_policy(two_stages),
    },
    "E1": {"association": of_policy(exchange.association), "fit": of_policy(exchange.captured)},
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
