"""Estimate effects, with intervals, from sums per prompt or series per step.

Within a run, ``statistics.clusters`` and ``statistics.contrasts`` account for recurring prompts and autocorrelated
steps. The effect of several runs is their mean, and its interval accounts for the scatter between runs
(``statistics.combination``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from entrace.analysis.runs import Runs
from entrace.analysis.statistics.clusters import Effect, level, over_clusters, step_values
from entrace.analysis.statistics.combination import combine
from entrace.analysis.statistics.contrasts import contrast
from entrace.analysis.statistics.estimates import Estimate
from entrace.analysis.statistics.stages import MIN_STEPS, trend_weights

if TYPE_CHECKING:
    import polars as pl


# Estimate of an effect from the runs with these ids.
Estimator = Callable[[Runs, Sequence[str]], Estimate]

# Steps that a rising stage needs for its start and end to be distinguishable from noise.
MIN_TREND = 8


class NoEffectError(Exception):
    """Signal that an effect cannot be computed; the message gives the reason.

    Attributes:
        is_recorded: True if the data are recorded but the effect is undefined on them.
    """

    def __init__(self, reason: str, *, is_recorded: bool = False) -> None:
        """Store the reason, which the scorecard shows."""
        super().__init__(reason)
        self.is_recorded = is_recorded


def require_rising(runs: Runs, run_ids: Sequence[str]) -> None:
    """Raise ``NoEffectError`` unless every run is long enough to have a rising stage."""
    for run in run_ids:
        fit = runs.stage_fits[run]
        if fit.num_steps < MIN_STEPS:
            raise NoEffectError(f"no rising stage was recorded: {fit.reason}")


def require_plateau(runs: Runs, run_ids: Sequence[str]) -> None:
    """Raise ``NoEffectError`` unless every run has a plateau."""
    for run in run_ids:
        fit = runs.stage_fits[run]
        if fit.boundary is None:
            raise NoEffectError(f"run {run} has no plateau: {fit.reason}", is_recorded=fit.num_steps >= MIN_STEPS)


def fetch(runs: Runs, stem: str, run_ids: Sequence[str]) -> pl.DataFrame:
    """Return the rows of a claim query.

    Raises:
        NoEffectError: a run has no rows; the message says what to record.
    """
    frame = runs.query_once(stem, run_ids)
    if set(frame["run_id"]) != set(run_ids):
        raise NoEffectError(runs.why_empty(stem))
    return frame


def over_runs(
    frame: pl.DataFrame, run_ids: Sequence[str], estimate: Callable[[str, pl.DataFrame], Estimate], unit: str
) -> Estimate:
    """Return the mean of an effect over runs.

    Args:
        frame: Rows of all runs.
        run_ids: Runs to average over.
        estimate: Function from a run and its rows to the effect of the run.
        unit: Name of the units, such as ``prompts``.

    Raises:
        NoEffectError: the effect of a run is undefined on its data.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        found = [estimate(run, frame.filter(run_id=run)) for run in run_ids]
    return mean_of_runs(found, f"{unit}, {count(run_ids, 'run')}")


def mean_of_runs(found: Sequence[Estimate], of: str) -> Estimate:
    """Return the mean of the effects of runs; see ``statistics.combination.combine``.

    Raises:
        NoEffectError: an effect is not finite.
    """
    if not all(np.isfinite(of_run.value) for of_run in found):
        raise NoEffectError("a run has no such tokens or responses", is_recorded=True)
    return combine(found, of)


def plateau_level(
    runs: Runs, frame: pl.DataFrame, run_ids: Sequence[str], values: Sequence[str], effect: Effect
) -> Estimate:
    """Return an effect on totals over a stage.

    ``frame`` has one row per run, step, and prompt.
    """

    def estimate(run: str, part: pl.DataFrame) -> Estimate:
        persistence = runs.stage_fits[run].persistence
        steps, prompts = _codes(part, "step"), _codes(part, "prompt_id")
        return level(steps, prompts, _matrix(part, values), effect, persistence=persistence)

    return over_runs(frame, run_ids, estimate, "prompts")


