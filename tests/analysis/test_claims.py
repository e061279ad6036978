"""Planted effects are found, absent ones are not, and no verdict outruns its evidence."""

from __future__ import annotations

import math

import pytest

from analysis.claims import CONTRADICTED, INCONCLUSIVE, NOT_RECORDED, SUPPORTED, decide, judge, load_ledger, overall
from analysis.runs import Runs, open_runs
from analysis.stats import Estimate
from tests.analysis.conftest import write_failed
from tests.analysis.synthetic import NOTHING, Planted, write_run


@pytest.mark.parametrize(
    ("value", "low", "high", "expected"),
    [
        (0.3, 0.2, 0.4, SUPPORTED),
        (0.1, 0.01, 0.2, SUPPORTED),
        (0.3, -0.1, 0.7, INCONCLUSIVE),
        (0.05, 0.01, 0.12, INCONCLUSIVE),
        (0.05, 0.01, 0.09, CONTRADICTED),
        (-0.3, -0.4, -0.2, CONTRADICTED),
        (0.0, -0.05, 0.05, CONTRADICTED),
        (math.nan, math.nan, math.nan, INCONCLUSIVE),
        (0.3, 0.2, math.inf, INCONCLUSIVE),
    ],
)
def test_verdict_needs_interval_and_size(value: float, low: float, high: float, expected: str):
    assert decide(Estimate(value, low, high, 10, "prompts"), "positive", 0.1)[0] == expected
    assert decide(Estimate(-value, -high, -low, 10, "prompts"), "negative", 0.1)[0] == expected


def test_planted_effects_are_found(study: Runs):
    assert overall(judge(study)) == {
        "S1": SUPPORTED,
        "S2": SUPPORTED,
        "S4": SUPPORTED,
        "I1": SUPPORTED,
        "T1": SUPPORTED,
        "M1": SUPPORTED,
        "M2": NOT_RECORDED,
        "M3": INCONCLUSIVE,
    }


def test_parts_of_a_claim_about_methods(study: Runs):
    verdicts = {(v.subject, v.part): v for v in judge(study) if v.claim == "M3"}
    assert verdicts["ppl vs none", "length"].verdict == SUPPORTED
    assert verdicts["ppl vs none", "length"].effect == pytest.approx(0.2)
    assert verdicts["ppl vs none", "formal tokens"].effect == pytest.approx(0.2, abs=0.02)
    assert verdicts["position vs none", "length"].verdict == NOT_RECORDED


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("plain")
    for seed in range(3):
        write_run(root / f"none-{seed}", seed=seed, planted=NOTHING)
        write_run(root / f"ppl-{seed}", arm="ppl", seed=seed, planted=NOTHING)
    return open_runs(root)


def test_absent_effects_are_not_found(plain: Runs):
    words = overall(judge(plain))
    assert SUPPORTED not in words.values()
    assert words["S1"] == INCONCLUSIVE
    assert words["S2"] == CONTRADICTED
    assert words["S4"] == CONTRADICTED


def test_absent_effects_in_a_run_with_a_plateau(tmp_path):
    flat = Planted(two_stages=True, negative_falls=False, defects_fall=False, ppl_orders=False, ends_high=False)
    write_run(tmp_path / "run", planted=flat, groups=32)
    words = overall(judge(open_runs(tmp_path)))
    assert {claim: words[claim] for claim in ("S1", "S4", "I1", "T1")} == {
        "S1": SUPPORTED,
        "S4": CONTRADICTED,
        "I1": CONTRADICTED,
        "T1": CONTRADICTED,
    }


def test_one_seed_is_no_verdict_about_a_method(tmp_path):
    write_run(tmp_path / "none")
    write_run(tmp_path / "ppl", arm="ppl", planted=Planted(eval_accuracy=0.99))
    verdict = next(v for v in judge(open_runs(tmp_path)) if v.claim == "M1")
    assert verdict.verdict == INCONCLUSIVE
    assert verdict.low is not None
    assert verdict.low > 0.1
    assert "1 seed" in verdict.of
    assert "one seed only" in verdict.why


def test_seeds_that_disagree_widen_the_interval(tmp_path):
    for seed, accuracy in enumerate((0.5, 0.7, 0.9)):
        write_run(tmp_path / f"none-{seed}", seed=seed, steps=20, groups=2)
        planted = Planted(eval_accuracy=accuracy)
        write_run(tmp_path / f"ppl-{seed}", arm="ppl", seed=seed, planted=planted, steps=20, groups=2)
    verdict = next(v for v in judge(open_runs(tmp_path)) if v.claim == "M1")
    assert verdict.verdict == INCONCLUSIVE
    assert verdict.low is not None
    assert verdict.high is not None
    assert verdict.high - verdict.low > 0.8


def test_nothing_recorded(tmp_path):
    verdicts = judge(open_runs(write_failed(tmp_path / "broken")))
    assert {verdict.verdict for verdict in verdicts} == {NOT_RECORDED}
    assert {verdict.claim for verdict in verdicts} == set(load_ledger())


def test_failed_arm_gives_no_comparison(tmp_path):
    write_run(tmp_path / "none")
    folder = write_run(tmp_path / "ppl", arm="ppl")
    manifest = folder / "run.json"
    manifest.write_text(manifest.read_text().replace('"complete"', '"failed"'))
    verdict = next(v for v in judge(open_runs(tmp_path)) if v.claim == "M1")
    assert verdict.verdict == NOT_RECORDED


def test_same_seed_same_scorecard(study: Runs):
    # Sums of floats in several threads differ in the last bits; what is written does not.
    first, second = ([verdict.to_dict() for verdict in judge(study)] for _ in range(2))
    assert first == second


def test_a_trace_too_short_for_stages(tmp_path):
    write_run(tmp_path / "short", steps=6)
    words = overall(judge(open_runs(tmp_path)))
    assert {words[claim] for claim in ("S2", "S4", "I1", "T1")} == {NOT_RECORDED}
    assert words["S1"] == INCONCLUSIVE
