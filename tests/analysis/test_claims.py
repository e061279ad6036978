"""Test that planted effects are found, and absent ones are not.

Verdicts must match their evidence.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from entrace.analysis.claims import (
    CONTRADICTED,
    INCONCLUSIVE,
    NOT_RECORDED,
    SUPPORTED,
    Verdict,
    judge,
    load_ledger,
    overall,
)
from entrace.analysis.effects.estimate import NoEffectError
from entrace.analysis.effects.training import PARTS, questions_read
from entrace.analysis.runs import Runs, open_runs
from entrace.analysis.statistics.estimates import Estimate, holm
from entrace.analysis.trace import read_manifest, write_manifest
from entrace.analysis.trace.errors import InputError
from entrace.analysis.trace.verify import accept_edits
from tests.analysis.conftest import write_failed
from tests.analysis.synthetic import NOTHING, Planted, write_run

# The family of the trial of entropy laws.
LAWS = "entropy laws"


def test_more_claims_need_stronger_evidence(study: Runs):
    ledger = load_ledger()
    found = [v for v in judge(study) if "arms" not in ledger[v.claim] and v.p_adjusted is not None]
    families = {family: [v for v in found if ledger[v.claim].get("family") == family] for family in (None, LAWS)}
    assert [len(family) > 5 for family in families.values()] == [True, True]
    for family in families.values():
        p_values = [v.p_value for v in family if v.p_value is not None]
        np.testing.assert_allclose([v.p_adjusted for v in family if v.p_adjusted is not None], holm(p_values))


def test_verdicts_name_the_sql_that_their_statistics_read(study: Runs, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    query_once = Runs.query_once
    monkeypatch.setattr(Runs, "query_once", lambda runs, stem, ids: asked.append(stem) or query_once(runs, stem, ids))
    for claim, parts in PARTS.items():
        for part, estimator in parts.items():
            asked.clear()
            with suppress(NoEffectError):
                estimator(study, study.subjects()["none"])
            # No SQL file computes the fit of the stages.
            assert {*asked} == {*questions_read(claim, part, {})} - {"stage_dynamics"}, (claim, part)
    named = {(verdict.claim, verdict.part): verdict.sql for verdict in judge(study)}
    assert named["S5", "concentration"] == (
        "analysis/sql/claims/movement_sums.sql, analysis/sql/claims/movement_potential.sql"
    )
    assert named["M1", "avg@k"] == "analysis/sql/claims/eval_outcomes.sql"
    assert named["M3", "formal tokens"] == "analysis/sql/claims/formal_sums.sql"


def test_planted_effects_are_found(tmp_path):
    found = {(v.claim, v.part): v for v in judge(open_runs(write_run(tmp_path / "run", steps=80, groups=16)))}
    planted = [("S1", "entropy slows"), ("S1", "accuracy slows"), ("E1", "association"), ("S2", "mainly negative")]
    planted += [("S2", "same prompt"), ("S4", "any defect"), ("I1", "accuracy"), ("T1", "beginning"), ("T1", "end")]
    assert {key: found[key].verdict for key in planted} == dict.fromkeys(planted, SUPPORTED)
    assert found["I1", "reasoning tokens"].verdict == INCONCLUSIVE
    assert all(verdict.null for verdict in found.values())


def test_parts_of_a_claim_about_methods(study: Runs):
    verdicts = {(v.subject, v.part): v for v in judge(study) if v.claim == "M3"}
    # All responses are longer by exactly a fifth, so the spread between seeds is unknown.
    assert verdicts["ppl vs none", "length"].verdict == INCONCLUSIVE
    assert verdicts["ppl vs none", "length"].effect == pytest.approx(0.2)
    assert verdicts["ppl vs none", "formal tokens"].verdict == SUPPORTED
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
    # Entropy falls and accuracy rises along a line: the law fits, but so does the step.
    assert {key for key, v in found.items() if v.verdict in (SUPPORTED, CONTRADICTED)} <= {("E1", "fit")}
    assert overall(list(found.values()))["E1"] == INCONCLUSIVE
    assert "two segments fit no better than one line" in found["S1", "two stages"].why
    assert "has no plateau" in found["I1", "accuracy"].why
    assert "the interval includes zero" in found["S4", "any defect"].why


def test_absent_effects_in_a_run_with_a_plateau(tmp_path):
    flat = Planted(two_stages=True, negative_falls=False, defects_fall=False, ppl_orders=False, ends_high=False)
    write_run(tmp_path / "run", planted=flat, groups=32)
    found = {(v.claim, v.part): v for v in judge(open_runs(tmp_path))}
    assert found["S1", "entropy slows"].verdict == SUPPORTED
    for part in (("S4", "any defect"), ("I1", "accuracy"), ("T1", "beginning"), ("T1", "end")):
        assert found[part].verdict == INCONCLUSIVE
    for part in (("T1", "beginning"), ("T1", "end")):
        assert "no effect that matters" in found[part].why


def test_claims_change_little_when_the_boundary_moves_within_its_interval(tmp_path):
    path = write_run(tmp_path / "run", steps=80, groups=16)
    fit = open_runs(path).stage_fits["run"]
    assert fit.low is not None
    assert fit.high is not None
    assert fit.low < fit.high
    found: dict[tuple[str, str], list[Estimate]] = {}
    for boundary in (fit.boundary, fit.low, fit.high):
        runs = open_runs(path)
        runs._fits = {"run": replace(fit, boundary=boundary)}
        for claim in ("E1", "S2", "S3", "S4", "S5", "S6", "I1", "T1", "T3"):
            for part, judge_part in PARTS[claim].items():
                found.setdefault((claim, part), []).append(judge_part(runs, ["run"]))
    for key, (at_boundary, *moved) in found.items():
        for estimate in moved:
            assert abs(estimate.value - at_boundary.value) <= at_boundary.width / 2, key


CASES = Path(__file__).parents[1] / "fixtures" / "cases"


def judge_case(name: str) -> dict[tuple[str, str], Verdict]:
    return {(v.claim, v.part): v for v in judge(open_runs(CASES / name))}


def test_a_frozen_policy_supports_nothing():
    found = judge_case("frozen-real-steps")
    assert {v.verdict for v in found.values()} == {INCONCLUSIVE, NOT_RECORDED}
    # Step means cannot distinguish a change of the policy from the difficulty of a batch.
    assert found["E1", "association"].verdict == NOT_RECORDED


def test_a_smooth_decay_slows_down_and_has_no_two_stages():
    found = judge_case("pure-exponential")
    assert found["S1", "entropy slows"].verdict == SUPPORTED
    assert found["S1", "two stages"].verdict == CONTRADICTED


def test_a_speed_up_contradicts():
    found = judge_case("slow-then-fast")
    assert {found["S1", part].verdict for part in ("entropy slows", "accuracy slows")} == {CONTRADICTED}
    assert "faster after step" in found["S5", "concentration"].why


def test_entropy_first_and_accuracy_late():
    found = judge_case("entropy-first-accuracy-late")
    assert found["S1", "entropy slows"].verdict == SUPPORTED
    assert found["S1", "accuracy slows"].verdict == CONTRADICTED
    assert SUPPORTED not in {v.verdict for (claim, _), v in found.items() if claim == "E1"}


def test_each_benchmark_has_its_own_last_evaluation():
    found = [v for v in judge(open_runs(CASES / "two-benchmarks")) if v.claim == "M1"]
    assert [v.subject for v in found] == ["ppl vs none, gpqa", "ppl vs none, math"]
    assert [v.n for v in found] == [100, 100]
    assert found[1].effect == pytest.approx(0.203, abs=0.001)
    assert found[1].verdict == SUPPORTED


def test_one_nan_is_reported_with_table_column_and_count():
    with pytest.raises(InputError, match="entropy") as error:
        judge(open_runs(CASES / "one-nan-entropy"))
    assert "\n" not in str(error.value)
    assert "tokens" in str(error.value)
    assert "1 of 10105 rows" in str(error.value)


def test_only_tokens_of_kept_responses_count():
    runs = open_runs(CASES / "dropped-with-advantage")
    assert runs.sql("select count(*) from staged_tokens where sample_sign is not null").item() == 1697
    assert runs.sql("select count(*) from tokens where advantage <> 0").item() == 4405


def test_two_series_of_interventions_are_not_pooled(tmp_path):
    path = write_run(tmp_path / "run")
    part = next((path / "interventions").glob("*.parquet"))
    table = pq.read_table(part)
    column = table.schema.get_field_index("selection")
    other = pa.array(["entropy 0.8-1"] * len(table), pa.string())
    pq.write_table(table.set_column(column, table.schema.field(column), other), part.with_name("step-000060-b.parquet"))
    for claim in ("T2", "I2"):
        subjects = [v.subject for v in judge(open_runs(path)) if v.claim == claim]
        assert len(subjects) == 2
        assert any("selection entropy 0.8-1" in subject for subject in subjects)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'null = "a share that drifts without trend"\n',
            "",
            'claim S4, part "any defect": "null" is missing; it must say what',
        ),
        ('[S4.parts."any defect"]', '[S4.parts."no such"]', 'claim S4, part "no such": unknown part; valid: any'),
        ("[S4]", "[S4", "not a ledger"),
    ],
)
def test_a_bad_ledger_is_one_line(tmp_path, old: str, new: str, message: str):
    text = (Path(__file__).parents[2] / "analysis" / "claims.toml").read_text()
    (tmp_path / "ledger.toml").write_text(text.replace(old, new))
    with pytest.raises(InputError) as error:
        load_ledger(tmp_path / "ledger.toml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_ledger_without_claims_is_refused(tmp_path):
    (tmp_path / "ledger.toml").write_text("# nothing\n")
    with pytest.raises(InputError, match=r"ledger\.toml: no claims$"):
        load_ledger(tmp_path / "ledger.toml")


def test_detectable_effects_are_reported(study: Runs):
    ledger = load_ledger()
    for verdict in judge(study):
        if verdict.p_adjusted is not None and "arms" not in ledger[verdict.claim]:
            assert verdict.detectable is not None
            assert verdict.detectable > 0
        if "too small" in verdict.why:
            assert verdict.verdict == INCONCLUSIVE
            assert verdict.detectable is not None
            assert verdict.detectable > verdict.smallest_effect


def test_missing_data_are_named_with_the_way_to_record_them(tmp_path):
    path = write_run(tmp_path / "run")
    shutil.rmtree(path / "interventions")
    for part in (path / "tokens").glob("*.parquet"):
        table = pq.read_table(part)
        nothing = pa.nulls(len(table), pa.float32())
        column = table.schema.get_field_index("logprob_after")
        pq.write_table(table.set_column(column, table.schema.field(column), nothing), part)
    accept_edits(path)
    found = {(v.claim, v.part): v for v in judge(open_runs(path))}
    for claim, part in (("S5", "concentration"), ("S6", "direction"), ("T3", "movement")):
        assert found[claim, part].verdict == NOT_RECORDED
        assert "train with record.after_update_every from 1 to the number of steps" in found[claim, part].why
    for claim in ("I2", "T2"):
        assert found[claim, "impact"].verdict == NOT_RECORDED
        assert "run `entrace intervene RUN`" in found[claim, "impact"].why


def test_one_seed_gives_no_verdict_about_a_method(tmp_path):
    write_run(tmp_path / "none")
    write_run(tmp_path / "ppl", arm="ppl", planted=Planted(eval_accuracy=0.99))
    verdict = next(v for v in judge(open_runs(tmp_path)) if v.claim == "M1")
    assert verdict.verdict == INCONCLUSIVE
    assert verdict.low is not None
    assert verdict.low > 0.1
    assert "1 seed" in verdict.of
    assert "only one seed" in verdict.why


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
    write_manifest(folder, {**read_manifest(folder), "status": "failed"})
    verdict = next(v for v in judge(open_runs(tmp_path)) if v.claim == "M1")
    assert verdict.verdict == NOT_RECORDED


def test_same_seed_same_scorecard(study: Runs):
    # Multithreaded float sums differ in the last bits; the written values must not.
    first, second = ([verdict.to_dict() for verdict in judge(study)] for _ in range(2))
    assert first == second


def test_a_trace_too_short_for_stages(tmp_path):
    write_run(tmp_path / "short", steps=6)
    words = overall(judge(open_runs(tmp_path)))
    assert {words[claim] for claim in ("S1", "S2", "S4", "I1", "T1")} == {NOT_RECORDED}
