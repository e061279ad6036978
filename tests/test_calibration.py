"""Test that calibration measures rates correctly.

A small subset of it must find planted effects and nothing else.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from entrace.analysis.claims import load_ledger
from tests.calibration import simulate
from tests.calibration.calibrate import Store, main, simulate_once
from tests.calibration.parameters import MethodWorld, World, curve
from tests.calibration.real_cases import REAL_CASES, false_parts, judge_real
from tests.calibration.simulate import simulate_run, step_means
from tests.calibration.summary import FALSE, Outcome, rate_interval, render, summarize
from tests.calibration.truth import truth_of
from tests.calibration.worlds import CONTRADICTED, METHOD_CLAIMS, NULL, RESPONSES, SUPPORTED, TOKENS, WORLDS
from tests.slow import slow, slow_except

COMMITTED = Path(__file__).parents[1] / "reports" / "calibration.json"
# One per kind of finding; `make calibrate` runs them all, many times.
SUBSET = (
    "frozen-unequal",
    "drift-0.9",
    "exponential-3",
    "slow-then-fast",
    "accuracy-90",
    "rounding-bf16",
    "random-update",
    "lawful",
    "wrong-longer",
    "end",
    "planted",
    "reversed",
    "evaluations-random",
    "evaluations-few",
    "evaluations-lawful",
    "equal-arms",
    "better-arms",
)


# Of these, one without an effect and one with each kind of planted effect run by default.
QUICK = ("frozen-unequal", "lawful", "planted", "better-arms")


@cache
def outcome_of(name: str) -> Outcome:
    return simulate_once(name, 1)


@pytest.mark.parametrize("name", slow_except(QUICK, SUBSET))
def test_no_verdict_is_false(name: str):
    entry = WORLDS[name]
    false = {
        (part, subject): verdict
        for part, subject, verdict, *_ in outcome_of(name)
        if verdict in FALSE.get(entry.expectation(part) or "", ())
    }
    assert false == {}


@pytest.mark.parametrize("name", ["planted", slow("reversed"), "lawful", slow("evaluations-lawful"), "better-arms"])
def test_planted_effects_are_found(name: str):
    expected = {row[0]: WORLDS[name].expectation(row[0]) for row in outcome_of(name)}
    missed = {
        part: (verdict, effect)
        for part, _, verdict, effect, *_ in outcome_of(name)
        if expected[part] in (SUPPORTED, CONTRADICTED) and verdict != expected[part]
    }
    assert missed == {}


def test_expectations_name_parts_of_the_ledger():
    ledger = {f"{claim}/{part}" for claim, entry in load_ledger().items() for part in entry["parts"]}
    claims = {part.partition("/")[0] for part in ledger}
    assert {key for entry in WORLDS.values() for key in entry.expected} <= ledger | claims


def test_truths_name_parts_of_the_ledger():
    ledger = {f"{claim}/{part}" for claim, entry in load_ledger().items() for part in entry["parts"]}
    rng = np.random.default_rng(0)
    of_worlds = (truth_of(WORLDS[name].world, rng, 1) for name in ("planted", "better-arms", "evaluations-lawful"))
    names = set().union(*of_worlds)
    assert names == ledger - {"S1/two stages"}


def test_the_sampled_token_follows_from_its_entropy():
    tokens = simulate_run(replace(TOKENS, groups=8), np.random.default_rng(0)).tokens
    assert tokens is not None
    # The mean surprisal of samples of a distribution is its entropy.
    assert -tokens.logprob.mean() == pytest.approx(tokens.entropy.mean(), rel=0.02)
    assert np.median(np.exp(tokens.logprob)) > 0.95
    is_high = tokens.entropy > np.quantile(tokens.entropy, 0.9)
    assert np.median(np.exp(tokens.logprob[is_high])) < 0.85


@pytest.mark.parametrize("has_tokens", [False, True])
def test_means_follow_the_course(has_tokens: bool):
    world = replace(RESPONSES, groups=100, drift=0.0, has_tokens=has_tokens, course="linear")
    entropy, accuracy = step_means(simulate_run(world, np.random.default_rng(0)))
    assert entropy == pytest.approx(curve(world.negative_entropy, world), rel=0.1)
    assert accuracy == pytest.approx(curve(world.accuracy, world), abs=0.1)
    assert (entropy / curve(world.negative_entropy, world)).mean() == pytest.approx(1, abs=0.01)
    assert (accuracy - curve(world.accuracy, world)).mean() == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.95])
def test_states_keep_their_variance(rho: float):
    state = simulate._autoregression(World(steps=200_000, rho=rho), np.random.default_rng(0))
    assert state.std() == pytest.approx(1, abs=0.03)
    assert np.corrcoef(state[1:], state[:-1])[0, 1] == pytest.approx(rho, abs=0.01)


def test_hard_prompts_have_higher_entropy():
    run = simulate_run(WORLDS["frozen-unequal"].world, np.random.default_rng(0))  # pyright: ignore[reportArgumentType]
    entropy, accuracy = (run.by_group(values).mean(2).ravel() for values in (run.entropy, run.is_correct))
    assert np.corrcoef(entropy, accuracy)[0, 1] < -0.3
    # So that the steps of a frozen policy move together.
    assert np.corrcoef(*step_means(run))[0, 1] < -0.3


@pytest.mark.parametrize(("update", "largest"), [("none", 0.0), ("float32", 3e-5), ("bf16", 0.1), ("random", 0.7)])
def test_updates_move_tokens_by_their_kind(update: str, largest: float):
    tokens = simulate_run(replace(TOKENS, groups=8, update=update), np.random.default_rng(0)).tokens
    assert tokens is not None
    captured = np.isfinite(tokens.logprob_after)
    dp = np.abs(np.exp(tokens.logprob_after[captured]) - np.exp(tokens.logprob[captured]))
    assert largest / 20 <= dp.max() <= largest
    # Every fifth step, and only responses in the update.
    assert 0.1 < captured.mean() <= 0.2


def test_truth_of_courses_in_closed_form():
    def halves(course: str, **values) -> tuple[float, float]:
        truth = truth_of(replace(RESPONSES, course=course, **values), np.random.default_rng(0), 1)
        return truth["S1/entropy slows"], truth["S1/accuracy slows"]

    assert halves("linear") == pytest.approx((0, 0), abs=1e-9)
    # (1 - exp(-k / 2)) / (1 + exp(-k / 2)), whatever the size of the change.
    assert halves("exponential, 3 time constants") == pytest.approx((np.tanh(0.75),) * 2, rel=1e-3)
    assert halves("logarithm") == pytest.approx((2 * np.log(11) / np.log(21) - 1,) * 2, rel=1e-3)
    assert halves("slow then fast") == pytest.approx((-0.85, -0.85))
    # At the end of the scale no interval is put to the test.
    rising = truth_of(WORLDS["rising-entropy"].world, np.random.default_rng(0), 1)
    assert "S1/entropy slows" not in rising
    assert rising["E1/association"] < 0


@pytest.mark.slow
def test_truth_of_levels_in_closed_form():
    world = replace(TOKENS, ends=(1.5, 0.8), drift=0.0, end_gradient=1.3, end_movement=1.0)
    truth = truth_of(world, np.random.default_rng(0), 12)
    assert truth["T1/beginning"] == pytest.approx(0.5, abs=0.05)
    assert truth["T1/end"] == pytest.approx(-0.2, abs=0.05)
    assert truth["T3/gradient"] == pytest.approx(0.3, abs=0.07)
    assert truth["T3/movement"] == pytest.approx(0, abs=0.1)
    assert truth["S2/mainly negative"] == 0
    assert truth["I1/accuracy"] == pytest.approx(0, abs=0.02)
    assert truth_of(MethodWorld(accuracy=0.1, length=0.2), np.random.default_rng(0))["M3/length"] == 0.2


def test_rate_interval():
    # 1 - 0.025^(1/200) of 200 without a hit.
    assert rate_interval(0, 200) == (0.0, pytest.approx(1 - 0.025 ** (1 / 200)))
    assert rate_interval(3, 3) == (pytest.approx(0.025 ** (1 / 3)), 1.0)


def rows(verdict: str, low: float, high: float) -> Outcome:
    return [
        ("S4/any defect", "none", verdict, (low + high) / 2, low, high),
        ("M1/avg@k", "-", "not recorded", None, None, None),
    ]


def test_summary_counts_false_verdicts_and_coverage():
    outcomes = [rows("inconclusive", -0.1, 0.1)] * 85 + [rows("supported", 0.1, 0.2)] * 15
    summary = summarize({"frozen": (outcomes, {"S4/any defect": 0.0})})
    world = summary["worlds"][0]
    [cell] = world["cells"]
    assert cell["expectation"] == NULL
    assert (cell["supported"], cell["false"], cell["coverage"]["rate"]) == (0.15, 0.15, 0.85)
    assert cell["half_width"] == pytest.approx(0.1)
    assert (world["false_scorecards"], world["coverage"], world["rows_judged"]) == (0.15, 0.85, 1)
    assert len(summary["misses"]) == 4
    assert "frozen, S4/any defect: false verdicts 15.0%, up to 23.5%" in summary["misses"]
    assert all(miss in render(summary) for miss in summary["misses"])


def test_summary_counts_detected_effects():
    outcomes = [rows("supported", 0.1, 0.3)] * 19 + [rows("contradicted", -0.3, -0.1)]
    [world] = summarize({"planted": (outcomes, {})})["worlds"]
    assert world["cells"][0]["detected"] == 0.95
    assert world["cells"][0]["false"] == 0.05
    assert world["coverage"] is None
    missed = summarize({"planted": ([rows("inconclusive", -0.1, 0.3)], {})})
    assert missed["misses"] == ["planted, S4/any defect: supported in only 0.0%"]


def test_the_command_resumes_and_names_unknown_worlds(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = ["--jobs", "1", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "page")]
    assert main([*command, "--worlds", "steps-only", "--simulations", "2"]) == 0
    file = tmp_path / "cache" / "steps-only.jsonl"
    first = file.read_text()
    # Killed while it wrote the third outcome.
    file.write_text(first + '\n{"key": "')
    assert main([*command, "--worlds", "steps-only", "--simulations", "3"]) == 0
    assert file.read_text().startswith(first)
    assert sorted(Store(tmp_path / "cache").outcomes("steps-only")) == [0, 1, 2]
    page = json.loads((tmp_path / "page.json").read_text())
    assert [(world["world"], world["simulations"]) for world in page["worlds"]] == [("steps-only", 3)]
    capsys.readouterr()
    assert main([*command, "--worlds", "frozn"]) == 2
    assert capsys.readouterr().err == 'calibrate: --worlds: unknown world "frozn"; did you mean "frozen"?\n'


def test_outcomes_of_other_code_are_not_reused(tmp_path: Path):
    store = Store(tmp_path)
    store.save_outcome("frozen", 0, rows("inconclusive", -0.1, 0.1))
    file = tmp_path / "frozen.jsonl"
    file.write_text(file.read_text().replace('"key": "', '"key": "0'))
    assert store.outcomes("frozen") == {}
    assert list(Store(tmp_path, keep=True).outcomes("frozen")) == [0]


# Smaller runs than those of `make calibrate`, long enough for a plateau.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("real-frozen", ["steps=24", "eval.every=24"]),
        (
            "real-random-update",
            ["steps=40", "eval.every=40", "record.after_update_every=2", "rollout.prompts_per_step=6"],
        ),
    ],
)
def test_a_real_run_without_the_claimed_effects_earns_no_verdict(name: str, overrides: list[str], tmp_path: Path):
    # More threads than free cores wait for each other.
    torch.set_num_threads(1)
    small = ["rollout.prompts_per_step=8", "task.num_heldout=4", "eval.samples=2"]
    found = judge_real(name, tmp_path / "run", [*small, *overrides])
    assert false_parts(found) == []
    # The question was asked: most parts have an effect and an interval, which do not go beyond the null.
    assert sum(effect is not None for _, _, effect, _, _ in found) >= 5


def test_a_world_that_is_not_simulated_keeps_its_entry():
    outcomes = [rows("inconclusive", -0.1, 0.1)]
    former = summarize({"frozen": (outcomes, {}), "planted": (outcomes, {})})
    again = summarize({"frozen": (outcomes * 2, {})}, former=former)
    assert [(world["world"], world["simulations"]) for world in again["worlds"]] == [("frozen", 2), ("planted", 1)]


def test_committed_page_is_complete_and_lists_what_it_misses():
    page = json.loads(COMMITTED.read_text())
    assert [world["world"] for world in page["worlds"]] == list(WORLDS)
    assert all(world["simulations"] >= 200 for world in page["worlds"])
    assert [case["case"] for case in page["real"]] == list(REAL_CASES)
    assert all(case["false"] == [] for case in page["real"])
    text = COMMITTED.with_suffix(".md").read_text()
    assert all(f"- {miss}" in text for miss in page["misses"])
    ledger = {f"{claim}/{part}" for claim, entry in load_ledger().items() for part in entry["parts"]}
    assert {cell["part"] for world in page["worlds"] for cell in world["cells"]} >= ledger
    methods = {part for part in ledger if part.partition("/")[0] in METHOD_CLAIMS}
    found = {cell["part"] for world in page["worlds"] if world["world"] == "better-arms" for cell in world["cells"]}
    assert methods <= found
