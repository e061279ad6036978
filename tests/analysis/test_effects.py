"""Test effects against plain numpy, and on data without the claimed effect."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest

from entrace.analysis.effects import potential, training
from entrace.analysis.effects.estimate import NoEffectError, mean_of_runs, plateau_level, ratio
from entrace.analysis.statistics import random_movement, stages
from entrace.analysis.statistics.estimates import Estimate
from entrace.analysis.statistics.stages import fit_stages
from tests.analysis.test_intervals import autoregression

STEPS, PROMPTS = 100, 8
STEP = np.arange(1, STEPS + 1)


def sums_of(values: np.ndarray, run: str = "r") -> pl.DataFrame:
    """Return one row per step and prompt from ``values`` (steps, prompts)."""
    steps = np.arange(1, len(values) + 1).repeat(values.shape[1])
    prompts = np.arange(values.size).astype(str)
    return pl.DataFrame({"run_id": run, "step": steps, "prompt_id": prompts, "total": values.ravel(), "n": 1})


def fake_runs(frame: pl.DataFrame, **frames: pl.DataFrame) -> SimpleNamespace:
    """Return fake runs with two-stage fits whose queries return the given frames."""
    shape = np.minimum(STEP / 40, 1)
    rng = np.random.default_rng(0)
    fit = fit_stages(STEP, 1 - shape / 2 + rng.normal(0, 0.01, STEPS), shape / 2 + rng.normal(0, 0.01, STEPS))
    return SimpleNamespace(
        stage_fits=dict.fromkeys("rabc", fit),
        manifests={"r": {}},
        query_once=lambda stem, run_ids: frames.get(stem, frame),
    )


def test_level_is_the_ratio_of_totals():
    rng = np.random.default_rng(0)
    frame = sums_of(rng.normal(3, 1, (60, PROMPTS))).with_columns(n=rng.integers(1, 4, 60 * PROMPTS))
    estimate = plateau_level(fake_runs(frame), frame, ["r"], ["total", "n"], ratio(0, 1))
    assert estimate.value == pytest.approx(frame["total"].sum() / frame["n"].sum())
    assert (estimate.n, estimate.of) == (60 * PROMPTS, "prompts, 1 run")


def test_runs_that_disagree_widen_the_interval():
    rng = np.random.default_rng(0)
    frame = pl.concat(
        [sums_of(rng.normal(mean, 0.1, (60, PROMPTS)), run) for run, mean in (("a", 0), ("b", 1), ("c", 2))]
    )
    estimate = plateau_level(fake_runs(frame), frame, ["a", "b", "c"], ["total", "n"], ratio(0, 1))
    assert estimate.value == pytest.approx(1, abs=0.01)
    # Student's t with two degrees of freedom over 0, 1, 2.
    assert estimate.width == pytest.approx(2 * 4.3027 / np.sqrt(3), rel=0.02)


def test_one_run_without_information_leaves_none_to_the_mean_of_two():
    short, long = (Estimate.from_error(0.0, 0.1, 5, 10, "steps", blocks=blocks) for blocks in (2.0, 20.0))
    assert mean_of_runs([short, long], "steps, 2 runs").blocks == 2.0
    # Three runs have an interval from their spread.
    three = mean_of_runs([short, long, Estimate.from_error(0.3, 0.1, 5, 10, "steps", blocks=2.0)], "steps, 3 runs")
    assert three.blocks == np.inf
    assert three.error == pytest.approx(0.1)


def movements_of(rng: np.random.Generator, means: tuple[float, float], runs: int):
    """Return movements of runs with an error of 1 in each half, and shared draws.

    Draws use equal random numbers in all runs.
    """
    values = rng.normal(means, 1, (runs, 2))
    draws = np.random.default_rng(0).normal(size=(2000, 2))
    return [(value, value + draws, 50.0) for value in values]


def test_slowdown_of_runs_that_do_not_move_is_within_bounds_and_no_finding():
    found = [training.slowdown_of(movements_of(np.random.default_rng(i), (0, 0), 3), 300, "steps") for i in range(200)]
    assert all(-1 <= estimate.low <= estimate.value <= estimate.high <= 1 for estimate in found)
    assert np.mean([estimate.p_value <= 0.05 for estimate in found]) <= 0.05


def test_slowdown_of_several_runs_is_that_of_their_mean_movement():
    one = movements_of(np.random.default_rng(1), (20, 4), 1)
    assert training.slowdown_of(one, 100, "steps").value == pytest.approx(stages.slowdown(one[0][0]))
    three = movements_of(np.random.default_rng(1), (20, 4), 3)
    found = training.slowdown_of(three, 300, "steps")
    assert found.value == pytest.approx(stages.slowdown(np.mean([values for values, *_ in three], axis=0)))
    assert found.p_value < 0.01
    # Scatter between runs widens the interval of their mean.
    apart = [(values + shift, draws + shift, b) for (values, draws, b), shift in zip(three, (-8, 0, 8), strict=True)]
    assert training.slowdown_of(apart, 300, "steps").width > 2 * found.width


@pytest.mark.parametrize(("series", "name"), [(0, "the entropy"), (1, "the accuracy")])
def test_a_series_that_was_not_recorded_is_named(series: int, name: str):
    known = np.where(STEP < 40, STEP, 40) / 40
    columns = [known if number != series else np.full(STEPS, np.nan) for number in (0, 1)]
    runs = SimpleNamespace(stage_fits={"r": fit_stages(STEP, *columns)})
    with pytest.raises(NoEffectError, match=f"^{name} of the steps was not recorded$"):
        training.slows(series)(runs, ["r"])


def test_effect_without_a_denominator_is_no_effect():
    frame = sums_of(np.ones((STEPS, PROMPTS))).with_columns(n=0)
    with pytest.raises(NoEffectError, match="has no such tokens or responses"):
        plateau_level(fake_runs(frame), frame, ["r"], ["total", "n"], ratio(0, 1))


def test_interval_of_an_excess_holds_where_the_divisor_is_small():
    # Most of the rest hardly moves: an interval symmetric around the ratio itself would extend below -1.
    found = []
    judge = training.excess(training.plateau("sums", ["total", "n"], training.log_ratio))
    for seed in range(100):
        rng = np.random.default_rng(seed)
        kind, rest = rng.gamma(4, size=(20, PROMPTS)), rng.gamma(0.02, size=(20, PROMPTS))
        found.append(judge(fake_runs(sums_of(kind).with_columns(n=rest.ravel())), ["r"]))
    assert np.mean([estimate.low <= 4 / 0.02 - 1 <= estimate.high for estimate in found]) >= 0.88
    assert np.mean([estimate.low > 0 for estimate in found]) >= 0.9


def signs(negative: np.ndarray, positive: np.ndarray) -> pl.DataFrame:
    """Return ``sign_entropy`` rows of four groups per step around the given means."""
    rng = np.random.default_rng(0)
    noise = rng.lognormal(0, 0.02, (2, STEPS, 4))
    frame = sums_of(noise[0] * negative[:, None]).rename({"total": "negative_sum"})
    return frame.with_columns(positive_sum=pl.Series((noise[1] * positive[:, None]).ravel()))


@pytest.mark.parametrize(("kept", "expected"), [(0.6, 0.0), (0.3, np.log(2))])
def test_equal_relative_loss_is_no_difference_between_signs(kept: float, expected: float):
    shape = np.minimum((STEP - 1) / 39, 1)
    # Both lose 40% from different levels, or negative samples lose 70%.
    frame = signs(0.4 * kept**shape, 0.3 * 0.6**shape)
    judge = training.fall(training.rising("sign_entropy", ["negative_sum", "positive_sum"], training.log_ratio))
    estimate = judge(fake_runs(frame), ["r"])
    assert estimate.value == pytest.approx(expected, abs=0.06)
    assert (estimate.low > 0) == (expected > 0)


def cells(lengths: np.ndarray, share_of: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return step, length, tokens, and matching tokens of 20 responses per step.

    ``share_of`` has shape (steps, responses).
    """
    step = STEP.repeat(lengths.shape[1])
    return step, lengths.ravel(), lengths.ravel().astype(float), (lengths * share_of).ravel()