def mean_of_steps(
    runs: Runs, frame: pl.DataFrame, run_ids: Sequence[str], values: Sequence[str], effect: Effect
) -> Estimate:
    """Return the mean over steps of an effect on the totals of each step."""

    def estimate(run: str, part: pl.DataFrame) -> Estimate:
        steps, series, noise, noise_df = step_values(
            _codes(part, "step"), _codes(part, "prompt_id"), _matrix(part, values), effect
        )
        weights = np.full(len(steps), 1 / max(len(steps), 1))
        return contrast(
            series,
            np.ones((len(steps), 1)),
            weights,
            steps=steps,
            noise=noise,
            noise_df=noise_df,
            persistence=runs.stage_fits[run].persistence,
        )

    return over_runs(frame, run_ids, estimate, "steps")


def rising_change(
    runs: Runs, frame: pl.DataFrame, run_ids: Sequence[str], values: Sequence[str], effect: Effect
) -> Estimate:
    """Return the change of an effect over the rising stage, end minus start.

    The effect is on the totals of a step.

    Args:
        runs: Runs with their stages.
        frame: One row per run, step, and prompt. Steps with an undefined effect are dropped.
        run_ids: Runs to average over.
        values: Columns of sums.
        effect: See ``Effect``.

    Raises:
        NoEffectError: a run has too few steps with a defined effect.
    """

    def estimate(run: str, part: pl.DataFrame) -> Estimate:
        steps, series, noise, noise_df = step_values(
            _codes(part, "step"), _codes(part, "prompt_id"), _matrix(part, values), effect
        )
        return change_of(runs, run, steps, series, noise, noise_df)

    return over_runs(frame, run_ids, estimate, "steps")


def change_of(
    runs: Runs,
    run: str,
    steps: np.ndarray,
    series: np.ndarray,
    noise: np.ndarray | None = None,
    noise_df: float = 0.0,
) -> Estimate:
    """Return the change of a series of one run over its rising stage.

    See ``stages.trend_weights``.
    """
    fit = runs.stage_fits[run]
    rising = int((steps <= (fit.last_step if fit.boundary is None else fit.boundary)).sum())
    if rising < MIN_TREND:
        raise NoEffectError(
            f"the rising stage of run {run} has {rising} steps with such responses; a trend needs {MIN_TREND}",
            is_recorded=True,
        )
    basis, weights = trend_weights(fit, steps, noise)
    return contrast(
        series,
        basis,
        weights,
        steps=steps,
        noise=noise,
        noise_df=noise_df,
        num_relevant=rising,
        persistence=fit.persistence,
        n=len(steps),
    )


def prompts_level(
    frame: pl.DataFrame,
    run_ids: Sequence[str],
    values: Sequence[str],
    effect: Effect,
    bounds: tuple[float, float] | None = None,
) -> Estimate:
    """Return an effect on totals over independent prompts, regardless of steps."""

    def estimate(_: str, part: pl.DataFrame) -> Estimate:
        return over_clusters(_matrix(part, values), _codes(part, "prompt_id"), effect, "prompts", bounds)

    return over_runs(frame, run_ids, estimate, "prompts")


def ratio(top: int, bottom: int) -> Effect:
    """Return an ``Effect`` that divides one total by another."""
    return lambda totals: totals[..., top] / totals[..., bottom]


def count(items: Sequence[object] | np.ndarray, noun: str) -> str:
    """Return ``1 run`` or ``3 runs``."""
    return f"{len(items)} {noun}{'s' * (len(items) != 1)}"


def _codes(frame: pl.DataFrame, name: str) -> np.ndarray:
    """Return a column as integers; texts are replaced by their rank."""
    column = frame[name]
    return (column if column.dtype.is_integer() else column.rank("dense")).to_numpy().astype(np.int64)


def _matrix(frame: pl.DataFrame, values: Sequence[str]) -> np.ndarray:
    # A column may be named twice, as the divisor of two sums.
    return np.column_stack([frame[name].cast(float).to_numpy() for name in values])
