"""Test the means over the seeds of an arm, and their intervals."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import polars as pl
import pytest
from matplotlib.figure import Figure

import entrace
from entrace.analysis.figures import style
from entrace.analysis.runs import open_runs
from entrace.analysis.trace import TraceWriter
from tests.analysis.conftest import step_row

mpl.use("Agg")


def write_run(folder: Path, arm: str, seed: int, num_right: list[int], last: int, seconds: float | None = 1.0) -> None:
    """Write a run evaluated at steps 0, 2, ... ``last``.

    On prompt p, ``num_right[p]`` of four samples are correct. The run failed unless it reached step 6.
    """
    run = folder / f"{arm}-{seed}"
    writer = TraceWriter.create(run, {"run_id": run.name, "arm": arm, "seed": seed, "baseline": "none"}, ["<eos>"])
    for step in range(1, last + 1):
        times = dict.fromkeys(("rollout_s", "reward_s", "update_s", "record_s"), seconds)
        writer.append("steps", step_row(step, entropy=1, accuracy=0.5) | times)
    for step in range(0, last + 1, 2):
        for prompt, times in enumerate(num_right):
            columns = {"step": step, "benchmark": "held", "prompt_id": f"p{prompt}", "sample_index": [0, 1, 2, 3]}
            measures = {"response_length": 5, "entropy_mean": 0.5, "temperature": 1.0, "answer": None}
            writer.append("evals", columns | measures | {"is_correct": [sample < times for sample in range(4)]})
    writer.flush(last)
    writer.finish() if last == 6 else writer.finish(error="out of memory")


@pytest.fixture
def dead_seed(tmp_path: Path) -> Path:
    """Write three seeds per arm, one of which fails in arm b.

    The failing seed has the lowest accuracy, and fails at step 2.
    """
    for seed in range(3):
        write_run(tmp_path, "none", seed, [2] * 10, last=6)
    for seed, (right, last) in enumerate(((1, 2), (2, 6), (4, 6))):
        write_run(tmp_path, "b", seed, [right] * 10, last)
    return tmp_path


@pytest.mark.parametrize("stem", ["ablation_curves", "performance_profile", "ablation_final", "cost_accuracy"])
def test_all_points_average_the_same_seeds(dead_seed: Path, stem: str):
    runs = open_runs(dead_seed)
    shown = entrace.figures.query(runs, stem).filter(arm="b").drop_nulls("mean")
    assert set(shown["run_id"]) == {"b-1", "b-2"}
    assert set(shown["num_seeds"]) == {2}
    if stem == "ablation_curves":
        # The two seeds have accuracies of a half and 1 throughout, so the mean does not jump where the third seed ends.
        assert shown["mean"].to_list() == pytest.approx([0.75] * 8)
        assert set(shown["step"]) == {0, 2, 4, 6}
    title = getattr(entrace.figures, stem)(runs, ax=Figure().subplots()).get_title(loc="left")
    assert "left out: 1 run that ended before others of the arm" in title


def test_a_step_that_one_seed_did_not_evaluate_is_not_drawn(tmp_path: Path):
    frame = pl.DataFrame(
        {
            "run_id": ["a-0", "a-0", "a-0", "a-1", "a-1"],
            "arm": "a",
            "benchmark": "held",
            "step": [0, 5, 10, 0, 10],
            "avg_at_k": [0.1, 0.5, 0.6, 0.3, 0.8],
            "low": 0.05,
            "high": 0.9,
        }
    )
    write_run(tmp_path, "none", 0, [2], last=6)
    found = entrace.figures.arms.with_means(open_runs(tmp_path), frame, "avg_at_k", ("benchmark", "step"))
    assert found["step"].to_list() == [0, 5, 10, 0, 10]
    assert found["mean"].is_null().to_list() == [False, True, False, False, False]
    assert found["mean"].drop_nulls().to_list() == pytest.approx([0.2, 0.7, 0.2, 0.7])


def test_intervals_of_shares_stay_within_their_range(tmp_path: Path):
    # 8, 9, and 10 of ten prompts are always solved: Student's t would extend to 1.15.
    for seed, solved in enumerate((8, 9, 10)):
        write_run(tmp_path, "none", seed, [4] * solved + [0] * (10 - solved), last=6)
    row = entrace.figures.query(open_runs(tmp_path), "ablation_curves").row(0, named=True)
    half = 4.302653 * 0.1 / 3**0.5 / (0.9 * 0.1)
    ends = 1 / (1 + np.exp(-np.log(9) + np.array([half, -half])))
    assert (row["mean"], row["mean_low"], row["mean_high"]) == pytest.approx((0.9, *ends), abs=1e-6)


def test_seeds_that_agree_have_the_interval_over_prompts(tmp_path: Path):
    for seed in range(3):
        write_run(tmp_path, "none", seed, [4] * 10, last=6)
    row = entrace.figures.query(open_runs(tmp_path), "ablation_curves").row(0, named=True)
    # Wilson's interval of 10 of 10, t(.975, 9) = 2.2622.
    assert (row["mean"], row["mean_low"], row["mean_high"]) == pytest.approx(
        (1, 1 / (1 + 2.262157**2 / 10), 1), abs=1e-6
    )


def test_runs_without_times_are_drawn_by_their_tokens(tmp_path: Path):
    for seed in range(3):
        write_run(tmp_path, "none", seed, [4, 2], last=6, seconds=None)
    ax = entrace.figures.cost_accuracy(open_runs(tmp_path))
    ax.figure.canvas.draw()
    tokens, seconds = ax.child_axes
    assert len(tokens.lines[0].get_xdata()) == 3
    assert [text.get_text() for text in seconds.texts] == ["not recorded", "none"]


def test_many_arms_are_their_means_and_one_bar(tmp_path: Path):
    """Runs and intervals of dozens of arms would hide their means."""
    names = [f"arm-{i}" for i in range(len(style.ARM_COLORS) + 1)]
    for i, arm in enumerate(names):
        for seed in range(3):
            write_run(tmp_path, arm, seed, [1 + (i + seed) % 3] * 10, last=6)
    runs = open_runs(tmp_path)
    ax = entrace.figures.cost_accuracy(runs)
    frame = entrace.figures.query(runs, "cost_accuracy").unique("arm")
    *means, bar = ax.child_axes[0].lines
    assert sorted(line.get_ydata()[0] for line in means) == pytest.approx(sorted(frame["mean"]))
    low, high = bar.get_ydata()
    assert low == pytest.approx(frame["mean"].min())
    assert high - low == pytest.approx((frame["mean_high"] - frame["mean_low"]).median())
    assert "bar: median 95% interval over seeds" in ax.get_title(loc="left")
