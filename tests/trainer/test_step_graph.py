import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from entrace.trainer.kernels import attention
from entrace.trainer.sampling import backend, decoder
from entrace.trainer.sampling.backend import CUDA_GRAPH, FAST_PATHS, NORMS, ON, PACKING, TRACED_STEP, backend_of
from entrace.trainer.sampling.decoder import Decoder
from entrace.trainer.sampling.sampler import sample
from entrace.trainer.sampling.samples import SamplingParams
from tests.slow import slow_after
from tests.trainer.test_policy import ARCHITECTURES, load, write_model

# Sliding windows, or a mask of another shape.
NOT_TRACED = {"mistral-sliding", "gemma3-sliding", "bloom-alibi"}


def largest_difference(policy, seed, steps=5, **way):
    """Return the largest difference between decoding in one way and plainly.

    Sequences branch.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, size=1):
        return torch.randint(low, high, (size,), generator=generator)

    found = []
    for _ in range(4):
        prompts = [draw(0, policy.vocab_size, int(draw(1, 9))).tolist() for _ in range(int(draw(1, 12)))]
        decoders = [Decoder(policy, prompts, 20, **way), Decoder(policy, prompts, 20)]
        for _ in range(steps):
            count = int(draw(1, 20))
            tokens, parents = draw(0, policy.vocab_size, count), draw(0, len(decoders[0].hidden), count).sort().values
            for one in decoders:
                one.append(tokens, parents)
            found.append((decoders[0].hidden - decoders[1].hidden).abs().max())
    return float(torch.stack(found).max())


@pytest.mark.parametrize("name", slow_after(6, sorted(ARCHITECTURES)))
def test_a_trace_holds_for_any_sequences_and_weights(tmp_path, name):
    policy = load(write_model(tmp_path, *ARCHITECTURES[name]))
    graph = backend_of(policy).step_graph
    assert (graph is None) == (name in NOT_TRACED)
    assert largest_difference(policy, 0, graph=graph) < 1e-5
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.1)
    assert largest_difference(policy, 1, graph=graph) < 1e-5


@pytest.mark.parametrize("name", slow_after(6, sorted(ARCHITECTURES)))
def test_steps_of_fixed_shape_change_nothing(tmp_path, monkeypatch, name):
    """Test the step that a GPU captures, without capture.

    Slots and positions run out repeatedly.
    """
    monkeypatch.setitem(decoder.GROWTH, "cpu", 3)
    policy = load(write_model(tmp_path, *ARCHITECTURES[name]))
    if name in NOT_TRACED:
        with pytest.raises(ValueError, match="needs a plain KV cache"):
            Decoder(policy, [[1, 2]], 2, uses_cuda_graph=True)
    else:
        assert largest_difference(policy, 0, steps=8, uses_cuda_graph=True) < 1e-5


def test_the_cache_grows_no_further_than_the_length_limit(policy, monkeypatch):
    monkeypatch.setitem(decoder.GROWTH, "cpu", 16)
    widths = []
    grow = Decoder._grow

    def counted(self, count):
        grow(self, count)
        widths.append(self._mask.shape[1])

    monkeypatch.setattr(Decoder, "_grow", counted)
    few = Decoder(policy, [[1, 2, 3], [4]], 4, max_tokens=20)
    for _ in range(20):
        few.append(torch.tensor([5, 6]), torch.tensor([0, 1]))
    assert widths == [19, 23]


@pytest.mark.slow
def test_tracing_prints_nothing():
    """Run in a new process, since some warnings are given once per process."""
    code = (
        "from entrace.trainer.config import PolicyConfig\n"
        "from entrace.trainer.model.policy import Policy\n"
        "from entrace.trainer.sampling.backend import backend_of\n"
        "policy = Policy.load(PolicyConfig(device='cpu'))\n"
        "assert backend_of(policy).step_graph"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr == ""


def test_long_sequences_do_not_use_the_trace(policy, monkeypatch):
    monkeypatch.setattr(attention, "MAX_KEYS", 10)
    selected, lengths = backend_of(policy), []

    def counted(*arguments):
        lengths.append(arguments[2].shape[-1])
        return selected.step_graph(*arguments)

    monkeypatch.setitem(backend._BACKENDS, policy, replace(selected, step_graph=counted))
    sample(policy, [[5, 6], [7]], 2, SamplingParams(20), np.random.default_rng(0))
    assert max(lengths) == 10


def test_control_flow_that_depends_on_values_prevents_tracing(tmp_path, monkeypatch):
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: forward(self, x) if x.isfinite().all() else x)
    policy = load(write_model(tmp_path, *ARCHITECTURES["llama"]))
    assert backend_of(policy).step_graph is None
    assert "Converting a tensor to a Python boolean" in backend_of(policy).fast_paths[TRACED_STEP]
    assert sample(policy, [[5, 6]], 2, SamplingParams(4), np.random.default_rng(0)).lengths.min() > 0


def test_a_trace_is_verified_before_use(tmp_path, monkeypatch):
    folder = write_model(tmp_path, *ARCHITECTURES["llama"])
    assert backend_of(load(folder)).step_graph is not None
    monkeypatch.setattr(Decoder, "trace_step", lambda self: lambda ids, *arguments: torch.zeros(len(ids), 32))
    rejected = backend_of(load(folder))
    assert rejected.step_graph is None
    assert rejected.fast_paths[TRACED_STEP] == "results differ from those of the plain model"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"dtype": "bfloat16"}, "only on a CPU in float32"),
        ({"attention": "sdpa"}, "needs packed attention, a plain KV cache, and position_ids"),
        ({"attention": "eager"}, "needs packed attention, a plain KV cache, and position_ids"),
    ],
)
def test_other_arithmetic_is_not_traced(tmp_path, values, reason):
    found = backend_of(load(write_model(tmp_path, *ARCHITECTURES["llama"]), **values))
    assert (found.step_graph, found.fast_paths[TRACED_STEP]) == (None, reason)


def test_every_fast_path_is_on_or_has_a_reason(policy, tmp_path, caplog):
    caplog.set_level("INFO", logger="entrace")
    found = backend_of(policy).fast_paths
    assert tuple(found) == FAST_PATHS
    assert [found[name] for name in (PACKING, NORMS, TRACED_STEP)] == [ON] * 3
    assert found[CUDA_GRAPH] == "no CUDA device"
    assert backend_of(policy).fast_paths is found
    assert [record.message for record in caplog.records if "fast paths" in record.message] == [
        "fast paths: " + "; ".join(f"{name}: {state}" for name, state in found.items())
    ]
    plain = backend_of(load(write_model(tmp_path, *ARCHITECTURES["gpt2"]))).fast_paths
    assert plain[NORMS] == "the model has no RMSNorm layers with variance_epsilon"
    sharded = backend_of(policy).for_sharded()
    assert (sharded.step_graph, sharded.fast_paths[TRACED_STEP]) == (None, "off for sharded weights")
    assert sharded.fast_paths[CUDA_GRAPH] == "no CUDA device"
