"""Figures draw what the query returns: the values, their intervals and n."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

import analysis
from analysis.figures import MODULES, style
from analysis.runs import Runs, open_runs
from analysis.trace import InputError
from tests.analysis.conftest import write_failed
from tests.analysis.synthetic import NOTHING, write_run

mpl.use("Agg")


@pytest.fixture
def ax():
    return Figure().subplots()


@pytest.mark.parametrize("stem", MODULES)
def test_figure_labels_its_axes_and_states_n_and_interval(study: Runs, ax, stem: str):
    drawn = getattr(analysis.figures, stem)(study, ax=ax)
    assert drawn is ax
    assert ax.get_xlabel()
    assert "95 % interval" in ax.get_title(loc="left")
    assert any(character.isdigit() for character in ax.get_title(loc="left").replace("95 %", ""))


def test_figure_makes_its_own_axes(tiny: Runs):
    import matplotlib.pyplot as plt

    assert tuple(analysis.figures.stage_dynamics(tiny).figure.get_size_inches()) == style.SIZE
    plt.close("all")


def test_stage_dynamics_draws_the_recorded_series(tiny: Runs, ax):
    frame = tiny.query("stage_dynamics")
    analysis.figures.stage_dynamics(tiny, ax=ax)
    line = ax.get_lines()[0]
    np.testing.assert_allclose(line.get_ydata(), frame["entropy_token_mean"])
    assert "24 steps in 1 run" in ax.get_title(loc="left")
    assert [text.get_text().strip() for text in ax.texts] == ["rising", "plateau"]


def test_sign_figure_writes_the_fall_out(tiny: Runs, ax):
    # Shares stay at one half; negative 3 -> 1, positive 1.5 -> 1.
    legend = analysis.figures.entropy_by_sample_sign(tiny, ax=ax).get_legend()
    assert legend is not None
    assert "1.25 nats:\nwithin negative 1.00, positive 0.25, shares 0.00" in legend.get_title().get_text()


def test_defects_that_never_occur_are_not_drawn(tiny: Runs, ax):
    labels = [line.get_label() for line in analysis.figures.defects_over_steps(tiny, ax=ax).get_lines()]
    assert [label for label in labels if not str(label).startswith("_")] == [
        "any defect",
        "format violation",
        "truncated",
    ]


def test_run_without_boundary_says_so(tmp_path: Path, ax):
    runs = open_runs(write_run(tmp_path / "run", planted=NOTHING))
    analysis.figures.stage_dynamics(runs, ax=ax)
    assert "no stage boundary found" in [text.get_text() for text in ax.texts]


def test_every_arm_is_in_the_ablation(study: Runs, ax):
    legend = analysis.figures.ablation_curves(study, ax=ax).get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["none", "ppl"]


def test_what_a_figure_needs_is_named_with_the_way_to_get_it(tmp_path: Path, ax):
    runs = open_runs(write_run(tmp_path / "run", steps=4))
    with pytest.raises(InputError, match="movement_by_entropy: no after-update values were recorded; train with"):
        analysis.figures.movement_by_entropy(runs, ax=ax)


def test_nothing_to_draw_is_said_in_one_line(tmp_path: Path, ax):
    with pytest.raises(InputError, match="entropy_by_position: no token is durable yet"):
        analysis.figures.entropy_by_position(open_runs(write_failed(tmp_path / "broken")), ax=ax)
