"""Test that the benchmarks run at toy size, without their comparisons.

Speed is not tested.
"""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.benchmarks import bench, bench_gpu
from tests.benchmarks.measurements import AT_LEAST, AT_MOST, Measurement, to_markdown


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


def test_a_target_applies_to_the_median():
    found = Measurement.of("part", "name", "ratio", [1.0, 5.0, 2.0], AT_MOST, 2)
    assert (found.low, found.median, found.high, found.is_met) == (1.5, 2.0, 3.5, True)
    assert Measurement.of("part", "name", "ratio", [1.0, 5.0, 2.0], AT_LEAST, 2.1).is_met is False
    assert Measurement.of("part", "name", "ratio", [1.0]).is_met is None
    missed = Measurement.of("part", "slow", "ratio", [3.0], AT_MOST, 2)
    assert "| slow | 3 | 3 to 3 | ratio | at most 2 | **missed** |" in to_markdown([found, missed])


@pytest.mark.slow
def test_the_benchmarks_write_their_report(tmp_path, monkeypatch):
    run(bench, monkeypatch, "--quick", "--out", tmp_path / "report")
    measurements = json.loads((tmp_path / "report.json").read_text())["measurements"]
    assert len({measurement["part"] for measurement in measurements}) == 4
    assert all(measurement["median"] > 0 for measurement in measurements)
    assert all(measurement["name"] in (tmp_path / "report.md").read_text() for measurement in measurements)


def test_the_benchmark_of_a_gpu_runs_without_one(tmp_path, monkeypatch):
    run(bench_gpu, monkeypatch, "--quick", "--device", "cpu", "--out", tmp_path / "gpu")
    measurements = json.loads((tmp_path / "gpu.json").read_text())["measurements"]
    units = [measurement["unit"] for measurement in measurements]
    phases = [measurement["median"] for measurement in measurements if measurement["unit"] == "share of a step"]
    assert len(phases) == 8
    assert 0.5 < sum(phases) / 2 <= 1
    assert (units.count("share of the limit"), units.count("share of throughput")) == (4, 2)
    assert all(measurement["median"] > 0 for measurement in measurements)


def test_a_part_of_the_benchmark_of_a_gpu_is_profiled_alone(tmp_path, monkeypatch):
    out = tmp_path / "gpu"
    run(bench_gpu, monkeypatch, "--quick", "--device", "cpu", "--part", "decoding", "--profile", "--out", out)
    measurements = json.loads((tmp_path / "gpu_decoding.json").read_text())["measurements"]
    assert {measurement["part"].partition(",")[0] for measurement in measurements} == {"Decoding"}
    assert "aten::" in (tmp_path / "gpu_decoding.profile.txt").read_text()


def test_the_limit_of_decoding_reads_weights_keys_and_values_once():
    """As stated for the shape of SmolLM2-135M: 1.59 GB per token of 256 sequences."""
    sizes = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    config = LlamaConfig(**sizes, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
    with torch.device("meta"):
        policy = SimpleNamespace(model=LlamaForCausalLM(config), dtype=torch.bfloat16)
    found = bench_gpu.bytes_per_token(policy, 256, 224)
    assert found == 2 * 134_515_008 + 2 * 256 * 224 * 30 * 2 * 3 * 64
    assert round(found / 1e9, 2) == 1.59


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_benchmark_of_a_gpu_refuses_to_run_without_one(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run(bench_gpu, monkeypatch, "--out", tmp_path / "gpu")
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