def test_shares_at_equal_length_ignore_what_length_does():
    # All responses begin with 8 matching tokens, and lengths double over the run.
    rng = np.random.default_rng(0)
    lengths = np.round(np.linspace(20, 40, STEPS)[:, None] * rng.uniform(0.7, 1.4, (STEPS, 20)))
    raw = 8 / lengths
    _, shares = training.shares_at_equal_length(*cells(lengths, raw))
    assert raw.mean(1)[0] - raw.mean(1)[-1] > 0.15
    assert abs(shares[:10].mean() - shares[-10:].mean()) < 0.03


def test_shares_at_equal_length_keep_a_change_of_their_own():
    rng = np.random.default_rng(0)
    lengths = np.round(np.linspace(20, 40, STEPS)[:, None] * rng.uniform(0.7, 1.4, (STEPS, 20)))
    steps, shares = training.shares_at_equal_length(*cells(lengths, 8 / lengths + np.linspace(0, 0.1, STEPS)[:, None]))
    assert list(steps) == list(STEP)
    assert shares[-10:].mean() - shares[:10].mean() == pytest.approx(0.1 * 0.9, abs=0.03)


def test_steps_without_a_length_in_common_are_not_compared():
    lengths = np.where(STEP[:, None] <= 50, 10, 30) * np.ones((STEPS, 4))
    with pytest.raises(NoEffectError, match="have no lengths in common"):
        training.shares_at_equal_length(*cells(lengths, 0.2 * np.ones((STEPS, 4))))


