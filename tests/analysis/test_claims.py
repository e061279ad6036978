"""Planted effects are found, absent ones are not, and no verdict outruns its evidence."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.claims import CONTRADICTED, INCONCLUSIVE, NOT_RECORDED, SUPPORTED, decide, judge, load_ledger, overall
from analysis.runs import Runs, open_runs
from analysis.stats import Estimate, holm
from tests.analysis.conftest import write_failed
from tests.analysis.synthetic import NOTHING, Planted, write_run


@pytest.mark.parametrize(
    ("value", "low", "high", "p_adjusted", "expected", "why"),
    [
        (0.3, 0.2, 0.4, 0.01, SUPPORTED, "the expected way, beyond chance, and at least 0.1"),
        (0.1, 0.01, 0.2, 0.05, SUPPORTED, "beyond chance"),
        (-0.3, -0.4, -0.2, 0.01, CONTRADICTED, "the other way round, beyond chance"),
        (0.3, 0.2, 0.4, 0.06, INCONCLUSIVE, "among all claims judged together (p = 0.06)"),
        (0.3, -0.1, 0.7, 0.2, INCONCLUSIVE, "holds zero as well as effects that matter"),
        (0.05, 0.01, 0.12, 0.01, INCONCLUSIVE, "smaller than 0.1"),
        (-0.05, -0.09, -0.01, 0.01, INCONCLUSIVE, "the other way round, but smaller"),
        (0.0, -0.05, 0.05, 1.0, INCONCLUSIVE, "no effect that matters: the whole interval lies within ±0.1"),
        (math.nan, math.nan, math.nan, 1.0, INCONCLUSIVE, "not finite"),
        (0.3, 0.2, math.inf, 0.01, INCONCLUSIVE, "not finite"),
    ],
)
def test_verdict_needs_interval_size_and_all_claims_together(
    value: float, low: float, high: float, p_adjusted: float, expected: str, why: str
):
    word, reason = decide(Estimate(value, low, high, p_adjusted, 10, "prompts"), p_adjusted, "positive", 0.1)
    assert word == expected
    assert why in reason
    mirrored = Estimate(-value, -high, -low, p_adjusted, 10, "prompts")
    assert decide(mirrored, p_adjusted, "negative", 0.1)[0] == expected


def test_more_claims_need_stronger_evidence(study: Runs):
    found = [v for v in judge(study) if v.p_value is not None]
    assert len(found) > 20
    for verdict in found:
        assert verdict.p_adjusted is not None
        assert verdict.p_value is not None
        assert verdict.p_adjusted >= verdict.p_value
    np.testing.assert_allclose([v.p_adjusted for v in found], holm([v.p_value for v in found if v.p_value is not None]))


def test_planted_effects_are_found(study: Runs):
    words = overall(judge(study))
    assert {claim: words[claim] for claim in ("S1", "E1", "S2", "S4", "T1", "M1")} == dict.fromkeys(
        ("S1", "E1", "S2", "S4", "T1", "M1"), SUPPORTED
    )
    assert (words["M2"], words["I3"]) == (NOT_RECORDED, NOT_RECORDED)
    parts = {(v.claim, v.part): v.verdict for v in judge(study)}
    assert parts["I1", "accuracy"] == SUPPORTED
    assert parts["I1", "reasoning tokens"] == INCONCLUSIVE


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
    found = {(v.claim, v.part): v for v in judge(plain)}
    # Entropy falls and accuracy rises evenly there, so that one does follow the other.
    assert {v.claim for v in found.values() if v.verdict in (SUPPORTED, CONTRADICTED)} == {"E1"}
    assert "two segments fit no better than one line" in found["S1", "entropy"].why
    assert "has no plateau" in found["I1", "accuracy"].why
    assert "the interval holds zero" in found["S4", "any defect"].why


def test_absent_effects_in_a_run_with_a_plateau(tmp_path):
    flat = Planted(two_stages=True, negative_falls=False, defects_fall=False, ppl_orders=False, ends_high=False)
    write_run(tmp_path / "run", planted=flat, groups=32)
    found = {(v.claim, v.part): v for v in judge(open_runs(tmp_path))}
    assert found["S1", "entropy"].verdict == SUPPORTED
    for part in (("S4", "any defect"), ("I1", "accuracy"), ("T1", "beginning"), ("T1", "end")):
        assert found[part].verdict == INCONCLUSIVE
        assert "no effect that matters" in found[part].why


def test_what_was_not_recorded_is_named_with_the_way_to_record_it(tmp_path):
    path = write_run(tmp_path / "run")
    shutil.rmtree(path / "interventions")
    for part in (path / "tokens").glob("*.parquet"):
        table = pq.read_table(part)
        nothing = pa.nulls(len(table), pa.float32())
        column = table.schema.get_field_index("logprob_after")
        pq.write_table(table.set_column(column, table.schema.field(column), nothing), part)
    found = {(v.claim, v.part): v for v in judge(open_runs(path))}
    for claim, part in (("S5", "concentration"), ("S6", "direction"), ("T3", "movement")):
        assert found[claim, part].verdict == NOT_RECORDED
        assert "train with record.after_update_every=5" in found[claim, part].why
    for claim in ("I2", "T2"):
        assert found[claim, "impact"].verdict == NOT_RECORDED
        assert "run `entrace intervene RUN`" in found[claim, "impact"].why


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
