"""Effects that claims about training itself are judged by: one function for each part of a claim.

Every function takes the runs, the run_ids to look at and a random generator, and returns an ``Estimate``. What is
measured, and in which unit, stands in reports/claims.toml.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from analysis.effects.estimate import (
    Effect,
    NoEffectError,
    change,
    count,
    fetch,
    level,
    over_runs,
    ratio,
    require_plateau,
    require_rising,
    widest,
)
from analysis.runs import Runs
from analysis.stages import decompose_fall, fit_exchange, num_rising_blocks, relative_speed
from analysis.stats import Estimate, block_length

# Share of all movement that the top fifth of tokens would carry if movements were normally distributed:
# exp(-z^2 / 2) with z the quantile of the normal distribution at 0.9.
NORMAL_TOP_FIFTH = 0.4399

Judged = Callable[[Runs, Sequence[str], np.random.Generator], Estimate]


def of_policy(judged: Judged) -> Judged:
    """What is about the entropy of the policy itself: not judged where another model scored what it sampled."""

    def judge(runs: Runs, run_ids: Sequence[str], rng: np.random.Generator) -> Estimate:
        for run in run_ids:
            if reason := (runs.manifests.get(run, {}).get("unknown") or {}).get("policy.entropy"):
                raise NoEffectError(str(reason))
        return judged(runs, run_ids, rng)

    return judge


def slowdown(series: int) -> Judged:
    """S1: share of the rising stage's speed that is lost in the plateau, 1 - |relative speed|; 0 entropy, 1 accuracy.

    The interval is that of the signed relative speed, mapped: where it holds 0, a standstill is possible.
    """

    def judge(runs: Runs, run_ids: Sequence[str], rng: np.random.Generator) -> Estimate:
        del rng  # The fit brings its own bootstrap.
        fits = [runs.stage_fits[run] for run in run_ids]
        for run, fit in zip(run_ids, fits, strict=True):
            if fit.boundary is None:
                raise NoEffectError(f"no boundary inside run {run}: {fit.reason}", is_recorded=True)
        speeds = np.array([relative_speed(fit.slopes)[series] for fit in fits])
        if not np.isfinite(speeds).all():
            raise NoEffectError("it does not move the expected way in the rising stage", is_recorded=True)
        draws = np.mean([relative_speed(fit.slope_draws)[:, series] for fit in fits], axis=0)
        df = sum(num_rising_blocks(fit) for fit in fits) - 1
        n, of = sum(fit.num_steps for fit in fits), f"steps, {count(run_ids, 'run')}"
        speed, lost = (
            widest([Estimate.from_draws(float(by_run.mean()), draws, df, n, of), *over_runs(by_run, n, of)])
            for by_run in (speeds, 1 - np.abs(speeds))
        )
        ends = sorted((abs(speed.low), abs(speed.high)))
        slowest = 0.0 if speed.low <= 0 <= speed.high else ends[0]
        return Estimate(lost.value, 1 - ends[1], 1 - slowest, lost.p_value, n, of)

    return judge


def exchange_slope(runs: Runs, run_ids: Sequence[str], rng: np.random.Generator) -> Estimate:
    """E1: a in accuracy = -a exp(H) + b, least squares over all steps of a run (arXiv 2505.22617)."""
    require_rising(runs, run_ids)
    frame = fetch(runs, "exchange_law", run_ids)
    slopes, draws, blocks = [], [], 0.0
    for run in run_ids:
        part = frame.filter(run_id=run)
        x, y = (part[name].cast(float).to_numpy() for name in ("exp_entropy", "accuracy"))
        if np.ptp(x) == 0:
            raise NoEffectError("entropy did not move", is_recorded=True)
        fit, drawn = fit_exchange(x, y, part.filter(stage="rising").height, rng)
        slopes.append(fit[0])
        draws.append(drawn[:, 0])
        blocks += len(x) / block_length(len(x))
    n, of = frame.height, f"steps, {count(run_ids, 'run')}"
    estimate = Estimate.from_draws(float(np.mean(slopes)), np.mean(draws, axis=0), blocks - 1, n, of)
    return widest([estimate, *over_runs(np.array(slopes), n, of)])


def rising(stem: str, values: Sequence[str], effect: Effect) -> Judged:
    """An effect on series of query ``stem``, fitted at both ends of the rising stage; see ``estimate.change``."""

    def judge(runs: Runs, run_ids: Sequence[str], rng: np.random.Generator) -> Estimate:
        require_rising(runs, run_ids)
        return change(runs, fetch(runs, stem, run_ids), run_ids, values, effect, rng)

    return judge


def plateau(stem: str, values: Sequence[str], effect: Effect) -> Judged:
    """An effect on sums of query ``stem`` over the plateau; see ``estimate.level``."""

    def judge(runs: Runs, run_ids: Sequence[str], rng: np.random.Generator) -> Estimate:
        require_plateau(runs, run_ids)
        return level(fetch(runs, stem, run_ids), run_ids, values, effect, rng)

    return judge


def excess(stem: str, values: Sequence[str], effect: Effect) -> Judged:
    """By how much an effect that is a ratio exceeds 1 over the plateau.

    It is judged by its logarithm, and of several runs it is the geometric mean: where the divisor is small, an interval
    as wide on either side of the ratio itself would reach below 0.
    """
    log = plateau(stem, values, lambda totals: np.log(effect(totals)))

    def judge(runs: Runs, run_ids: Sequence[str], rng: np.random.Generator) -> Estimate:
        found = log(runs, run_ids, rng)
        value, low, high = np.expm1([found.value, found.low, found.high]).tolist()
        return replace(found, value=value, low=low, high=high)

    return judge


def interventions(values: Sequence[str], effect: Effect) -> Judged:
    """An effect on sums over interventions, wherever their checkpoint stands."""

    def judge(runs: Runs, run_ids: Sequence[str], rng: np.random.Generator) -> Estimate:
        return level(fetch(runs, "impact_sums", run_ids), run_ids, values, effect, rng)

    return judge


def mainly_negative(ends: np.ndarray) -> np.ndarray:
    """(Fall within negative - fall within positive samples) / fall of entropy; nan where entropy did not fall.

    Args:
        ends: Negative entropy, positive entropy, negative share at both ends, shape ``(..., 2, 3)``.
    """
    share = np.stack((ends[..., 2], 1 - ends[..., 2]), axis=-1)
    within, between = decompose_fall(share, share * ends[..., :2])
    fall = (within + between).sum(-1)
    return np.where(fall > 0, (within[..., 0] - within[..., 1]) / fall, np.nan)


def fall(ends: np.ndarray) -> np.ndarray:
    """Value at the start minus value at the end, of the one series in ``(..., 2, 1)``."""
    return ends[..., 0, 0] - ends[..., 1, 0]


def minus(effect: Effect, constant: float) -> Effect:
    """Effect less what it would be without what is claimed."""
    return lambda totals: effect(totals) - constant


def quotient(totals: np.ndarray) -> np.ndarray:
    """First mean divided by the second; totals are sum, number, sum, number."""
    return ratio(0, 1)(totals) / ratio(2, 3)(totals)


def difference(totals: np.ndarray) -> np.ndarray:
    """First mean minus the second; totals are sum, number, sum, number."""
    return ratio(0, 1)(totals) - ratio(2, 3)(totals)


def quotient_of_rest(totals: np.ndarray) -> np.ndarray:
    """Mean of a kind divided by that of the rest; totals are sum and number of the kind, then of all."""
    rest = (totals[..., 2] - totals[..., 0]) / (totals[..., 3] - totals[..., 1])
    return ratio(0, 1)(totals) / rest


def direction(totals: np.ndarray) -> np.ndarray:
    """Mean change in positive minus in negative samples, relative to mean movement; sums and numbers of each."""
    return difference(totals[..., :4]) / ratio(4, 5)(totals)


_DIRECTION = ["positive_dp", "positive_tokens", "negative_dp", "negative_tokens"]
_DIRECTION += ["high_entropy_movement", "high_entropy_tokens"]
_SIGNS = ["negative_entropy", "positive_entropy", "negative_share"]

PARTS: dict[str, dict[str, Judged]] = {
    "S1": {"entropy": of_policy(slowdown(0)), "accuracy": of_policy(slowdown(1))},
    "E1": {"slope": of_policy(exchange_slope)},
    "S2": {
        "mainly negative": of_policy(rising("response_series", _SIGNS, mainly_negative)),
        "same prompt": of_policy(rising("response_series", ["gap"], fall)),
    },
    "S3": {
        "reasoning": rising("category_series", ["reasoning_share"], lambda ends: -fall(ends)),
        "other words": rising("category_series", ["semantic_share"], fall),
    },
    "S4": {"any defect": rising("response_series", ["defect_share"], fall)},
    "S5": {
        "concentration": plateau("movement_sums", ["top_movement", "movement"], minus(ratio(0, 1), NORMAL_TOP_FIFTH)),
        "hardly move": plateau("movement_sums", ["still_tokens", "tokens"], minus(ratio(0, 1), 0.5)),
    },
    "S6": {
        "high entropy": excess(
            "movement_sums",
            ["high_entropy_movement", "high_entropy_tokens", "movement", "tokens"],
            quotient_of_rest,
        ),
        "large gradient": excess(
            "movement_sums",
            ["high_gradient_movement", "high_gradient_tokens", "movement", "tokens"],
            quotient_of_rest,
        ),
        "direction": plateau("movement_sums", _DIRECTION, direction),
    },
    "I1": {
        "accuracy": plateau("ppl_halves", ["difference", "num_groups"], ratio(0, 1)),
        "reasoning tokens": plateau(
            "high_entropy_terciles", ["low_reasoning", "low_tokens", "high_reasoning", "high_tokens"], difference
        ),
    },
    "I2": {
        "impact": interventions(["high_ppl_impact", "high_ppl_tokens", "low_ppl_impact", "low_ppl_tokens"], difference)
    },
    "T1": {
        "beginning": excess("position_fifths", ["first_sum", "middle_sum"], ratio(0, 1)),
        "end": excess("position_fifths", ["last_sum", "middle_sum"], ratio(0, 1)),
    },
    "T2": {"impact": interventions(["late_impact", "late_tokens", "early_impact", "early_tokens"], difference)},
    "T3": {
        "movement": excess(
            "movement_sums", ["end_movement", "end_tokens", "middle_movement", "middle_tokens"], quotient
        ),
        "gradient": excess(
            "movement_sums", ["end_grad_norm", "end_tokens", "middle_grad_norm", "middle_tokens"], quotient
        ),
    },
}
