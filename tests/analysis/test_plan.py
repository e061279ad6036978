import pytest

from entrace.analysis.plan import GridPlan, Pilot, PlannedRun, measure_pilot
from entrace.analysis.statistics.estimates import detectable_difference
from entrace.analysis.trace import InputError, TraceWriter

PILOT = Pilot("embedded", "chain_sum", seconds_per_step=2.0, sd_difference=0.02, hardware="2 cores")


def planned(arm, seed, status="new", steps_left=10):
    return PlannedRun(f"{arm}-seed{seed}", arm, "none", seed, 10, status, steps_left)


def test_a_plan_counts_what_is_left_and_what_can_be_found():
    """ppl shares two seeds with the baseline, position three.

    The comparisons of the grid therefore have two at least.
    """
    runs = [planned(arm, seed) for seed in range(3) for arm in ("none", "position")]
    runs += [planned("ppl", 1, "complete", 0), planned("ppl", 2, "running", 4), planned("ppl", 9)]
    plan = GridPlan(runs, slots=2, pilot=PILOT, source="a pilot")
    assert (plan.num_tests, plan.num_seeds) == (2, 2)
    # Six runs of 20 s in two places, then 8 s and 20 s, side by side.
    assert plan.seconds_left == 60 + 20
    found = plan.detectable()
    assert list(found) == [2, 3, 5, 10, 20]
    assert found[2] == pytest.approx(detectable_difference(0.02, 2, 2))
    assert found[5] == pytest.approx(detectable_difference(0.02, 5, 2))
    assert "runs: 9, 90 steps, 74 remaining" in plan.lines()
    assert "time: about 1:20, 2 in parallel, 2 s per step" in plan.lines()
    assert "planned with a pilot: embedded on chain_sum, 2 cores" in plan.lines()
    assert plan.to_dict()["runs"][0]["run_id"] == "none-seed0"


def test_a_difference_that_no_shares_can_have_is_none():
    """Two seeds and two tests need a difference of 5.7 standard deviations."""
    runs = [planned(arm, seed) for seed in range(2) for arm in ("none", "ppl", "position")]
    plan = GridPlan(runs, slots=1, pilot=Pilot("m", "t", 1.0, sd_difference=0.2, hardware="h"), source="a pilot")
    assert plan.detectable()[2] is None
    assert any("none with 2, " in line for line in plan.lines())


def test_one_arm_alone_has_nothing_to_compare():
    plan = GridPlan([planned("none", 0)], slots=1, pilot=PILOT, source="a pilot")
    assert (plan.num_tests, plan.num_seeds) == (0, 1)
    assert plan.detectable()[1] is None


@pytest.mark.parametrize(
    ("finishes", "message"),
    [(True, "no complete run recorded its timings: rollout_s, "), (False, "the study has no complete run")],
)
def test_a_pilot_without_timings_is_told_from_one_without_runs(tmp_path, finishes, message):
    writer = TraceWriter.create(tmp_path / "run", {"run_id": "run"}, ["a"])
    figures = {"reward_mean": 0.5, "accuracy": 0.5, "format_rate": 1.0, "entropy_token_mean": 0.3}
    writer.append("steps", {"step": 1, **figures, "tokens": 10, "groups_kept": 1, "groups_dropped": 0})
    writer.flush(1)
    if finishes:
        writer.finish()
    with pytest.raises(InputError, match=f"--pilot .*: {message}"):
        measure_pilot(tmp_path)
