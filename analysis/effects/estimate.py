"""From sums per prompt, or series per step, to an effect with its interval.

An effect of several runs is the mean over them. Its interval is the widest of those that apply:

- over steps: blocks of neighbouring steps are drawn, with all their prompts, since the policy of one step is nearly
  that of the next, and all prompts of a step share it;
- over prompts, where prompts occur at several steps or the steps are too few: prompts are drawn with replacement, all
  that they contributed together;
- over runs: Student's t over the effects of at least ``MIN_RUNS`` runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from analysis import queries
from analysis.runs import Runs
from analysis.stages import MIN_STEPS, fitted_ends, num_rising_blocks
from analysis.stats import DRAWS, Estimate, block_length, resample_blocks, resample_clusters

if TYPE_CHECKING:
    import polars as pl

MIN_RUNS = 3
MIN_BLOCKS = 3

# From totals, shape (..., runs, values), to the effect of each run, (..., runs).
Effect = Callable[[np.ndarray], np.ndarray]


class NoEffectError(Exception):
    """No effect can be computed; the message says why.

    Attributes:
        is_recorded: The data are there, but the effect is not defined on them.
    """

    def __init__(self, reason: str, *, is_recorded: bool = False) -> None:
        """``reason`` ends up in the scorecard."""
        super().__init__(reason)
        self.is_recorded = is_recorded


def require_rising(runs: Runs, run_ids: Sequence[str]) -> None:
    """Raises ``NoEffectError`` unless every run is long enough to have a rising stage."""
    for run in run_ids:
        fit = runs.stage_fits[run]
        if fit.num_steps < MIN_STEPS:
            raise NoEffectError(f"no rising stage recorded: {fit.reason}")


def require_plateau(runs: Runs, run_ids: Sequence[str]) -> None:
    """Raises ``NoEffectError`` unless every run has a plateau."""
    for run in run_ids:
        if runs.stage_fits[run].boundary is None:
            raise NoEffectError(f"run {run} has no plateau: {runs.stage_fits[run].reason}")


def fetch(runs: Runs, stem: str, run_ids: Sequence[str]) -> pl.DataFrame:
    """Rows of a cluster query.

    Raises:
        NoEffectError: some run has none; the message says what to record.
    """
    frame = runs.query_once(stem, run_ids)
    if set(frame["run_id"]) != set(run_ids):
        raise NoEffectError(runs.why_empty(queries.need(stem)))
    return frame


def level(
    frame: pl.DataFrame, run_ids: Sequence[str], values: Sequence[str], effect: Effect, rng: np.random.Generator
) -> Estimate:
    """Effect on totals over a stage.

    Args:
        frame: Sums, one row per run, (step,) and prompt; with a column ``step`` blocks of steps are resampled too.
        run_ids: The runs.
        values: Columns of sums.
        effect: See ``Effect``.
        rng: Source of randomness.

    Raises:
        NoEffectError: the effect of a run is undefined on what it recorded.
    """
    by_prompt = totals_by(frame, "prompt_id", run_ids, values)
    steps = f" in {frame.select('run_id', 'step').n_unique()} steps" if "step" in frame.columns else ""
    n, of = len(by_prompt), f"prompts{steps}, {count(run_ids, 'run')}"
    with np.errstate(divide="ignore", invalid="ignore"):
        by_run = effect(by_prompt.sum(0))
        if not np.isfinite(by_run).all():
            raise NoEffectError("a run holds no such tokens or responses", is_recorded=True)
        value = float(by_run.mean())
        estimates = over_runs(by_run, n, of)
        over_steps = _resample_steps(frame, run_ids, values, rng)
        if over_steps:
            totals, blocks = over_steps
            estimates.append(Estimate.from_draws(value, effect(totals).mean(-1), blocks - 1, n, of))
        # What a prompt contributes at one step only is drawn with that step.
        if not over_steps or frame.height > n:
            draws = effect(resample_clusters(by_prompt, rng)).mean(-1)
            estimates.append(Estimate.from_draws(value, draws, n - 1, n, of))
    return widest(estimates)


def change(
    runs: Runs,
    frame: pl.DataFrame,
    run_ids: Sequence[str],
    values: Sequence[str],
    effect: Effect,
    rng: np.random.Generator,
) -> Estimate:
    """Effect on the fitted values of series at both ends of the rising stage; see ``stages.fitted_ends``.

    Args:
        runs: Holds the stages.
        frame: One row per run and step; steps on which a series is undefined are left out.
        run_ids: The runs.
        values: Columns that hold the series.
        effect: From ``(..., runs, 2 ends, values)`` to ``(..., runs)``.
        rng: Source of randomness.

    Raises:
        NoEffectError: the effect of a run is undefined.
    """
    ends, draws = [], []
    for run in run_ids:
        part = frame.filter(run_id=run).drop_nulls(list(values))
        if part.height < MIN_STEPS:
            raise NoEffectError(f"run {run} has {part.height} steps with such responses, a trend needs {MIN_STEPS}")
        found = fitted_ends(runs.stage_fits[run], part["step"].to_numpy(), part.select(values).to_numpy(), rng)
        ends.append(found[0])
        draws.append(found[1])
    with np.errstate(divide="ignore", invalid="ignore"):
        by_run = effect(np.stack(ends))
        drawn = effect(np.stack(draws, axis=1)).mean(-1)
    if not np.isfinite(by_run).all():
        raise NoEffectError("the effect is not defined on this run", is_recorded=True)
    blocks = sum(num_rising_blocks(runs.stage_fits[run]) for run in run_ids)
    n, of = frame.height, f"steps, {count(run_ids, 'run')}"
    estimate = Estimate.from_draws(float(by_run.mean()), drawn, max(blocks - 1, 1), n, of)
    return widest([estimate, *over_runs(by_run, n, of)])


def ratio(top: int, bottom: int) -> Effect:
    """Effect: one total divided by another."""
    return lambda totals: totals[..., top] / totals[..., bottom]


def over_runs(by_run: np.ndarray, n: int, of: str) -> list[Estimate]:
    """Student's t over the effects of runs; nothing for fewer than ``MIN_RUNS``."""
    if len(by_run) < MIN_RUNS:
        return []
    error = float(np.std(by_run, ddof=1) / np.sqrt(len(by_run)))
    return [Estimate.from_error(float(by_run.mean()), error, len(by_run) - 1, n, of)]


