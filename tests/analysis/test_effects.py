"""Effects and their intervals: against plain numpy, and against how often they hold a known truth."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest

from analysis.effects import training
from analysis.effects.estimate import NoEffectError, level, ratio, tensor, widest
from analysis.stages import StageFit
from analysis.stats import Estimate

STEPS, PROMPTS = 60, 8


def sums_of(values: np.ndarray, prompt_ids: np.ndarray) -> pl.DataFrame:
    """One row per step and prompt, ``values`` (steps, prompts)."""
    steps = np.arange(1, len(values) + 1).repeat(values.shape[1])
    return pl.DataFrame({"run_id": "r", "step": steps, "prompt_id": prompt_ids, "total": values.ravel(), "n": 1})


def fresh(steps: int) -> np.ndarray:
    return np.arange(steps * PROMPTS).astype(str)


def coverage(make, truth: float = 0.0, runs: int = 150) -> float:
    """Share of intervals that hold the truth; ``make`` returns values and prompt ids."""
    hits = 0
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        estimate = level(sums_of(*make(rng)), ["r"], ["total", "n"], ratio(0, 1), rng)
        hits += estimate.low <= truth <= estimate.high
    return hits / runs


def drift(rng: np.random.Generator, steps: int = STEPS, correlation: float = 0.5) -> np.ndarray:
    state = np.zeros(steps + 20)
    for i in range(1, len(state)):
        state[i] = correlation * state[i - 1] + rng.normal()
    return state[20:]


def test_interval_of_a_level_knows_that_steps_drift():
    found = coverage(lambda rng: (drift(rng)[:, None] + rng.normal(size=(STEPS, PROMPTS)), fresh(STEPS)))
    assert found >= 0.9


def test_interval_of_a_level_knows_that_prompts_return():
    # The same eight prompts at every step, each hard or easy throughout.
    ids = np.tile(np.arange(PROMPTS), STEPS).astype(str)
    assert coverage(lambda rng: (rng.normal(size=PROMPTS) + rng.normal(size=(STEPS, PROMPTS)), ids)) >= 0.9


def test_interval_of_a_level_is_not_too_wide_where_all_is_independent():
    values = np.random.default_rng(0).normal(size=(STEPS, PROMPTS))
    estimate = level(sums_of(values, fresh(STEPS)), ["r"], ["total", "n"], ratio(0, 1), np.random.default_rng(1))
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.width == pytest.approx(2 * 1.96 * values.std() / np.sqrt(values.size), rel=0.5)
    assert (estimate.n, estimate.of) == (STEPS * PROMPTS, "prompts in 60 steps, 1 run")


def test_too_few_steps_leave_the_prompts():
    values = np.random.default_rng(0).normal(size=(4, PROMPTS))
    estimate = level(sums_of(values, fresh(4)), ["r"], ["total", "n"], ratio(0, 1), np.random.default_rng(1))
    assert estimate.width == pytest.approx(2 * 2.04 * values.std(ddof=1) / np.sqrt(values.size), rel=0.1)


def test_runs_that_disagree_widen_the_interval():
    parts = []
    for run, mean in (("a", 0.0), ("b", 1.0), ("c", 2.0)):
        values = mean + np.random.default_rng(0).normal(0, 0.1, (STEPS, PROMPTS))
        parts.append(sums_of(values, fresh(STEPS)).with_columns(run_id=pl.lit(run)))
    rng = np.random.default_rng(1)
    estimate = level(pl.concat(parts), ["a", "b", "c"], ["total", "n"], ratio(0, 1), rng)
    assert estimate.value == pytest.approx(1, abs=0.01)
    # Student's t with two degrees of freedom over 0, 1, 2.
    assert estimate.width == pytest.approx(2 * 4.3027 / np.sqrt(3), rel=0.02)


def test_interval_of_an_excess_holds_where_the_divisor_is_small():
    # Most of the rest hardly moves, as on a plateau: an interval even about the ratio reaches below -1, and finds a
    # fifth of what is there.
    found = []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        kind, rest = rng.gamma(4, size=(20, PROMPTS)), rng.gamma(0.02, size=(20, PROMPTS))
        frame = sums_of(kind, fresh(20)).with_columns(n=rest.ravel())
        runs = SimpleNamespace(
            stage_fits={"r": SimpleNamespace(boundary=1)}, query_once=lambda stem, run_ids, frame=frame: frame
        )
        found.append(training.excess("sums", ["total", "n"], ratio(0, 1))(runs, ["r"], rng))
    assert np.mean([estimate.low <= 4 / 0.02 - 1 <= estimate.high for estimate in found]) >= 0.9
    assert np.mean([estimate.low > 0 for estimate in found]) >= 0.9


def test_effect_without_a_denominator_is_no_effect():
    frame = sums_of(np.ones((STEPS, PROMPTS)), fresh(STEPS)).with_columns(n=0)
    with pytest.raises(NoEffectError, match="holds no such tokens or responses"):
        level(frame, ["r"], ["total", "n"], ratio(0, 1), np.random.default_rng(0))


def test_tensor_adds_up_and_leaves_other_levels_out():
    frame = pl.DataFrame({"run_id": ["a", "b", "a", "c"], "prompt_id": ["x", "x", "x", "x"], "n": [1, 2, 3, 9]})
    np.testing.assert_array_equal(
        tensor(frame, {"prompt_id": ["x", "y"], "run_id": ["b", "a"]}, ["n"])[..., 0], [[2, 4], [0, 0]]
    )


def test_widest_takes_an_undefined_interval_for_the_widest():
    narrow, wide = (Estimate.from_error(0.0, error, 9, 10, "prompts") for error in (1.0, 2.0))
    undefined = Estimate(0.0, np.nan, np.nan, 1.0, 10, "prompts")
    assert widest([narrow, wide]) is wide
    assert widest([narrow, undefined, wide]) is undefined


def fit_with(speeds: np.ndarray) -> SimpleNamespace:
    """Runs whose one fit has a rising slope of -1 and 1, and draws of the plateau's relative speed."""
    slopes = np.stack((np.tile([-1.0, 1.0], (len(speeds), 1)), np.outer(speeds, [-1.0, 1.0])), axis=1)
    fit = StageFit(1, 100, 100, 50, 50.0, 45.0, 55.0, "", np.zeros((2, 2)), slopes[0], slopes)
    return SimpleNamespace(stage_fits={"r": fit})


