import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from entrace.trainer.kernels import attention
from entrace.trainer.sampling import decoder
from entrace.trainer.sampling.decoder import Decoder
from entrace.trainer.sampling.sampler import sample
from entrace.trainer.sampling.samples import SamplingParams
from tests.trainer.test_policy import ARCHITECTURES, load, write_model

# Layers that look back a limited way, or a mask of another shape.
NOT_RECORDED = {"mistral-sliding", "gemma3-sliding", "bloom-alibi"}


def largest_difference(policy, seed, steps=5, **way):
    """Between sequences that branch when read in one way and as it is, of several numbers and lengths."""
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


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_what_was_recorded_reads_any_sequences_under_any_weights(tmp_path, name):
    policy = load(write_model(tmp_path, *ARCHITECTURES[name]))
    assert (policy.step_graph is None) == (name in NOT_RECORDED)
    assert largest_difference(policy, 0, graph=policy.step_graph) < 1e-5
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.1)
    assert largest_difference(policy, 1, graph=policy.step_graph) < 1e-5


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_reading_all_slots_up_to_all_places_changes_nothing(tmp_path, monkeypatch, name):
    """What is replayed on a GPU, without replaying; slots and places run out again and again."""
    monkeypatch.setitem(decoder.GROWTH, "cpu", 3)
    policy = load(write_model(tmp_path, *ARCHITECTURES[name]))
    if name in NOT_RECORDED:
        with pytest.raises(ValueError, match="cannot be replayed"):
            Decoder(policy, [[1, 2]], 2, replays=True)
    else:
        assert largest_difference(policy, 0, steps=8, replays=True) < 1e-5


def test_there_is_room_for_no_more_tokens_than_may_follow(policy, monkeypatch):
    monkeypatch.setitem(decoder.GROWTH, "cpu", 16)
    rooms = []
    grow = Decoder._grow

    def counted(self, count):
        grow(self, count)
        rooms.append(self._mask.shape[1])

    monkeypatch.setattr(Decoder, "_grow", counted)
    few = Decoder(policy, [[1, 2, 3], [4]], 4, max_tokens=20)
    for _ in range(20):
        few.append(torch.tensor([5, 6]), torch.tensor([0, 1]))
    assert rooms == [19, 23]


def test_recording_says_nothing():
    """In a process of its own: some warnings are given once."""
    load_one = "from trainer.config import PolicyConfig as C; from trainer.policy import Policy as P; p = P.load(C())"
    code = f"{load_one}; assert p.device.type != 'cpu' or p.step_graph"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr == ""


def test_long_sequences_are_read_without(policy, monkeypatch):
    monkeypatch.setattr(attention, "MAX_KEYS", 10)
    lengths, graph = [], policy.step_graph

    def counted(*arguments):
        lengths.append(arguments[2].shape[-1])
        return graph(*arguments)

    policy.step_graph = counted
    sample(policy, [[5, 6], [7]], 2, SamplingParams(20), np.random.default_rng(0))
    assert max(lengths) == 10


def test_a_model_that_decides_by_values_is_not_recorded(tmp_path, monkeypatch):
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: forward(self, x) if x.isfinite().all() else x)
    policy = load(write_model(tmp_path, *ARCHITECTURES["llama"]))
    assert policy.step_graph is None
    assert sample(policy, [[5, 6]], 2, SamplingParams(4), np.random.default_rng(0)).lengths.min() > 0


def test_what_was_recorded_is_tried(tmp_path, monkeypatch):
    folder = write_model(tmp_path, *ARCHITECTURES["llama"])
    assert load(folder).step_graph is not None
    monkeypatch.setattr(Decoder, "record_step", lambda self: lambda ids, *arguments: torch.zeros(len(ids), 32))
    assert load(folder).step_graph is None


@pytest.mark.parametrize("values", [{"dtype": "bfloat16"}, {"attention": "sdpa"}, {"attention": "eager"}])
def test_other_arithmetic_is_not_recorded(tmp_path, values):
    assert load(write_model(tmp_path, *ARCHITECTURES["llama"]), **values).step_graph is None
