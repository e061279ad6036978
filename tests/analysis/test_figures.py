"""Test that figures draw the query's values, their intervals, and n."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import polars as pl
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

import entrace
from entrace.analysis import queries
from entrace.analysis.compare import compare_once
from entrace.analysis.figures import STEMS, arms, figure_module, style
from entrace.analysis.runs import Runs, open_runs
from entrace.analysis.trace import InputError, TraceWriter
from tests.analysis.conftest import step_row, write_failed
from tests.analysis.synthetic import NOTHING, write_run
from tests.slow import slow_after

mpl.use("Agg")


@pytest.fixture
def ax():
    return Figure().subplots()


@pytest.mark.parametrize(
    ("values", "noun", "text"),
    [
        ([1], "prompt", "1 prompt"),
        ([7, 7], "prompt", "7 prompts"),
        ([1, 1200], "prompt", "1–1,200 prompts"),
        ([0], "run", "0 runs"),
        ([3, 4], "", "3–4"),
    ],
)
def test_a_count_and_its_noun_agree(values: list[int], noun: str, text: str):
    assert style.span(values, noun) == text


@pytest.mark.parametrize("stem", slow_after(10, STEMS))
def test_figure_states_n_and_interval_and_its_labels_cover_nothing(
    study: Runs, stem: str, monkeypatch: pytest.MonkeyPatch
):
    frame = entrace.figures.query(study, stem)
    monkeypatch.setattr(entrace.analysis.figures, "query", lambda runs, name: {(study, stem): frame}[runs, name])
    with mpl.rc_context(style.RC):
        figure = Figure(figsize=entrace.figures.size(study, stem, frame))
        ax = figure.subplots()
        drawn = getattr(entrace.figures, stem)(study, ax=ax)
        figure.canvas.draw()
    assert drawn is ax
    assert ax.get_xlabel()
    assert "95% interval" in ax.get_title(loc="left")
    assert any(character.isdigit() for character in ax.get_title(loc="left").replace("95%", ""))
    panels = [axes for axes in (*figure.axes, *ax.child_axes) if axes.axison]
    ticks = [text for axes in panels for axis in (axes.xaxis, axes.yaxis) for text in axis.get_ticklabels()]
    legend = ax.get_legend()
    others = [ax.xaxis.label, ax.yaxis.label, ax.title, *([legend] if legend else [])]
    for artist in others:
        box = artist.get_window_extent()
        if box.width == 0:
            continue
        assert not box.overlaps(ax.get_window_extent()), artist
        assert not [tick for tick in ticks if tick.get_text() and box.overlaps(tick.get_window_extent())], artist


@pytest.mark.parametrize("stem", STEMS)
def test_figure_is_an_explicit_function_under_both_names(stem: str):
    function = getattr(entrace.figures, stem)
    # Importing the module again must not put it in the place of the function.
    assert figure_module(stem).__name__.endswith(stem)
    assert function is getattr(entrace.analysis.figures, stem)
    assert list(inspect.signature(function).parameters) == ["runs", "ax"]
    assert (function.__doc__ or "").startswith("Draw ")


def test_import_of_entrace_loads_no_plotting():
    check = "import sys, entrace; assert not {'matplotlib', 'seaborn'} & set(sys.modules); entrace.figures.u_shape"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_runs_are_pooled_by_the_mean_of_values_and_of_interval_ends(study: Runs, ax):
    frame = entrace.figures.query(study, "entropy_gap_by_prompt")
    at_step = frame.filter(step=3)
    assert at_step["run_id"].n_unique() == 3
    entrace.figures.entropy_gap_by_prompt(study, ax=ax)
    mean = next(line for line in ax.get_lines() if line.get_linewidth() == mpl.rcParams["lines.linewidth"])
    drawn = dict(zip(*mean.get_data(), strict=True))
    assert drawn[3] == pytest.approx(at_step["gap"].mean())
    [band] = (path for part in ax.collections for path in part.get_paths() if len(path.vertices) > 50)
    ends = [y for x, y in band.vertices if x == 3]
    assert (min(ends), max(ends)) == pytest.approx((at_step["low"].mean(), at_step["high"].mean()))


def test_boundaries_of_several_runs_are_lines_without_shades(study: Runs, study_path: Path):
    one = open_runs(study_path / "none-seed0")
    shaded, lines = (entrace.figures.category_shares(runs, ax=Figure().subplots()) for runs in (one, study))
    assert (len(shaded.patches), len(lines.patches)) == (1, 0)
    steps = entrace.figures.query(study, "category_shares")["boundary_step"].unique().to_list()
    dotted = {line.get_xdata()[0] for line in lines.get_lines() if len(set(line.get_xdata())) == 1}
    assert dotted == set(steps)


def test_empty_bins_have_no_band(study: Runs, ax):
    frame = entrace.figures.query(study, "movement_distribution")
    shown, _ = style.late_stage(frame)
    assert (shown["share"] == 0).any()
    filled = 0
    for sign in style.SIGN_COLORS:
        shares = shown.filter(sample_sign=sign).group_by("bin_high").agg((pl.col("share") > 0).all())
        filled += shares["share"].sum()
    entrace.figures.movement_distribution(study, ax=ax)
    assert len(ax.collections) == filled


def test_figure_makes_its_own_axes(tiny: Runs):
    import matplotlib.pyplot as plt

    assert tuple(entrace.figures.stage_dynamics(tiny).figure.get_size_inches()) == style.SIZE
    plt.close("all")


def test_stage_dynamics_draws_the_recorded_series(tiny: Runs, ax):
    frame = tiny.query("stage_dynamics")
    entrace.figures.stage_dynamics(tiny, ax=ax)
    line = ax.get_lines()[0]
    np.testing.assert_allclose(line.get_ydata(), frame["entropy_token_mean"])
    assert "24 steps in 1 run" in ax.get_title(loc="left")
    assert [text.get_text().strip() for text in ax.texts] == ["rising", "plateau"]


def test_sign_figure_writes_the_fall_out(tiny: Runs, ax):
    # Shares stay at one half; negative 3 -> 1, positive 1.5 -> 1.
    legend = entrace.figures.entropy_by_sample_sign(tiny, ax=ax).get_legend()
    assert legend is not None
    assert "1.25 nats:\nwithin negative 1.00, positive 0.25, shares 0.00" in legend.get_title().get_text()


def test_defects_that_never_occur_are_not_drawn(tiny: Runs, ax):
    labels = [line.get_label() for line in entrace.figures.defects_over_steps(tiny, ax=ax).get_lines()]
    assert [label for label in labels if not str(label).startswith("_")] == [
        "any defect",
        "format violation",
        "truncated",
    ]


def test_run_without_boundary_says_so(tmp_path: Path, ax):
    runs = open_runs(write_run(tmp_path / "run", planted=NOTHING))
    entrace.figures.stage_dynamics(runs, ax=ax)
    assert "no stage boundary found" in [text.get_text() for text in ax.texts]


def test_every_arm_is_in_the_ablation(study: Runs, ax):
    legend = entrace.figures.ablation_curves(study, ax=ax).get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["none", "ppl"]


def write_arm(
    folder: Path,
    arm: str,
    seed: int,
    num_right: list[int],
    *,
    baseline: str = "none",
    steps: int = 2,
    benchmarks: tuple[str, ...] = ("held",),
    is_complete: bool = True,
) -> None:
    """Write a run whose last evaluation has ``num_right[p]`` of four samples right.

    p is a prompt. No sample is right before training.
    """
    run = folder / f"{arm}-{seed}"
    writer = TraceWriter.create(run, {"run_id": run.name, "arm": arm, "seed": seed, "baseline": baseline}, ["<eos>"])
    seconds = {"rollout_s": 1.0, "reward_s": 0.25, "update_s": 2.0, "record_s": 0.5}
    for step in range(1, steps + 1):
        writer.append("steps", step_row(step, entropy=1, accuracy=0.5) | seconds)
    for benchmark in benchmarks:
        for step, right in ((0, [0] * len(num_right)), (steps, num_right)):
            for prompt, times in enumerate(right):
                is_correct = [sample < times for sample in range(4)]
                columns = {"step": step, "benchmark": benchmark, "prompt_id": f"p{prompt}"}
                measures = {"response_length": 5, "entropy_mean": 0.5, "temperature": 1.0, "is_correct": is_correct}
                writer.append("evals", columns | measures | {"sample_index": [0, 1, 2, 3], "answer": None})
    writer.flush(steps)
    if is_complete:
        writer.finish()


def on_logit_scale(share: float, half: float) -> tuple[float, float]:
    """Return the ends of an interval of a share that stays within [0, 1]."""
    middle, reach = np.log(share / (1 - share)), half / (share * (1 - share))
    return 1 / (1 + np.exp(reach - middle)), 1 / (1 + np.exp(-reach - middle))


def test_mean_over_three_seeds_has_an_interval_over_seeds(tmp_path: Path):
    # 40, 50 and 60% of ten prompts are solved every time: t(2) = 4.3027, sd = .1.
    for seed in range(3):
        write_arm(tmp_path, "none", seed, [4] * (4 + seed) + [0] * (6 - seed))
    last = entrace.figures.query(open_runs(tmp_path), "ablation_curves").filter(step=2)
    low, high = on_logit_scale(0.5, 4.302653 * 0.1 / 3**0.5)
    assert last["avg_at_k"].to_list() == pytest.approx([0.4, 0.5, 0.6])
    for row in last.select("mean", "mean_low", "mean_high", "num_seeds").rows():
        assert row == pytest.approx((0.5, low, high, 3), abs=1e-6)


def test_mean_over_two_seeds_has_an_interval_over_prompts_and_says_so(tmp_path: Path, ax):
    for seed in range(2):
        write_arm(tmp_path, "none", seed, [4] * (4 + seed) + [0] * (6 - seed))
    runs = open_runs(tmp_path)
    row = entrace.figures.query(runs, "ablation_curves").filter(step=2).row(0, named=True)
    # The mean of both runs' intervals, t(.975, 9) = 2.2622.
    both = [on_logit_scale(0.4, 2.262157 * (0.24 / 9) ** 0.5), on_logit_scale(0.5, 2.262157 * (0.25 / 9) ** 0.5)]
    assert (row["mean"], row["mean_low"], row["mean_high"]) == pytest.approx((0.45, *np.mean(both, axis=0)), abs=1e-6)
    title = entrace.figures.ablation_curves(runs, ax=ax).get_title(loc="left")
    assert title == "1 arm, 2 seeds each, 10 held-out prompts, 4 samples each\nband: 95% interval over prompts"


def test_run_that_stopped_early_has_no_part_in_where_its_arm_ended(tmp_path: Path):
    write_arm(tmp_path, "none", 0, [4, 0])
    write_arm(tmp_path, "none", 1, [4, 4], steps=1, is_complete=False)
    frame = entrace.figures.query(open_runs(tmp_path), "cost_accuracy")
    assert frame.select("run_id", "avg_at_k", "mean", "num_seeds").rows() == [
        ("none-0", 0.5, 0.5, 1),
        ("none-1", 1, None, None),
    ]


def test_cost_is_tokens_and_seconds_of_all_steps(tmp_path: Path):
    write_arm(tmp_path, "none", 0, [4, 0], steps=3)
    row = open_runs(tmp_path).query("cost_accuracy").row(0, named=True)
    assert (row["tokens"], row["seconds"]) == (24, pytest.approx(3 * 3.75))


def test_profile_counts_prompts_above_each_threshold(tmp_path: Path):
    write_arm(tmp_path, "none", 0, [0, 1, 2, 4, 4])
    frame = open_runs(tmp_path).query("performance_profile")
    assert frame.select("tau", "share").rows() == [
        (0, pytest.approx(4 / 5)),
        (0.25, pytest.approx(3 / 5)),
        (0.5, pytest.approx(2 / 5)),
        (0.75, pytest.approx(2 / 5)),
    ]


def test_arms_are_paired_with_their_own_baseline_by_seed(tmp_path: Path):
    for lr, plain in (("1", [2, 2]), ("2", [4, 0])):
        for seed in range(2):
            write_arm(tmp_path, f"none [lr={lr}]", seed, plain, baseline=f"none [lr={lr}]")
        write_arm(tmp_path, f"ppl [lr={lr}]", 1, [4, 1], baseline=f"none [lr={lr}]")
    write_arm(tmp_path, "ppl [lr=2]", 0, [4, 4], baseline="none [lr=2]", is_complete=False)
    frame = entrace.figures.query(open_runs(tmp_path), "paired_differences").filter(metric="avg_at_k")
    assert frame.select("arm", "baseline", "seed", "value", "baseline_value", "difference", "num_prompts").rows() == [
        ("ppl [lr=1]", "none [lr=1]", 1, 0.625, 0.5, 0.125, 2),
        ("ppl [lr=2]", "none [lr=2]", 1, 0.625, 0.5, 0.125, 2),
    ]
    assert frame["covers"].to_list() == ["prompts only; other seeds not covered"] * 2


def test_differences_by_seed_are_those_that_are_judged(study: Runs):
    frame = entrace.figures.query(study, "paired_differences").filter(metric="avg_at_k")
    comparison = compare_once(study)
    assert comparison is not None
    judged = comparison.by_seed.filter(metric="avg_at_k")
    assert frame["difference"].to_list() == pytest.approx(judged["difference"].to_list())
    assert frame["mean"].to_list() == pytest.approx([judged["difference"].mean()] * 3)


def test_forest_has_a_row_an_arm_from_best_to_worst_with_its_seeds(tmp_path: Path, ax):
    for seed in range(3):
        write_arm(tmp_path, "none", seed, [2, 2, 2, 2])
        write_arm(tmp_path, "bad", seed, [1, 1, 2, seed])
        write_arm(tmp_path, "good", seed, [3, 3, 2, 2 + seed])
    panel = entrace.figures.paired_differences(open_runs(tmp_path), ax=ax).child_axes[0]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["good", "bad"]
    drawn = {(round(float(x), 6), y) for line in panel.get_lines() for x, y in line.get_xydata()}
    assert {(0.125, 0), (0.1875, 0), (0.25, 0), (-0.25, 1), (-0.1875, 1), (-0.125, 1)} <= drawn
    assert "2 differences, 3 seeds each, 4 held-out prompts per seed" in ax.get_title(loc="left")
    assert ax.get_xlabel() == "held-out accuracy (avg@k): arm minus none"


def test_many_arms_have_a_panel_each_beside_their_baseline(tmp_path: Path):
    arms = ["none", *(f"arm{i}" for i in range(9))]
    for i, arm in enumerate(arms):
        write_arm(tmp_path, arm, 0, [i % 5, 2, 2, 2])
    runs = open_runs(tmp_path)
    frame = entrace.figures.query(runs, "ablation_curves")
    width, height = entrace.figures.size(runs, "ablation_curves", frame)
    assert width == style.SIZE[0]
    assert height > style.SIZE[1]
    ax = entrace.figures.ablation_curves(runs, ax=Figure(figsize=(width, height)).subplots())
    assert [panel.get_title() for panel in ax.child_axes] == arms[1:]
    for i, panel in enumerate(ax.child_axes, start=1):
        plain, shaped = panel.get_lines()
        assert (plain.get_color(), list(plain.get_ydata())) == (style.GREY, [0, 0.375])
        assert (shaped.get_color(), list(shaped.get_ydata())) == (style.BLUE, [0, (i % 5 + 6) / 16])


@pytest.mark.parametrize("stem", [path.stem for path in sorted((queries.SQL_ROOT / "ablation").glob("*.sql"))])
def test_two_benchmarks_with_two_seeds_and_no_baseline_of_one(tmp_path: Path, ax, stem: str):
    for arm, seed in (("none", 0), ("none", 1), ("ppl", 0), ("ppl", 1), ("ppl", 2)):
        write_arm(tmp_path, arm, seed, [2, seed, 3], benchmarks=("sums", "chains"))
    getattr(entrace.figures, stem)(open_runs(tmp_path), ax=ax)
    shown = [text.get_text() for axes in (ax, *ax.child_axes) for text in axes.findobj(Text)]
    assert all(any(name in text for text in shown) for name in ("sums", "chains"))


def test_what_a_figure_needs_is_named_with_the_way_to_get_it(tmp_path: Path, ax):
    runs = open_runs(write_run(tmp_path / "run", steps=4))
    with pytest.raises(InputError, match="movement_by_entropy: no after-update values were recorded; train with"):
        entrace.figures.movement_by_entropy(runs, ax=ax)


def test_nothing_to_draw_is_said_in_one_line(tmp_path: Path, ax):
    with pytest.raises(InputError, match="entropy_by_position: no token is durable yet"):
        entrace.figures.entropy_by_position(open_runs(write_failed(tmp_path / "broken")), ax=ax)


def test_titles_of_panels_do_not_collide():
    names = ["a_very_long_name_of_an_arm_that_goes_on", "ppl [alpha=0.125, beta=0.25]", "none"]
    names += [f"scale_matched_position_{i}" for i in range(20)]
    frame = pl.DataFrame(
        [
            {"arm": arm, "seed": None, "run_id": None, "benchmark": "heldout", "tau": tau, "share": None, "mean": 0.5}
            | {"low": None, "high": None, "mean_low": 0.4, "mean_high": 0.6, "k": 8, "num_prompts": 100}
            | {"baseline": "none", "num_seeds": 3, "step": 40}
            for arm in names
            for tau in (0.0, 0.5)
        ]
    )
    with style.canvas(arms.panels_size(frame)) as figure:
        ax = figure.subplots()
        arms.lines(ax, frame, "tau")
        figure.draw_without_rendering()
        boxes = [panel.title.get_window_extent() for panel in ax.child_axes]
        insides = [panel.get_window_extent() for panel in ax.child_axes]
    assert len(boxes) == len(names) - 1
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    assert not [(a, b) for a in boxes for b in insides if a.overlaps(b)]