def widest(estimates: Sequence[Estimate]) -> Estimate:
    """The estimate whose interval is widest: the dependence that costs most decides."""
    return max(estimates, key=lambda estimate: estimate.width)


def count(items: Sequence[object] | np.ndarray, noun: str) -> str:
    """``1 run`` or ``3 runs``."""
    return f"{len(items)} {noun}{'s' * (len(items) != 1)}"


def totals_by(frame: pl.DataFrame, key: str, run_ids: Sequence[str], values: Sequence[str]) -> np.ndarray:
    """Sums of ``values`` by ``key`` and run, shape ``(keys, runs, values)``, keys in order; 0 where there is none."""
    return tensor(frame, {key: sorted(frame[key].unique()), "run_id": list(run_ids)}, values)


def tensor(frame: pl.DataFrame, axes: Mapping[str, Sequence[object]], values: Sequence[str]) -> np.ndarray:
    """Sums of ``values`` by ``axes``, shape ``(*axes, values)``; rows of other levels are left out."""
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


def _resample_steps(
    frame: pl.DataFrame, run_ids: Sequence[str], values: Sequence[str], rng: np.random.Generator
) -> tuple[np.ndarray, float] | None:
    """Totals over blocks of steps drawn with replacement, ``(draws, runs, values)``, and the number of blocks.

    Each run draws blocks of its own. Blocks span the same stretch of training whether every step was recorded or every
    n-th. None without steps, or where a run has too few blocks.
    """
    if "step" not in frame.columns:
        return None
    draws, blocks = [], 0.0
    for run in run_ids:
        part = frame.filter(run_id=run)
        sums = totals_by(part, "step", [run], values)[:, 0]
        steps = part["step"].unique().sort().to_numpy()
        spacing = np.median(np.diff(steps)) if len(steps) > 1 else 1
        # Two at least: a block of one would take neighbours for independent.
        block = max(2, round(block_length(int(steps[-1] - steps[0]) + 1) / spacing))
        if len(steps) < MIN_BLOCKS * block:
            return None
        times = np.zeros((DRAWS, len(steps)))
        np.add.at(times, (np.arange(DRAWS)[None, :], resample_blocks(len(steps), rng, DRAWS, block)), 1)
        draws.append(times @ sums)
        blocks += len(steps) / block
    return np.stack(draws, axis=1), blocks