@pytest.mark.parametrize(
    ("speed", "value", "touches_standstill"), [(0.02, 0.98, True), (-0.02, 0.98, True), (0.5, 0.5, False)]
)
def test_slowdown_maps_the_interval_of_the_signed_speed(speed: float, value: float, touches_standstill: bool):
    noise = np.random.default_rng(0).normal(0, 0.05, 1000)
    noise[0] = 0
    estimate = training.slowdown(0)(fit_with(speed + noise), ["r"], np.random.default_rng(0))
    assert estimate.value == pytest.approx(value)
    assert (estimate.high == 1) == touches_standstill
    assert estimate.low < value <= estimate.high
    assert estimate.p_value < 0.001


def test_slowdown_of_a_plateau_as_fast_as_the_rise_is_none():
    noise = np.random.default_rng(0).normal(0, 0.05, 1000)
    noise[0] = 0
    estimate = training.slowdown(1)(fit_with(1 + noise), ["r"], np.random.default_rng(0))
    assert estimate.value == pytest.approx(0)
    assert estimate.low < 0 < estimate.high
    assert estimate.p_value == pytest.approx(1)


def test_share_of_normally_distributed_movement():
    movement = np.abs(np.random.default_rng(0).normal(size=2_000_000))
    top = movement[movement >= np.quantile(movement, 0.8)].sum() / movement.sum()
    assert pytest.approx(top, abs=1e-3) == training.NORMAL_TOP_FIFTH
