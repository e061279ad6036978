"""That the benchmarks run, at toy size, without what they compare with; not how fast."""

import json
import sys

import pytest
import torch

from tests.benchmarks import bench, bench_gpu
from tests.benchmarks.figures import AT_LEAST, AT_MOST, Figure, to_markdown


@pytest.fixture(autouse=True)
def one_thread():
    """Work this small waits for the other threads more than it computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


def test_a_figure_is_held_against_its_target_by_its_median():
    found = Figure.of("part", "name", "ratio", [1.0, 5.0, 2.0], AT_MOST, 2)
    assert (found.low, found.median, found.high, found.is_met) == (1.5, 2.0, 3.5, True)
    assert Figure.of("part", "name", "ratio", [1.0, 5.0, 2.0], AT_LEAST, 2.1).is_met is False
    assert Figure.of("part", "name", "ratio", [1.0]).is_met is None
    missed = Figure.of("part", "slow", "ratio", [3.0], AT_MOST, 2)
    assert "| slow | 3 | 3 to 3 | ratio | at most 2 | **missed** |" in to_markdown([found, missed])


def test_the_benchmarks_write_their_report(tmp_path, monkeypatch):
    run(bench, monkeypatch, "--quick", "--out", tmp_path / "report")
    figures = json.loads((tmp_path / "report.json").read_text())["figures"]
    assert len({figure["part"] for figure in figures}) == 4
    assert all(figure["median"] > 0 for figure in figures)
    assert all(figure["name"] in (tmp_path / "report.md").read_text() for figure in figures)


def test_the_benchmark_of_a_gpu_runs_without_one(tmp_path, monkeypatch):
    run(bench_gpu, monkeypatch, "--quick", "--device", "cpu", "--out", tmp_path / "gpu")
    figures = json.loads((tmp_path / "gpu.json").read_text())["figures"]
    phases = [figure["median"] for figure in figures if figure["unit"] == "share of a step"]
    assert len(phases) == 8
    assert 0.5 < sum(phases) / 2 <= 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_benchmark_of_a_gpu_refuses_to_run_without_one(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run(bench_gpu, monkeypatch, "--out", tmp_path / "gpu")
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
