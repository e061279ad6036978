"""From sums per prompt, or series per step, to an effect with its interval.

Within a run, ``statistics.intervals`` accounts for autocorrelated steps and returning prompts. The effect of several
runs is the mean over them; its interval also accounts for how much the runs differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from entrace.analysis import queries
from entrace.analysis.runs import Runs
from entrace.analysis.statistics.estimates import Estimate
from entrace.analysis.statistics.intervals import Effect, combine, contrast, level, over_clusters, step_values
from entrace.analysis.statistics.stages import MIN_STEPS, trend_weights

if TYPE_CHECKING:
    import polars as pl


# Steps of a rising stage below which start and end cannot be told apart from noise.
MIN_TREND = 8


class NoEffectError(Exception):
    """No effect can be computed; the message says why.

    Attributes:
        is_recorded: The data are there, but the effect is not defined on them.
    """

    def __init__(self, reason: str, *, is_recorded: bool = False) -> None:
        """Keep ``reason``, which ends up in the scorecard."""
        super().__init__(reason)
        self.is_recorded = is_recorded


def require_rising(runs: Runs, run_ids: Sequence[str]) -> None:
    """Raise ``NoEffectError`` unless every run is long enough to have a rising stage."""
    for run in run_ids:
        fit = runs.stage_fits[run]
        if fit.num_steps < MIN_STEPS:
            raise NoEffectError(f"no rising stage recorded: {fit.reason}")


def require_plateau(runs: Runs, run_ids: Sequence[str]) -> None:
    """Raise ``NoEffectError`` unless every run has a plateau."""
    for run in run_ids:
        fit = runs.stage_fits[run]
        if fit.boundary is None:
            raise NoEffectError(f"run {run} has no plateau: {fit.reason}", is_recorded=fit.num_steps >= MIN_STEPS)


def fetch(runs: Runs, stem: str, run_ids: Sequence[str]) -> pl.DataFrame:
    """Return the rows of a cluster query.

    Raises:
        NoEffectError: some run has none; the message says what to record.
    """
    frame = runs.query_once(stem, run_ids)
    if set(frame["run_id"]) != set(run_ids):
        raise NoEffectError(runs.why_empty(queries.need(stem)))
    return frame


def over_runs(
    frame: pl.DataFrame, run_ids: Sequence[str], judge: Callable[[str, pl.DataFrame], Estimate], unit: str
) -> Estimate:
    """Return the mean of an effect over runs.

    Args:
        frame: Rows of all runs.
        run_ids: The runs.
        judge: From a run and its rows to the run's effect.
        unit: What the effect counts, such as ``prompts``.

    Raises:
        NoEffectError: the effect of a run is undefined on what it recorded.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        found = [judge(run, frame.filter(run_id=run)) for run in run_ids]
    return mean_of_runs(found, f"{unit}, {count(run_ids, 'run')}")


def mean_of_runs(found: Sequence[Estimate], of: str) -> Estimate:
    """Return the mean of the effects of runs; see ``statistics.intervals.combine``.

    Raises:
        NoEffectError: an effect is not finite.
    """
    if not all(np.isfinite(estimate.value) for estimate in found):
        raise NoEffectError("a run holds no such tokens or responses", is_recorded=True)
    return combine(found, of)


def plateau_level(
    runs: Runs, frame: pl.DataFrame, run_ids: Sequence[str], values: Sequence[str], effect: Effect
) -> Estimate:
    """Return an effect on totals over a stage; ``frame`` has one row per run, step, and prompt."""

    def judge(run: str, part: pl.DataFrame) -> Estimate:
        persistence = runs.stage_fits[run].persistence
        steps, prompts = _codes(part, "step"), _codes(part, "prompt_id")
        return level(steps, prompts, _matrix(part, values), effect, persistence=persistence)

    return over_runs(frame, run_ids, judge, "prompts")


def mean_of_steps(
    runs: Runs, frame: pl.DataFrame, run_ids: Sequence[str], values: Sequence[str], effect: Effect
) -> Estimate:
    """Return the mean over steps of an effect on the totals of each step."""

    def judge(run: str, part: pl.DataFrame) -> Estimate:
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

    return over_runs(frame, run_ids, judge, "steps")


def rising_change(
    runs: Runs, frame: pl.DataFrame, run_ids: Sequence[str], values: Sequence[str], effect: Effect
) -> Estimate:
    """Return how much an effect on the totals of a step changes over the rising stage, end minus start.

    Args:
        runs: Holds the stages.
        frame: One row per run, step, and prompt; steps on which the effect is undefined are left out.
        run_ids: The runs.
        values: Columns of sums.
        effect: See ``Effect``.

    Raises:
        NoEffectError: a run has too few such steps.
    """

    def judge(run: str, part: pl.DataFrame) -> Estimate:
        steps, series, noise, noise_df = step_values(
            _codes(part, "step"), _codes(part, "prompt_id"), _matrix(part, values), effect
        )
        return change_of(runs, run, steps, series, noise, noise_df)

    return over_runs(frame, run_ids, judge, "steps")


def change_of(
    runs: Runs,
    run: str,
    steps: np.ndarray,
    series: np.ndarray,
    noise: np.ndarray | None = None,
    noise_df: float = 0.0,
) -> Estimate:
    """Return how much a series of one run changes over its rising stage; see ``stages.trend_weights``."""
    fit = runs.stage_fits[run]
    rising = int((steps <= (fit.last_step if fit.boundary is None else fit.boundary)).sum())
    if rising < MIN_TREND:
        raise NoEffectError(
            f"the rising stage of run {run} has {rising} steps with such responses, a trend needs {MIN_TREND}",
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
    """Return an effect on totals over prompts, which are independent; steps play no part."""

    def judge(_: str, part: pl.DataFrame) -> Estimate:
        return over_clusters(_matrix(part, values), _codes(part, "prompt_id"), effect, "prompts", bounds)

    return over_runs(frame, run_ids, judge, "prompts")


def ratio(top: int, bottom: int) -> Effect:
    """Return the effect: one total divided by another."""
    return lambda totals: totals[..., top] / totals[..., bottom]


def count(items: Sequence[object] | np.ndarray, noun: str) -> str:
    """Return ``1 run`` or ``3 runs``."""
    return f"{len(items)} {noun}{'s' * (len(items) != 1)}"


def tensor(frame: pl.DataFrame, axes: Mapping[str, Sequence[object]], values: Sequence[str]) -> np.ndarray:
    """Return sums of ``values`` by ``axes``, shape ``(*axes, values)``; rows of other levels are left out."""
    import polars as pl

    for name, levels in axes.items():
        frame = frame.filter(pl.col(name).is_in(list(levels)))
    sums = np.zeros((*(len(levels) for levels in axes.values()), len(values)))
    codes = [
        frame[name].replace_strict(list(levels), range(len(levels)), return_dtype=pl.Int64).to_numpy()
        for name, levels in axes.items()
    ]
    np.add.at(sums, tuple(codes), frame.select(values).to_numpy())
    return sums


def _codes(frame: pl.DataFrame, name: str) -> np.ndarray:
    """Return a column as integers: itself, or the rank of its distinct texts."""
    column = frame[name]
    return (column if column.dtype.is_integer() else column.rank("dense")).to_numpy().astype(np.int64)


def _matrix(frame: pl.DataFrame, values: Sequence[str]) -> np.ndarray:
    return frame.select(values).to_numpy().astype(float)