def bins_of(potential_of_tokens: np.ndarray) -> np.ndarray:
    bins = np.clip(np.floor(-4 * np.log2(4 * potential_of_tokens)), 0, random_movement.NUM_BINS - 1).astype(int)
    return np.bincount(bins, minlength=random_movement.NUM_BINS).astype(float)


def random_update(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return p (1 - p) of tokens, and changes of p under random logit changes.

    The values of p resemble those of a language model.
    """
    p = 1 / (1 + np.exp(-rng.normal(4, 3, size)))
    potential_of_tokens = p * (1 - p)
    return potential_of_tokens, potential_of_tokens * rng.normal(0, 0.2, size)


def test_share_of_the_top_fifth_under_random_changes_equals_a_simulation():
    w, dp = random_update(np.random.default_rng(0), 1_000_000)
    movement = np.sort(np.abs(dp))[::-1]
    top = movement[: len(dp) // 5].sum() / movement.sum()
    assert random_movement.random_top_share(bins_of(w)) == pytest.approx(top, abs=0.004)
    # Equal potential: exp(-z^2 / 2) with z the normal quantile at .9.
    assert random_movement.random_top_share(bins_of(np.full(10, 0.2))) == pytest.approx(0.4399, abs=1e-4)


def test_share_of_still_tokens_under_random_changes_equals_a_simulation():
    w, dp = random_update(np.random.default_rng(1), 1_000_000)
    found = random_movement.random_still_share(bins_of(w), np.abs(dp).sum())
    assert found == pytest.approx((np.abs(dp) <= 0.01).mean(), abs=0.005)


def movements(seed: int, learned: bool) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return ``movement_sums`` and ``movement_potential`` of 12 captured steps.

    Each step has 8 prompts of 60 tokens.
    """
    rng = np.random.default_rng(seed)
    sums, bins = [], []
    for step in range(5, 65, 5):
        w, dp = random_update(rng, 480)
        # Update sizes differ between steps. A learned update also moves a twentieth of the tokens thirtyfold.
        size = rng.lognormal(0, 0.5) * np.where(learned & (rng.random(480) < 0.05), 30, 1)
        movement = np.abs(dp) * size
        threshold = np.quantile(movement, 0.8)
        for prompt in range(8):
            own = slice(60 * prompt, 60 * (prompt + 1))
            keys = {"run_id": "r", "step": step, "prompt_id": f"{step}-{prompt}"}
            still, top = movement[own] <= 0.01, np.maximum(movement[own] - threshold, 0) + 0.2 * threshold
            sums.append(keys | {"tokens": 60, "movement": movement[own].sum(), "still_tokens": still.sum()})
            sums[-1] |= {"top_movement": top.sum(), "coarse_tokens": 0, "uncertain_tokens": 10, "uncertain_shift": 1.0}
            counts = bins_of(w[own])
            bins += [keys | {"bin": i, "tokens": int(n)} for i, n in enumerate(counts) if n]
    return pl.DataFrame(sums), pl.DataFrame(bins)


@pytest.mark.parametrize(
    ("learned", "part"), [(False, "concentration"), (False, "hardly move"), (True, "concentration")]
)
def test_random_changes_are_not_concentrated_and_learned_ones_are(learned: bool, part: str):
    verdicts = []
    for seed in range(12):
        sums, bins = movements(seed, learned)
        runs = fake_runs(sums, movement_potential=bins)
        estimate = training.PARTS["S5"][part](runs, ["r"])
        verdicts.append(estimate.low > 0 or estimate.high < 0)
        assert abs(estimate.value) < 0.05 or learned
    assert np.mean(verdicts) >= 0.9 if learned else sum(verdicts) <= 2


@pytest.mark.parametrize(("shift", "coarse"), [(2e-6, 0), (0.015, 60)])
def test_rounding_does_not_count_as_movement(shift: float, coarse: int):
    # Two float32 passes; log-probabilities stored with the eight bits of bfloat16.
    sums, bins = movements(0, learned=False)
    sums = sums.with_columns(uncertain_shift=10 * shift, coarse_tokens=pl.lit(coarse))
    for claim, part in (("S5", "concentration"), ("S6", "direction"), ("S6", "high entropy")):
        with pytest.raises(NoEffectError, match="no more than rounding"):
            training.PARTS[claim][part](fake_runs(sums, movement_potential=bins), ["r"])


def test_end_over_middle_equals_a_loop():
    rng = np.random.default_rng(0)
    tokens, sums = rng.integers(1, 9, (2, 10)).astype(float), rng.gamma(2, size=(2, 10))
    expected = []
    for part in (0, 1):
        usual = sum(tokens[part, b] * sums[:, b].sum() / tokens[:, b].sum() for b in range(10))
        expected.append(sums[part].sum() / usual)
    found = potential.end_over_middle(np.concatenate([tokens.ravel(), sums.ravel()]))
    assert found == pytest.approx(np.log(expected[1] / expected[0]))


def test_more_entropy_at_the_end_does_not_count_as_greater_potential():
    # Movement depends only on the entropy bin; the end has more tokens in the upper bins.
    usual = 1.0 + np.arange(10)
    tokens = np.array([np.linspace(10, 1, 10), np.linspace(1, 10, 10)])
    found = potential.end_over_middle(np.concatenate([tokens.ravel(), (tokens * usual).ravel()]))
    assert found == pytest.approx(0, abs=1e-12)


def halves_of(entropy: np.ndarray, accuracy: np.ndarray, seed: int, difficulty: float = 0.0) -> pl.DataFrame:
    """Return ``exchange_halves`` of 32 prompts per step.

    Hard prompts have higher entropy and lower accuracy.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for step, h, a in zip(STEP, entropy, accuracy, strict=True):
        hard = rng.normal(size=(2, 16))
        own = h + difficulty * 0.1 * hard + rng.normal(0, 0.05, hard.shape)
        right = rng.binomial(8, np.clip(a - difficulty * 0.2 * hard, 0, 1))
        for half in (0, 1):
            sums = {"entropy_sum": 100 * own[half].sum(), "tokens": 1600.0, "correct": float(right[half].sum())}
            rows.append({"run_id": "r", "step": int(step), "half": half, "responses": 128.0} | sums)
    return pl.DataFrame(rows)


def judge_exchange(frame: pl.DataFrame, part: str) -> Estimate | None:
    try:
        return training.PARTS["E1"][part](fake_runs(frame), ["r"])
    except NoEffectError:
        return None


def test_the_exchange_law_is_found_where_it_holds():
    shape = np.minimum(STEP / 35, 1)
    entropy = 0.9 - 0.5 * shape
    for seed in range(4):
        frame = halves_of(entropy, 1.3 - 0.4 * np.exp(entropy), seed, difficulty=1.0)
        association, fit = (judge_exchange(frame, part) for part in ("association", "fit"))
        assert association
        assert association.low > 0
        assert association.value == pytest.approx(0.4, abs=0.1)
        assert fit
        assert fit.low > 0


@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_a_policy_that_does_not_learn_has_no_exchange(correlation: float):
    found = []
    for seed in range(25):
        rng = np.random.default_rng(seed)
        drift = [autoregression(rng, STEPS, correlation) for _ in range(2)]
        frame = halves_of(0.5 + 0.02 * drift[0], 0.5 + 0.02 * drift[1], seed, difficulty=1.0)
        association, fit = (judge_exchange(frame, part) for part in ("association", "fit"))
        found.append(
            bool(association and association.blocks >= 3 and (association.low > 0.1 or association.high < -0.1))
        )
        assert fit is None or fit.low <= 0.02
    assert sum(found) <= 2


def test_entropy_that_falls_first_does_not_carry_an_accuracy_that_rises_late():
    entropy, accuracy = 0.3 + 0.5 * np.exp(-STEP / 12), 0.3 + 0.5 / (1 + np.exp(-(STEP - 75) / 5))
    for seed in range(5):
        frame = halves_of(entropy, accuracy, seed)
        association, fit = (judge_exchange(frame, part) for part in ("association", "fit"))
        assert association is None or association.low < 0.1
        assert fit
        assert fit.high < 0


def test_each_series_of_interventions_is_judged_by_itself():
    series = {"checkpoint_step": 100, "seed": 0, "temperature": 1.0}
    rows = [
        {"run_id": "r", "prompt_id": f"p{i}", "selection": selection, "late_impact": impact} | series
        for selection, impact in (("entropy 0-1", 0.1), ("entropy 0.8-1", 0.3))
        for i in range(6)
    ]
    frame = pl.DataFrame(rows).with_columns(late_tokens=1, early_tokens=1, early_impact=0.0)
    found = {
        name: estimate().value for name, estimate in training.estimators("T2", "impact", {}, fake_runs(frame), ["r"])
    }
    assert found == {
        "checkpoint 100, selection entropy 0-1, seed 0, temperature 1.0": pytest.approx(0.1),
        "checkpoint 100, selection entropy 0.8-1, seed 0, temperature 1.0": pytest.approx(0.3),
    }
