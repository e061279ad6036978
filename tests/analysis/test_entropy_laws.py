"""Test the trial of entropy laws: formulas, correlations, and missing inputs."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import rankdata

from entrace.analysis.claims import INCONCLUSIVE, NOT_RECORDED, SUPPORTED, judge
from entrace.analysis.effects.entropy_laws import correlation, gain
from entrace.analysis.runs import Runs, open_runs
from entrace.analysis.statistics.partial import MIN_CHANGES, partial_correlation, smooth_trend, to_correlation
from entrace.analysis.trace.prune import prune
from entrace.analysis.trace.sampling import TokenSampling
from tests.analysis.synthetic import write_run
from tests.analysis.test_digests import accept_edits
from tests.calibration.parameters import UpdateWorld
from tests.calibration.simulate_updates import UpdateRun, simulate_updates, write_updates
from tests.calibration.truth import forecasts_of
from tests.slow import slow_after

LAWS = ("E2", "E3", "E4")


def entropy_of(z: np.ndarray) -> float:
    p = np.exp(z - z.max())
    p /= p.sum()
    return float(-(p * np.log(p)).sum())


@pytest.mark.parametrize("advantage", [1.5, -0.5])
def test_formulas_are_what_gradient_steps_do_to_a_softmax(tiny: Runs, advantage: float):
    z = np.random.default_rng(0).normal(0, 1.5, 7)
    p = np.exp(z) / np.exp(z).sum()
    h, token, step = entropy_of(z), 2, 1e-6
    logp = float(np.log(p[token]))
    names = ("discriminator_law", "omega_law", "omega_unsquared_law", "quadrant_law")
    arguments = {name: "$logp, $a" if name == "quadrant_law" else "$logp, $h, $a" for name in names}
    given = {"logp": logp, "h": h, "a": advantage}
    found = {
        name: tiny.sql(
            f"select {name}({arguments[name]}) as x, $h::double as h, $logp::double as logp, $a::double as a", given
        )["x"].item()
        for name in names
    }
    # S*: the logit of the token alone moves by A.
    alone = z + step * advantage * (np.arange(7) == token)
    assert found["discriminator_law"] == pytest.approx((entropy_of(alone) - h) / step, rel=1e-4)
    # Omega: the same move by A (1 - p), with the other probabilities in proportion: times (1 - p) and over p.
    assert found["omega_law"] == pytest.approx(found["discriminator_law"] * (1 - p[token]) ** 2 / p[token], rel=1e-9)
    assert found["omega_unsquared_law"] == pytest.approx(found["omega_law"] / (1 - p[token]), rel=1e-9)
    assert found["quadrant_law"] == (np.sign(advantage) if p[token] < 0.5 else -np.sign(advantage))


@pytest.mark.parametrize("advantage", [1.5, -0.5])
@pytest.mark.parametrize("scale", [0.5, 2.0, 8.0])
def test_first_order_is_the_derivative_along_the_gradient_of_the_token(tiny: Runs, scale: float, advantage: float):
    """Take the derivative by autograd in float64 for every token of a vocabulary.

    Scale 8 has nearly certain tokens.
    """
    torch = pytest.importorskip("torch")
    logits = torch.from_numpy(np.random.default_rng(2).normal(0, scale, 7))
    for token in range(7):
        step = torch.zeros((), dtype=torch.float64, requires_grad=True)
        own = logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(advantage * torch.log_softmax(own, 0)[token], own)
        logp = torch.log_softmax(logits + step * gradient, 0)
        entropy = -(logp.exp() * logp).sum()
        (expected,) = torch.autograd.grad(entropy, step)
        others = [(math.exp(value), value) for v, value in enumerate(logp.tolist()) if v != token]
        given = {
            "logp": logp[token].item(),
            "h": entropy.item(),
            "a": advantage,
            "p2": sum(p * p for p, _ in others),
            "p2_logp": sum(p * p * value for p, value in others),
        }
        text = "select first_order_law($logp::double, $h::double, $a::double, $p2::double, $p2_logp::double)"
        assert tiny.sql(text, given).item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-15)


def test_first_order_takes_part_only_where_the_sums_are_recorded(study_path: Path, tiny: Runs):
    without = open_runs(study_path / "none-seed0").query("entropy_laws", stage="rising")
    assert "omega" in set(without["predictor"])
    assert "first_order" not in set(without["predictor"])
    assert "first_order" in set(tiny.query("entropy_laws", stage="plateau")["predictor"])


def test_own_gradient_is_the_change_of_the_logprob(tiny: Runs):
    rng = np.random.default_rng(1)
    hidden, weight, token, advantage, step = rng.normal(size=4), rng.normal(size=(6, 4)), 3, -0.7, 1e-7
    p = np.exp(weight @ hidden) / np.exp(weight @ hidden).sum()
    gradient = advantage * np.outer((np.arange(6) == token) - p, hidden)
    logits = (weight + step * gradient) @ hidden
    moved = logits[token] - np.log(np.exp(logits).sum()) - np.log(p[token])
    given = {"g": float(np.linalg.norm(gradient)), "a": advantage}
    assert tiny.sql("select own_gradient($g::double, $a::double)", given).item() == pytest.approx(
        moved / step, rel=1e-4
    )


def naive(frame: pl.DataFrame, predictor: str, target: str, *, by_rank: bool) -> float:
    """Return a correlation within steps, by a loop over steps."""
    x, y = [], []
    for step in frame["step"].unique():
        part = frame.filter(step=step)
        values = [part[name].to_numpy() for name in (predictor, target)]
        values = [rankdata(column) if by_rank else column for column in values]
        for deviations, column in zip((x, y), values, strict=True):
            deviations += (column - column.mean()).tolist()
    return float(np.corrcoef(x, y)[0, 1])


@pytest.fixture(scope="module")
def one(study_path: Path) -> Runs:
    return open_runs(study_path / "none-seed0")


@pytest.fixture(scope="module")
def tokens(one: Runs) -> pl.DataFrame:
    frame = one.sql(
        "select step, category, entropy::double as entropy, exp(logprob::double) as probability,"
        " shaped_advantage::double as advantage, logprob::double as logprob,"
        " entropy_after::double - entropy as dentropy, logprob_after::double - logprob as dlogprob"
        " from tokens where is_kept and logprob_after is not null"
    )
    others = [
        frame.filter((pl.col("category") == category) & (pl.col("step") != step))["dentropy"].mean()
        for step, category in frame.select("step", "category").rows()
    ]
    return frame.with_columns(
        category=pl.Series(others),
        discriminator=-pl.col("advantage") * pl.col("probability") * (pl.col("entropy") + pl.col("logprob")),
    )


@pytest.mark.parametrize("scale", slow_after(1, ["rank", "value"]))
@pytest.mark.parametrize("target", slow_after(1, ["entropy", "logprob"]))
def test_correlations_within_steps_are_those_of_a_loop(one: Runs, tokens: pl.DataFrame, target: str, scale: str):
    parts = [one.query("entropy_laws", target=target, scale=scale, stage=stage) for stage in ("rising", "plateau")]
    boundary = one.stage_fits["none-seed0"].boundary
    for part, chosen in zip(parts, (pl.col("step") <= boundary, pl.col("step") > boundary), strict=True):
        found = dict(part.filter(comparison="overall").select("predictor", "correlation").rows())
        for predictor in ("entropy", "probability", "discriminator", "category"):
            expected = naive(tokens.filter(chosen), predictor, f"d{target}", by_rank=scale == "rank")
            assert found[predictor] == pytest.approx(expected, abs=1e-6), predictor


def test_effects_of_given_sums():
    # x = (1, -1), y = (2, -2), z = (1, 1): r of x and y is 1, of z and y it is 0.
    assert correlation(np.array([4.0, 2.0, 8.0])) == 1
    assert gain(np.array([4.0, 2.0, 8.0, 0.0, 2.0])) == 1
    # The wrong sign counts as less than nothing, and a better entropy as a shortfall.
    assert gain(np.array([-4.0, 2.0, 8.0, 0.0, 2.0])) == -1
    assert gain(np.array([0.0, 2.0, 8.0, -4.0, 2.0])) == -1


def rewritten(source: Path, folder: Path, column: str, values) -> Path:
    """Copy a run, and replace a column of its tokens by ``values(table)``."""
    shutil.copytree(source, folder)
    for part in (folder / "tokens").glob("*.parquet"):
        table = pq.read_table(part)
        at = table.schema.get_field_index(column)
        pq.write_table(table.set_column(at, table.schema.field(at), values(table)), part)
    accept_edits(folder)
    return folder


def no_values(table: pa.Table) -> pa.Array:
    return pa.nulls(len(table), pa.float32())


def verdicts(folder: Path) -> dict[tuple[str, str], tuple[str, str]]:
    return {(v.claim, v.part): (v.verdict, v.why) for v in judge(open_runs(folder)) if v.claim in LAWS}


def test_a_trace_without_after_update_entropies_names_the_setting(study_path: Path, tmp_path: Path):
    folder = rewritten(study_path / "none-seed0", tmp_path / "run", "entropy_after", no_values)
    for word, why in verdicts(folder).values():
        assert word == NOT_RECORDED
        assert "train with record.after_update_every" in why


def test_too_few_captured_steps_name_the_setting(study_path: Path, tmp_path: Path):
    def early(table: pa.Table) -> pa.Array:
        after, step = table["entropy_after"].to_numpy(), table["step"].to_numpy()
        return pa.array(after, pa.float32(), mask=np.isnan(after) | (step > 10))

    folder = rewritten(study_path / "none-seed0", tmp_path / "run", "entropy_after", early)
    for word, why in verdicts(folder).values():
        assert word == INCONCLUSIVE
        assert "has after-update values at 2 steps; a verdict needs 3: lower record.after_update_every" in why


def test_a_trace_without_gradient_norms_lacks_one_claim(study_path: Path, tmp_path: Path):
    found = verdicts(rewritten(study_path / "none-seed0", tmp_path / "run", "grad_norm", no_values))
    assert found.pop(("E4", "own gradient")) == (NOT_RECORDED, "no gradient norms of tokens were recorded")
    assert NOT_RECORDED not in {word for word, _ in found.values()}


def test_noise_supports_no_law(tmp_path: Path):
    found = verdicts(write_run(tmp_path / "run", steps=60, groups=8))
    assert len(found) == 9
    assert SUPPORTED not in {word for word, _ in found.values()}
    # The entropy after the update is drawn anew, so it returns to its mean: the entropy before predicts the change.
    assert {word for key, (word, _) in found.items() if key[0] != "E3"} == {INCONCLUSIVE}


@pytest.fixture(scope="module")
def followed() -> UpdateRun:
    """Simulate a run whose updates follow the gradient.

    Every second step is evaluated.
    """
    return simulate_updates(UpdateWorld(steps=60, eval_every=2, rate=0.5), np.random.default_rng(0))


@pytest.fixture(scope="module")
def followed_path(followed: UpdateRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_updates(tmp_path_factory.mktemp("followed") / "run", followed)


def test_forecasts_are_sums_over_updates_of_means_over_tokens(followed: UpdateRun, followed_path: Path):
    assert (followed.advantage == 0).any(), "some groups are uniform, and take no part in the update"
    frame = open_runs(followed_path).query("entropy_forecasts")
    expected = forecasts_of(followed)
    size = expected.pop("size")
    entropy = followed.heldout.mean(1)[::2]
    assert set(frame["predictor"]) == set(expected)
    for predictor, values in expected.items():
        part = frame.filter(predictor=predictor)
        assert part["to_step"].to_list() == list(range(2, 61, 2))
        found = part.select("predicted", "measured", "entropy_before", "update_size").to_numpy()
        wanted = np.column_stack((values, np.diff(entropy), entropy[:-1], size))
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


def test_steps_without_tokens_are_filled_in_by_the_others(followed_path: Path, tmp_path: Path):
    whole = open_runs(followed_path)
    text = (
        "select step, 2 * 0.5 * avg(discriminator_law(logprob::double, entropy::double, advantage::double)) as x"
        " from tokens where is_kept group by step order by step"
    )
    twice = dict(whole.sql(text).rows())
    shutil.copytree(followed_path, tmp_path / "run")
    prune(tmp_path / "run", TokenSampling(steps=4))
    pruned = open_runs(tmp_path / "run")
    stored = pruned.sql("select distinct step from tokens order by step")["step"].to_list()
    frame = pruned.query("entropy_forecasts").filter(predictor="discriminator")
    # Twice the forecast of the only step with tokens; two evaluations without any between them are left out.
    assert frame["to_step"].to_list() == [step + step % 2 for step in stored]
    assert set(frame.select("num_updates", "num_recorded").rows()) == {(2, 1)}
    np.testing.assert_allclose(frame["predicted"], [twice[step] for step in stored], rtol=1e-6)


def test_an_evaluation_of_some_benchmarks_is_left_out(followed_path: Path, tmp_path: Path):
    shutil.copytree(followed_path, tmp_path / "run")
    for part in (tmp_path / "run" / "evals").glob("*.parquet"):
        table = pq.read_table(part)
        is_other = (table["step"].to_numpy() % 4 == 0) & (table["sample_index"].to_numpy() == 0)
        at = table.schema.get_field_index("benchmark")
        names = pa.array(np.where(is_other, "other", "held"))
        pq.write_table(table.set_column(at, table.schema.field(at), names.cast(table.schema.field(at).type)), part)
    accept_edits(tmp_path / "run")
    frame = open_runs(tmp_path / "run").query("entropy_forecasts").filter(predictor="omega")
    assert frame["to_step"].to_list() == list(range(4, 61, 4))


def test_partial_correlation_is_that_of_residuals():
    rng = np.random.default_rng(3)
    steps, control = np.arange(40), rng.normal(size=(40, 1))
    x = rng.normal(size=40) + control[:, 0]
    y = 0.7 * x + rng.normal(size=40)
    others = np.column_stack((smooth_trend(steps), control))
    assert others.shape == (40, 2 + 4 + 1)
    x_rest, y_rest = (values - others @ np.linalg.lstsq(others, values, rcond=None)[0] for values in (x, y))
    z = partial_correlation(x, y, control, steps)
    assert z is not None
    found = to_correlation(z)
    assert found.value == pytest.approx(np.corrcoef(x_rest, y_rest)[0, 1])
    assert -1 < found.low < found.value < found.high < 1
    # A control that is known already, or constant, changes nothing.
    again = partial_correlation(x, y, np.column_stack((control, 2 * control, np.ones(40))), steps)
    assert again is not None
    assert again.value == pytest.approx(z.value)


def test_two_trends_do_not_correlate_beyond_a_trend():
    rng, steps = np.random.default_rng(4), np.arange(100)
    courses = [-np.exp(-steps / 30), -1 / (1 + steps / 20)]
    found = []
    for _ in range(50):
        x, y = (course + 0.02 * rng.normal(size=100) for course in courses)
        assert np.corrcoef(x, y)[0, 1] > 0.8
        z = partial_correlation(x, y, np.empty((100, 0)), steps)
        assert z is not None
        found.append(z)
    assert np.mean([z.p_value <= 0.05 for z in found]) <= 0.12
    assert abs(np.mean([z.value for z in found])) < 0.05


def test_errors_that_shrink_along_with_the_forecast_widen_the_interval():
    rng, steps = np.random.default_rng(5), np.arange(100)
    scale = np.exp(-4 * steps / 100)
    p_values = []
    for _ in range(200):
        z = partial_correlation(scale * rng.normal(size=100), scale * rng.normal(size=100), np.empty((100, 0)), steps)
        assert z is not None
        p_values.append(z.p_value)
    assert np.mean(np.array(p_values) <= 0.05) <= 0.08


def test_series_that_others_explain_have_no_correlation():
    steps, control = np.arange(40), np.random.default_rng(6).normal(size=(40, 1))
    x = np.random.default_rng(7).normal(size=40)
    assert partial_correlation(x, np.zeros(40), control, steps) is None
    assert partial_correlation(3 + 2 * control[:, 0], x, control, steps) is None
    assert partial_correlation(x[:8], x[::-1][:8], np.random.default_rng(8).normal(size=(8, 5)), steps[:8]) is None


def between(folder: Path) -> dict[str, tuple[str, str]]:
    return {v.part: (v.verdict, v.why) for v in judge(open_runs(folder)) if v.claim == "E5"}


def test_verdicts_between_evaluations_leave_the_other_families_alone(followed_path: Path):
    found = judge(open_runs(followed_path))
    assert {v.part: v.verdict for v in found if v.claim == "E5"}["discriminator"] == SUPPORTED
    assert {v.p_adjusted for v in found if v.claim == "E5" and v.effect is not None} <= {
        min(k * v.p_value, 1.0) for v in found if v.claim == "E5" and v.p_value is not None for k in (1, 2, 3, 4)
    }


def test_few_evaluations_state_how_many_are_enough(study_path: Path):
    for word, why in between(study_path / "none-seed0").values():
        assert word == INCONCLUSIVE
        assert why == (
            f"run none-seed0 has 1 change of entropy between evaluations; a verdict needs {MIN_CHANGES}, at this "
            "distance 1200 steps: lower eval.every, or train longer"
        )


def test_a_trace_without_entropies_of_evaluations_says_so(followed_path: Path, tmp_path: Path):
    shutil.copytree(followed_path, tmp_path / "run")
    for part in (tmp_path / "run" / "evals").glob("*.parquet"):
        table = pq.read_table(part)
        at = table.schema.get_field_index("entropy_mean")
        pq.write_table(table.set_column(at, table.schema.field(at), no_values(table)), part)
    accept_edits(tmp_path / "run")
    assert set(between(tmp_path / "run").values()) == {(NOT_RECORDED, "no entropies of evaluations were recorded")}


def test_a_policy_that_never_changes_earns_no_verdict(tmp_path: Path):
    world = UpdateWorld(steps=30, update="none", eval_noise=0.0)
    found = between(write_updates(tmp_path / "run", simulate_updates(world, np.random.default_rng(0))))
    assert set(found.values()) == {
        (INCONCLUSIVE, "run run: entropy, or the change that the formula predicts, only follows a smooth trend")
    }
