"""Test the comparison of arms.

The tests cover numbers computed by hand on a small grid, verdicts, and the claims about methods.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import entrace
from entrace.analysis.claims import judge
from entrace.analysis.compare import Comparison, compare
from entrace.analysis.compare.claims import PARTS, judge_methods
from entrace.analysis.compare.measure import first_reached, tensor
from entrace.analysis.compare.paired import Difference
from entrace.analysis.compare.rows import Row, SeedValue
from entrace.analysis.compare.text import to_text
from entrace.analysis.compare.verdict import judge_rows, metric_of
from entrace.analysis.ledger import load_ledger
from entrace.analysis.report import write_report
from entrace.analysis.runs import open_runs
from entrace.analysis.statistics.aggregates import iqm
from entrace.analysis.statistics.estimates import Estimate, detectable, holm
from entrace.analysis.trace import InputError, TraceWriter, read_manifest, write_manifest
from tests.analysis.conftest import write_failed
from tests.slow import slow_after

STEPS = (0, 10, 20)
# Number of correct answers among the samples of prompts p and q at each of STEPS, by seed.
NONE = [[(1, 1), (2, 2), (2, 2)]] * 3
PPL = [[(1, 1), (3, 3), (4, 3)], [(1, 1), (3, 2), (4, 2)], [(1, 1), (2, 2), (3, 2)]]


def write_arm(
    root: Path,
    arm: str,
    seed: int,
    counts: Sequence[tuple[int, ...]],
    *,
    texts: Sequence[str] | None = None,
    length: int = 5,
    steps: Sequence[int] = STEPS,
    is_complete: bool = True,
    is_early_too: bool = False,
    num_samples: int = 4,
    **manifest: Any,
) -> Path:
    """Write a run with evaluations only.

    Prompt ids are equal across seeds; texts differ unless given. ``is_early_too`` adds a benchmark with the same
    outcomes that the last step does not evaluate.
    """
    folder = root / f"{arm}-seed{seed}"
    fields = {"run_id": folder.name, "arm": arm, "seed": seed, "study": "hand", "total_steps": 20, **manifest}
    writer = TraceWriter.create(folder, fields, ["<eos>"])
    ids = ["p", "q"][: len(counts[0])]
    texts = texts or [f"{name} of seed {seed}" for name in ids]
    writer.append(
        "prompts", {"prompt_id": ids, "split": "heldout", "task": "t", "prompt": list(texts), "ground_truth": "1"}
    )
    evaluated = [("held", step, right) for step, right in zip(steps, counts, strict=True)]
    evaluated += [("early", step, right) for _, step, right in evaluated[:-1] if is_early_too]
    for benchmark, step, right in evaluated:
        for name, count in zip(ids, right, strict=True):
            samples = list(range(num_samples))
            columns = {"step": step, "benchmark": benchmark, "prompt_id": name, "sample_index": samples}
            answers = ["1"] * count + [f"wrong {i}" for i in range(num_samples - count)]
            measures = {"response_length": length, "entropy_mean": 0.5 if arm == "none" else 0.25, "temperature": 1.0}
            writer.append(
                "evals", {**columns, **measures, "answer": answers, "is_correct": [i < count for i in samples]}
            )
    writer.flush(20)
    if is_complete:
        writer.finish()
    return folder


def write_grid(root: Path, seeds: Sequence[int] = (0, 1, 2), **options: Any) -> Path:
    for seed in seeds:
        write_arm(root, "none", seed, NONE[seed], **options)
        write_arm(root, "ppl", seed, PPL[seed], length=5 + seed, **options)
    return root


def find(comparison: Comparison, metric: str, arm: str = "ppl") -> dict[str, Any]:
    return comparison.differences.filter(metric=metric, arm=arm).row(0, named=True)


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_grid(tmp_path_factory.mktemp("grid"))


@pytest.fixture(scope="module")
def comparison(grid: Path) -> Comparison:
    return entrace.compare(open_runs(grid), accuracy=0.7)


def test_primary_metric_by_hand(comparison: Comparison):
    row = find(comparison, "avg_at_k")
    # By seed 7/8, 6/8, 5/8 against 1/2. Differences .375, .25, .125: error .125 / sqrt(3), t(.975, 2) = 4.3027.
    half = 4.302653 * 0.125 / 3**0.5
    numbers = [row[name] for name in ("value", "baseline_value", "difference", "low", "high")]
    assert numbers == pytest.approx([0.75, 0.5, 0.25, 0.25 - half, 0.25 + half], abs=1e-6)
    # t = 2 sqrt(3) with 2 degrees of freedom; a single test, so Holm does not change p.
    assert (row["p_value"], row["p_adjusted"]) == pytest.approx((0.074180, 0.074180), abs=1e-6)
    assert row["detectable"] == pytest.approx(detectable(0.125 / 3**0.5, 2), abs=1e-9)
    assert (row["num_seeds"], row["num_prompts"], row["covers"]) == (3, 6, "prompts and seeds")
    assert (row["arm"], row["baseline"], row["benchmark"], row["unit"]) == ("ppl", "none", "held", "accuracy, k = 4")
    assert (row["is_primary"], row["verdict"]) == (True, "inconclusive")
    # (.407 / .01)^2 times three seeds exceeds the range of the advice.
    assert row["why"] == (
        "the interval includes zero as well as differences that matter; this comparison was too small: its detectable "
        "effect is 0.41; more than 100 times its 3 seeds would be needed"
    )


@pytest.mark.parametrize(
    ("metric", "by_seed"),
    [
        ("avg_at_k", [3 / 8, 2 / 8, 1 / 8]),
        ("maj_at_k", [0, 0, 0]),
        # Two of four correct: 1 - 1/6 of pairs; three or four: always.
        ("pass_at_2", [1 / 6, 1 / 12, 1 / 12]),
        ("pass_at_4", [0, 0, 0]),
        # Trapezoids over 0, 10, 20; the baseline's mean is (.375 + .5) / 2.
        ("accuracy_auc", [0.65625 - 0.4375, 0.5625 - 0.4375, 0.46875 - 0.4375]),
        ("entropy", [-0.25, -0.25, -0.25]),
        # 5, 6 and 7 tokens against 5.
        ("response_length", [0, 0.2, 0.4]),
    ],
)
def test_every_metric_by_seed(comparison: Comparison, metric: str, by_seed: list[float]):
    part = comparison.by_seed.filter(metric=metric)
    assert part["seed"].to_list() == [0, 1, 2]
    assert part["difference"].to_list() == pytest.approx(by_seed)
    divisor = part["baseline_value"] if metric == "response_length" else 1
    assert ((part["value"] - part["baseline_value"]) / divisor).to_list() == pytest.approx(by_seed)
    assert find(comparison, metric)["difference"] == pytest.approx(np.mean(by_seed))


def test_every_metric_has_its_row(comparison: Comparison):
    assert comparison.differences["metric"].to_list() == [
        *("avg_at_k", "maj_at_k", "pass_at_2", "pass_at_4", "accuracy_auc", "steps_to_accuracy", "entropy"),
        *("response_length", "formal_share"),
    ]
    missing = find(comparison, "formal_share")
    assert (missing["benchmark"], missing["difference"], missing["num_seeds"]) == ("training", None, 0)
    assert (missing["verdict"], missing["why"]) == ("inconclusive", "no pair recorded it in both runs")


def test_steps_to_accuracy_with_censored_runs(comparison: Comparison):
    # .7 is reached at 10 x .45/.5, at 10 + 10 x .075/.125, and never; by the baseline never. Never counts as 20.
    part = comparison.by_seed.filter(metric="steps_to_accuracy")
    assert part["value"].to_list() == [pytest.approx(9), pytest.approx(16), None]
    assert part["baseline_value"].to_list() == [None, None, None]
    assert part["difference"].to_list() == pytest.approx([-11, -4, 0])
    row = find(comparison, "steps_to_accuracy")
    assert (row["value"], row["baseline_value"], row["difference"]) == pytest.approx((15, 20, -5))
    assert (row["unit"], row["covers"], row["num_prompts"]) == ("steps to accuracy 0.7", "seeds", None)
    assert row["why"].endswith("(reached by 2 of 3 runs, of none by 0 of 3; other runs count as the last step, 20)")


def test_accuracy_to_reach_is_the_midpoint_of_the_baseline(grid: Path):
    row = find(compare(open_runs(grid)), "steps_to_accuracy")
    # Midpoint of .25 and .5, to .01. The baseline reaches it after 10 x .13/.25 steps, each run of the arm earlier.
    assert row["unit"] == "steps to accuracy 0.38"
    assert row["baseline_value"] == pytest.approx(5.2)
    assert row["value"] == pytest.approx(np.mean([1.3 / 0.5, 1.3 / 0.375, 1.3 / 0.25]))


def test_accuracy_that_no_run_reaches(grid: Path):
    comparison = compare(open_runs(grid), accuracy=1.0)
    row = find(comparison, "steps_to_accuracy")
    assert (row["difference"], row["verdict"], row["num_seeds"]) == (None, "inconclusive", 3)
    assert row["why"].startswith("reached by 0 of 3 runs, of none by 0 of 3")


@pytest.mark.parametrize(("level", "step"), [(0.2, 0), (0.3, 5), (0.4, 10), (0.6, 18), (0.65, np.nan)])
def test_first_step_at_an_accuracy(level: float, step: float):
    # Up to .4, down to .2, up to .62: only the first rise counts.
    curve = np.array([0.2, 0.4, 0.2, 0.62])
    found = first_reached(np.array([0, 10, 14, 18.2]), curve, level)
    assert found == pytest.approx(step, nan_ok=True)


def test_tensor_adds_up_and_drops_other_levels():
    frame = pl.DataFrame({"run_id": ["a", "b", "a", "c"], "prompt_id": ["x", "x", "x", "x"], "n": [1, 2, 3, 9]})
    np.testing.assert_array_equal(
        tensor(frame, {"prompt_id": ["x", "y"], "run_id": ["b", "a"]}, ["n"])[..., 0], [[2, 4], [0, 0]]
    )


def test_prompts_that_seeds_share_widen_the_interval(tmp_path: Path):
    row = find(compare(open_runs(write_grid(tmp_path, texts=["p", "q"]))), "avg_at_k")
    # Deviations of p by seed: 1/8, 1/4, 1/8, of q the opposite. Over ordered pairs the mean of 2 r r' is .05208, and
    # C is that divided by P (P - 1) = 2. Error sqrt(.125^2 / 3 + .026042).
    half = 4.302653 * 0.03125**0.5
    assert row["error"] == pytest.approx(0.03125**0.5)
    # A difference of shares cannot exceed 1.
    assert (row["low"], row["high"]) == pytest.approx((0.25 - half, 1), abs=1e-6)
    assert row["num_prompts"] == 2


def test_prompts_are_matched_by_text_not_by_id(tmp_path: Path):
    write_arm(tmp_path, "none", 0, NONE[0], texts=["one", "two"])
    # Prompts in the other order: p of this run is q of the other.
    write_arm(tmp_path, "ppl", 0, PPL[0], texts=["two", "one"])
    row = find(compare(open_runs(tmp_path)), "avg_at_k")
    assert (row["difference"], row["num_prompts"]) == (pytest.approx(0.375), 2)
    assert asked(tmp_path) == [(pytest.approx(row["value"]), pytest.approx(row["baseline_value"]), 2)]
    other = tmp_path / "other"
    write_arm(other, "none", 0, NONE[0], texts=["one", "two"])
    write_arm(other, "ppl", 0, PPL[0], texts=["two", "three"])
    # Only "two" is paired: p of the arm, 4 of 4, with q of the baseline, 2 of 4.
    row = find(compare(open_runs(other)), "avg_at_k")
    assert (row["value"], row["baseline_value"], row["num_prompts"]) == (1, 0.5, 1)
    assert asked(other) == [(1, 0.5, 1)]
    # The held-out prompts p and q of a run may have one text.
    write_arm(tmp_path / "twice", "none", 0, NONE[0], texts=["one", "two"])
    write_arm(tmp_path / "twice", "ppl", 0, PPL[0], texts=["two", "two"])
    row = find(compare(open_runs(tmp_path / "twice")), "avg_at_k")
    assert asked(tmp_path / "twice") == [(row["value"], row["baseline_value"], row["num_prompts"])]


def asked(root: Path) -> list[tuple[float, float, int]]:
    """Return the answer of question ``paired_differences`` in the primary metric."""
    found = open_runs(sorted(root.glob("*-seed0"))).query("paired_differences").filter(metric="avg_at_k")
    return found.select("value", "baseline_value", "num_prompts").rows()


def test_one_seed_gives_an_interval_over_prompts_and_says_so(tmp_path: Path):
    comparison = compare(open_runs(write_grid(tmp_path, seeds=[0])), accuracy=0.7)
    row = find(comparison, "avg_at_k")
    # Differences of the two prompts: .5 and .25. Standard error .125, t(.975, 1) = 12.7062: the whole possible range.
    assert (row["error"], row["low"], row["high"]) == (pytest.approx(0.125), -1, 1)
    # The row cannot earn a verdict and is excluded from Holm's correction.
    assert row["p_adjusted"] is None
    assert (row["covers"], row["num_seeds"]) == ("prompts only; other seeds not covered", 1)
    assert row["verdict"] == "inconclusive"
    assert row["why"].startswith("only one seed; a verdict needs 3. For these runs alone: the interval ")
    steps = find(comparison, "steps_to_accuracy")
    assert (steps["difference"], steps["low"], steps["covers"]) == (
        pytest.approx(-11),
        None,
        "nothing; one seed, and the metric has no prompts",
    )


def test_excluded_runs_are_listed_with_the_reason(tmp_path: Path):
    shared = {"base_policy": "a", "prompts": "b", "evaluation": "c"}
    write_arm(tmp_path, "none", 0, NONE[0], common_random_numbers=shared)
    write_arm(tmp_path, "ppl", 0, PPL[0], common_random_numbers=shared)
    write_arm(tmp_path, "other", 0, PPL[0], common_random_numbers={**shared, "prompts": "x", "evaluation": "y"})
    write_arm(tmp_path, "ppl", 1, PPL[1])
    write_arm(tmp_path, "none", 2, NONE[2])
    write_arm(tmp_path, "none", 3, NONE[0][:2], steps=(0, 10))
    write_arm(tmp_path, "ppl", 3, PPL[0][::2], steps=(0, 20))
    write_arm(tmp_path, "slow", 0, PPL[0], is_complete=False)
    write_failed(tmp_path / "broken-seed0")
    write_arm(tmp_path / "again", "ppl", 0, PPL[0])
    again = tmp_path / "again" / "ppl-seed0"
    write_manifest(again, {**read_manifest(again), "run_id": "again"})
    comparison = compare(open_runs([tmp_path, again]))
    assert dict(comparison.unpaired.select("run_id", "why").iter_rows()) == {
        "other-seed0": "differs from none-seed0 in the prompts and the random numbers of the evaluation",
        "ppl-seed1": "no complete run of arm none has seed 1",
        "none-seed2": "no run of another arm with seed 2 can be compared with it",
        "none-seed3": "no run of another arm with seed 3 can be compared with it",
        "ppl-seed3": "shares no evaluation after training with none-seed3",
        "slow-seed0": "still running",
        "broken-seed0": "failed: step 3: loss is nan",
        "again": "duplicate of ppl-seed0: arm ppl, seed 0",
    }
    assert comparison.unpaired.filter(run_id="broken-seed0").row(0)[1:4] == ("broken", 0, "failed")
    assert comparison.by_seed.filter(metric="avg_at_k").rows()[0][:5] == ("ppl", "none", "held", "avg_at_k", 0)
    assert find(comparison, "avg_at_k")["num_seeds"] == 1


def test_runs_without_a_pair_leave_empty_tables(tmp_path: Path):
    write_arm(tmp_path, "none", 0, NONE[0])
    write_arm(tmp_path, "ppl", 1, PPL[1])
    comparison = compare(open_runs(tmp_path))
    assert comparison.differences.is_empty()
    assert comparison.aggregates.is_empty()
    assert comparison.unpaired.height == 2


def test_each_arm_of_a_sweep_is_compared_with_its_own_baseline(tmp_path: Path):
    for seed in range(3):
        for rate, counts in (("1e-4", PPL), ("1e-3", NONE)):
            baseline = f"none [optim.lr={rate}]"
            write_arm(tmp_path, baseline, seed, NONE[seed], baseline=baseline)
            write_arm(tmp_path, f"ppl [optim.lr={rate}]", seed, counts[seed], baseline=baseline)
    comparison = compare(open_runs(tmp_path))
    primary = comparison.differences.filter(is_primary=True)
    assert primary.select("arm", "baseline", "difference").rows() == [
        ("ppl [optim.lr=1e-4]", "none [optim.lr=1e-4]", 0.25),
        ("ppl [optim.lr=1e-3]", "none [optim.lr=1e-3]", 0.0),
    ]
    assert comparison.aggregates["arm"].to_list() == [
        "none [optim.lr=1e-4]",
        "ppl [optim.lr=1e-4]",
        "none [optim.lr=1e-3]",
        "ppl [optim.lr=1e-3]",
    ]


def test_primary_metric_is_a_family_of_its_own(tmp_path: Path):
    for seed in range(3):
        write_arm(tmp_path, "none", seed, NONE[seed])
        write_arm(tmp_path, "ppl", seed, PPL[seed], length=5 + seed)
        write_arm(tmp_path, "late", seed, [*PPL[2 - seed][:2], (4, 4 - seed)], length=7 - seed)
    # A fourth arm has only two seeds.
    for seed in range(2):
        write_arm(tmp_path, "few", seed, PPL[seed], length=5 + seed)
    table = compare(open_runs(tmp_path)).differences.drop_nulls("p_value")
    assert table.filter(arm="few")["p_adjusted"].null_count() == table.filter(arm="few").height > 5
    table = table.filter(table["arm"] != "few")
    # The entropy differences of both arms are equal in all seeds: without an error, a row cannot earn a verdict.
    assert table.filter(metric="entropy")["p_adjusted"].null_count() == 2
    for is_primary, num_tests in ((True, 2), (False, 12)):
        family = table.filter(is_primary=is_primary).drop_nulls("p_adjusted")
        assert family.height == num_tests
        assert family["p_adjusted"].to_list() == pytest.approx(holm(family["p_value"].to_list()).tolist())
    # The arm with the larger gain comes first.
    assert table["arm"].unique(maintain_order=True).to_list() == ["late", "ppl"]


def test_aggregates_are_those_of_the_last_evaluation(comparison: Comparison):
    none, ppl = comparison.aggregates.to_dicts()
    assert (none["arm"], none["iqm"], none["mean"], none["improvement"]) == ("none", 0.5, 0.5, None)
    assert (ppl["arm"], ppl["num_seeds"], ppl["improvement"]) == ("ppl", 3, 1)
    assert ppl["iqm"] == pytest.approx(iqm(np.array([7, 6, 5]) / 8))
    # One of nine resamples has three equal draws, so both ends are the ends of the sample.
    assert (ppl["iqm_low"], ppl["iqm_high"]) == (0.625, 0.875)


@pytest.mark.parametrize("texts", slow_after(1, [["p"], ["p", "q"]]), ids=["one prompt", "two prompts"])
def test_one_seed_has_no_aggregate_interval_and_no_nan(command: Callable, tmp_path: Path, texts: list[str]):
    for arm, counts in (("none", NONE), ("ppl", PPL)):
        write_arm(tmp_path, arm, 0, [step[: len(texts)] for step in counts[0]], texts=texts)
    runs = open_runs(tmp_path)
    found = compare(runs)
    for row in found.aggregates.iter_rows(named=True):
        assert row["iqm"] == row["mean"] is not None
        assert {row[name] for name in row if "_low" in name or "_high" in name or name == "improvement"} == {None}
    steps = find(found, "steps_to_accuracy")
    assert steps["low"] is None
    assert "there is no interval, which needs a second seed (" in steps["why"]
    accuracy = find(found, "avg_at_k")
    assert accuracy["num_prompts"] == len(texts)
    assert (accuracy["low"] is None) == (len(texts) == 1)
    assert (accuracy["covers"] == "nothing; one seed and one prompt") == (len(texts) == 1)
    assert accuracy["why"].endswith("there is no interval, which needs a second seed or prompt") == (len(texts) == 1)
    text = to_text(found)
    assert "none  0.5 [no interval]  mean 0.5  n = 1 seed\n" in text
    assert text.endswith("An interval and a probability of improvement need a second seed")
    [judged] = [verdict for verdict in judge(runs) if (verdict.claim, verdict.subject) == ("M1", "ppl vs none")]
    assert (judged.low is None) == (judged.high is None) == (len(texts) == 1)
    write_report(runs, tmp_path / "report")
    for path in [*(tmp_path / "report").glob("*.csv"), *(tmp_path / "report").glob("*.json")]:
        assert not re.search(r"\b(nan|inf)\b", path.read_text(), re.IGNORECASE), path.name
    assert not re.search(r"[\[ ](nan|inf|–)[,\]]", (tmp_path / "report" / "report.html").read_text())
    printed = command("claims", str(tmp_path))[1].decode()
    assert ("[no interval] accuracy, n = 1 " in printed) == (len(texts) == 1)
    assert not re.search(r"\b(nan|inf)\b", printed)


def test_formal_share_is_a_ratio_of_tokens(study: entrace.Runs):
    row = find(compare(study), "formal_share")
    shares = study.sql(
        "select arm, seed, avg((category = 'formal_reasoning')::int) as share "
        "from tokens join runs using (run_id) where step > 50 group by all order by arm, seed"
    )["share"].to_numpy()
    assert row["difference"] == pytest.approx(np.mean(shares[3:] - shares[:3]))
    assert row["num_prompts"] == 40
    assert row["verdict"] == "higher"


@pytest.mark.parametrize(
    ("metric", "value", "low", "high", "p", "seeds", "word", "why"),
    [
        ("avg_at_k", 0.05, 0.02, 0.08, 0.01, 3, "better", "higher, significant, and at least 0.01"),
        ("avg_at_k", -0.05, -0.08, -0.02, 0.01, 3, "worse", "lower, significant, and at least 0.01"),
        ("pass_at_2", 0.05, 0.02, 0.08, 0.01, 3, "better", "higher, significant, and at least 0.01"),
        ("steps_to_accuracy", -5, -8, -2, 0.01, 3, "better", "lower, significant, and at least 1"),
        ("entropy", -0.05, -0.08, -0.02, 0.01, 3, "lower", "lower, significant, and at least 0.01"),
        ("response_length", 0.2, 0.1, 0.3, 0.01, 3, "higher", "higher, significant, and at least 0.05"),
        ("avg_at_k", 0.005, 0.002, 0.008, 0.01, 3, "no difference that matters", "whole interval lies within ±0.01"),
        ("avg_at_k", 0.05, -0.01, 0.11, 0.1, 3, "inconclusive", "includes zero as well as differences that matter"),
        (
            "avg_at_k",
            0.05,
            0.02,
            0.08,
            0.01,
            2,
            "inconclusive",
            "only 2 seeds; a verdict needs 3. For these runs alone",
        ),
        ("entropy", 0.05, np.nan, np.nan, 1, 3, "inconclusive", "equal in all seeds, so its error cannot be estimated"),
        ("entropy", 0.05, -np.inf, np.inf, 1, 1, "inconclusive", "there is no interval"),
    ],
)
def test_verdicts(metric: str, value: float, low: float, high: float, p: float, seeds: int, word: str, why: str):
    df = 0 if np.isinf(low) else 2
    difference = Difference(Estimate(value, low, high, p, 9, "prompts", 0.01, df), "prompts and seeds")
    values = [SeedValue(seed, None, None, value) for seed in range(seeds)]
    (found,) = judge_rows([Row("a", "none", "b", metric, "", values, difference=difference)])
    assert found.verdict == word
    assert why in found.why


def test_scorecard_rows_are_rows_of_the_comparison(tmp_path: Path):
    """Use benchmarks with different last steps, and a reference besides the baseline."""
    for seed in range(3):
        for arm, counts in (("none", NONE), ("ppl", PPL), ("ppl_high", NONE)):
            write_arm(tmp_path, arm, seed, counts[seed], length=6 if arm == "ppl" else 5, is_early_too=True)
    runs = open_runs(tmp_path)
    comparison = compare(runs)
    found = {(f.claim, f.part, f.subject): f for f in judge_methods(runs, load_ledger())}
    assert {name for name in found if name[0] == "M1"} == {
        ("M1", "avg@k", "ppl vs none, early"),
        ("M1", "avg@k", "ppl vs none, held"),
    }
    for claim, baseline in (("M1", "none"), ("I3", "ppl_high")):
        for benchmark, value in (("held", 0.25), ("early", 0.125)):
            finding = found[claim, "avg@k", f"ppl vs {baseline}, {benchmark}"]
            row = comparison.differences.filter(
                arm="ppl", baseline=baseline, benchmark=benchmark, metric="avg_at_k"
            ).row(0, named=True)
            assert finding.estimate is not None
            assert finding.estimate.value == pytest.approx(value)
            numbers = (finding.estimate.value, finding.estimate.low, finding.estimate.high, finding.p_adjusted)
            assert numbers == (row["difference"], row["low"], row["high"], row["p_adjusted"])
            assert (finding.why, finding.detectable) == (row["why"], row["detectable"])
            assert (finding.num_seeds, finding.estimate.n) == (3, 6)
    assert found["M2", "avg@k", "position vs none"].verdict == "not recorded"
    assert found["M3", "formal tokens", "ppl vs none"].verdict == "not recorded"
    # A reference besides the baseline appears only in the primary metric, and in no aggregate.
    extra = comparison.differences.filter(arm="ppl", baseline="ppl_high")
    assert set(extra["metric"]) == {"avg_at_k"}
    assert comparison.aggregates["arm"].to_list() == ["none", "ppl", "ppl_high"]


@pytest.mark.usefixtures("few_figures")
def test_report_scorecard_and_figure_give_the_numbers_of_one_comparison(tmp_path: Path):
    """Use twelve samples per prompt, more than the figure's SQL reads by default.

    The default is eight.
    """
    for seed in range(3):
        write_arm(tmp_path / "runs", "none", seed, NONE[seed], texts=["p", "q"], num_samples=12)
        # Prompts in the other order: matched by text, not by id.
        write_arm(tmp_path / "runs", "ppl", seed, PPL[seed], texts=["q", "p"], num_samples=12)
        write_arm(tmp_path / "runs", "position", seed, PPL[2 - seed], texts=["p", "q"], num_samples=12)
    out = entrace.write_report(open_runs(tmp_path / "runs"), tmp_path / "report").parent
    compared = pl.read_csv(out / "comparison.csv").filter(metric="avg_at_k")
    by_seed = pl.read_csv(out / "comparison_by_seed.csv").filter(metric="avg_at_k")
    drawn = pl.read_csv(out / "paired_differences.csv").filter(metric="avg_at_k")
    scorecard = json.loads((out / "claims.json").read_text())["verdicts"]
    for claim, arm in (("M1", "ppl"), ("M2", "position")):
        row = compared.filter(arm=arm).row(0, named=True)
        (verdict,) = [found for found in scorecard if found["claim"] == claim]
        judged = tuple(row[name] for name in ("difference", "low", "high", "p_adjusted", "detectable"))
        assert None not in judged
        assert tuple(verdict[name] for name in ("effect", "low", "high", "p_adjusted", "detectable")) == judged
        assert (verdict["p_value"], verdict["why"]) == (row["p_value"], row["why"])
        own = drawn.filter(arm=row["arm"])
        numbers = own.select("mean", "low", "high", "p_adjusted", "detectable", "verdict").unique()
        assert numbers.rows() == [(*judged, row["verdict"])]
        names = ("seed", "value", "baseline_value", "difference")
        assert own.select(names).rows() == by_seed.filter(arm=row["arm"]).select(names).rows()


def test_verdicts_about_methods_follow_the_direction_of_the_claim(study: entrace.Runs):
    ledger = load_ledger()
    found = {(f.claim, f.part): f.verdict for f in judge_methods(study, ledger) if f.subject.startswith("ppl vs none")}
    assert found == {
        ("M1", "avg@k"): "supported",
        # All responses of the arm are longer by exactly a fifth.
        ("M3", "length"): "inconclusive",
        ("M3", "formal tokens"): "supported",
    }
    parts = {name: spec | {"direction": "negative"} for name, spec in ledger["M1"]["parts"].items()}
    (turned,) = judge_methods(study, {"M1": ledger["M1"] | {"parts": parts}})
    assert turned.verdict == "contradicted"


def test_metrics_agree_with_the_ledger():
    about_methods = [part for entry in load_ledger().values() if "arms" in entry for part in entry["parts"].items()]
    assert {part for part, _ in about_methods} == set(PARTS)
    for part, spec in about_methods:
        metric = metric_of(PARTS[part])
        assert (spec["unit"], spec["smallest_effect"]) == (metric.unit, metric.smallest)


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run_entrace(command: Callable[..., tuple[int, bytes, str]]) -> Callable[..., Done]:
    """Return a function that runs ``entrace compare ARGS`` in this process."""

    def call(*args: str) -> Done:
        code, out, err = command("compare", *args)
        return Done(code, out.decode(), err)

    return call


def test_command_prints_differences_aggregates_and_the_rest(
    run_entrace: Callable[..., Done], grid: Path, tmp_path: Path
):
    write_failed(tmp_path / "broken-seed0")
    done = run_entrace(str(grid), str(tmp_path))
    assert done.returncode == 0
    assert "entrace: broken-seed0: failed (step 3: loss is nan), 0 steps recorded\n" in done.stderr
    assert "ppl  held  avg_at_k  inconclusive  +0.25 [-0.0605, +0.561] accuracy, k = 4\n" in done.stdout
    assert "n = 3 seeds, 6 prompts; interval covers prompts and seeds; p = 0.074, Holm-adjusted 0.074;" in done.stdout
    assert "ppl   0.75 [0.625, 0.875]  mean 0.75  improvement 1 [1, 1]  n = 3 seeds\n" in done.stdout
    assert "Bootstrap intervals are too narrow with few seeds; at an improvement of 0 or 1 they" in done.stdout
    assert "broken-seed0  failed: step 3: loss is nan\n" in done.stdout
    assert "entropy" not in done.stdout


def test_command_prints_json(run_entrace: Callable[..., Done], grid: Path):
    frames = json.loads(run_entrace(str(grid), "--json", "--accuracy", "0.7").stdout)
    assert list(frames) == ["differences", "by_seed", "aggregates", "unpaired"]
    assert [row["metric"] for row in frames["differences"]][-1] == "formal_share"
    assert len(json.loads(run_entrace(str(grid), "--json", "--metric", "entropy").stdout)["by_seed"]) == 3


def test_command_names_bad_input_in_one_line(run_entrace: Callable[..., Done], grid: Path):
    bad = {
        ("--metric", "avg_at_kk"): 'unknown metric "avg_at_kk"; did you mean "avg_at_k"?',
        ("--accuracy", "80"): "accuracy: expected a number between 0 and 1, found 80",
    }
    for args, message in bad.items():
        done = run_entrace(str(grid), *args)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"entrace: {message}\n")
    assert "Example: entrace compare " in run_entrace("--help").stdout


def test_comparison_needs_a_baseline_and_another_arm(grid: Path):
    with pytest.raises(InputError, match='no run of the baseline arm "none"; found ppl'):
        compare(open_runs(str(grid / "ppl-*")))
    with pytest.raises(InputError, match=r"all runs are of the baseline arm \(none\)"):
        compare(open_runs(str(grid / "none-*")))
