"""Test the engines that sample.

vLLM needs a GPU, so ``tests.trainer.vllm_standin`` replaces it.
"""

import gc
import sys
import weakref

import numpy as np
import pytest
import torch

from entrace.analysis.trace import InputError
from entrace.trainer.config import LoraConfig, PolicyConfig, RolloutConfig, load_config
from entrace.trainer.kernels.token_stats import WHOLE, Truncation
from entrace.trainer.model.policy import Policy
from entrace.trainer.preflight import check_run
from entrace.trainer.sampling.engine import NativeSampler, sampler_of
from entrace.trainer.sampling.sampler import sample
from entrace.trainer.sampling.samples import SamplingParams
from entrace.trainer.sampling.vllm_engine import whole_weights
from entrace.trainer.train import train
from tests.trainer import vllm_standin

from .conftest import SHORT, table
from .test_policy import ARCHITECTURES, load, write_model

VLLM = RolloutConfig(engine="vllm")


@pytest.fixture
def standin(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", vllm_standin)
    monkeypatch.setattr(vllm_standin, "LLMS", [])
    return vllm_standin


@pytest.fixture
def small(tmp_path):
    return load(write_model(tmp_path, *ARCHITECTURES["llama"]))


def change(policy):
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.2)


@pytest.mark.parametrize("truncation", [WHOLE, Truncation(top_k=5)], ids=str)
def test_samples_of_vllm_are_scored_by_the_policy(standin, small, truncation):
    """The engine reports the distribution that it sampled from.

    The test compares before and after the weights change.
    """
    sampler, prompts = sampler_of(small, VLLM), [[5, 6, 7], [8], [9, 10]]
    params = SamplingParams(6, 0.7, truncation)
    drawn = []
    for _ in range(2):
        drawn.append(sampler.sample(prompts, 3, params, np.random.default_rng(0), slice(1, 3)))
        rollouts = drawn[-1]
        assert rollouts.prompt_ids == [[8]] * 3 + [[9, 10]] * 3
        mask = rollouts.response_mask
        scored = small.token_stats(rollouts.prompt_ids, rollouts.responses(), 0.7, truncation)
        torch.testing.assert_close(rollouts.sampling_logprob[mask], scored.logprob, rtol=1e-4, atol=1e-4)
        for name, values in vars(scored).items():
            torch.testing.assert_close(getattr(rollouts.stats, name)[mask], values, rtol=1e-4, atol=1e-5)
        first = small.hidden_states(torch.tensor([[8]]), use_cache=False)[0, -1]
        torch.testing.assert_close(rollouts.hidden_norm[:3, 0], first.norm().expand(3), rtol=1e-4, atol=1e-4)
        change(small)
    assert not torch.equal(drawn[0].response_ids, drawn[1].response_ids)
    assert standin.LLMS[0].calls == ["apply_model", "reset_prefix_cache", "generate"] * 2
    assert sampler_of(small, VLLM) is sampler


def test_responses_of_vllm_end_as_those_of_the_trainer(standin):
    policy = Policy.load(PolicyConfig(device="cpu"))
    prompts = [policy.encode_prompt(text) for text in ("1 + 2 =", "12 + 3 - 4 =")]
    stop = ("= 1", "so ")
    rollouts = sampler_of(policy, VLLM).sample(prompts, 8, SamplingParams(20, stop=stop), np.random.default_rng(0))
    ends = set()
    for row, response in enumerate(rollouts.responses()):
        texts = policy.decode([response[: n + 1].tolist() for n in range(len(response))])
        complete = [any(text in beginning for text in stop) for beginning in texts]
        is_stop = torch.isin(response, policy.stop_ids)
        assert not any(complete[:-1])
        assert not is_stop[:-1].any()
        assert rollouts.is_truncated[row] == (not complete[-1] and not is_stop[-1])
        ends.add((complete[-1], bool(is_stop[-1])))
    assert len(ends) > 1
    again = sampler_of(policy, VLLM).sample(prompts, 8, SamplingParams(20, stop=stop), np.random.default_rng(0))
    assert torch.equal(again.response_ids, rollouts.response_ids)


def test_adapters_are_handed_over_merged(standin, tmp_path):
    pytest.importorskip("peft")
    folder = write_model(tmp_path, *ARCHITECTURES["qwen2"])
    policy = load(folder, lora=LoraConfig(r=2))
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    assert [name for name, _ in whole_weights(policy.model)] == [n for n, _ in load(folder).model.named_parameters()]
    rollouts = sampler_of(policy, VLLM).sample([[5, 6]], 3, SamplingParams(5), np.random.default_rng(0))
    mask = rollouts.response_mask
    torch.testing.assert_close(rollouts.sampling_logprob[mask], rollouts.old_logprobs[mask], rtol=1e-4, atol=1e-4)


def test_a_run_with_vllm_records_both_logprobs(standin, tmp_path):
    few = ["steps=2", "task.num_heldout=2", "rollout.prompts_per_step=2", "rollout.max_response_tokens=16"]
    train(load_config("tiny", [*SHORT, *few, "rollout.engine=vllm"]), tmp_path / "run", {})
    tokens = table(tmp_path / "run", "tokens")
    assert tokens["sampling_logprob"].null_count() == 0
    difference = (tokens["sampling_logprob"] - tokens["logprob"]).abs()
    assert difference.max() < 1e-3
    assert standin.LLMS[0].calls.count("generate") >= 4


def test_the_native_engine_is_the_default(small):
    sampler = sampler_of(small, RolloutConfig())
    assert isinstance(sampler, NativeSampler)
    arguments = ([[5, 6], [7]], 2, SamplingParams(4))
    found = sampler.sample(*arguments, np.random.default_rng(0))
    assert torch.equal(found.response_ids, sample(small, *arguments, np.random.default_rng(0)).response_ids)
    assert found.sampling_logprob is None


def test_missing_vllm_is_one_line(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match=r'rollout\.engine = "vllm" needs vLLM: pip install .vllm') as refused:
        sampler_of(small, VLLM)
    assert "\n" not in str(refused.value)


def test_missing_vllm_leaves_no_run_folder(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vllm", None)
    config = load_config("tiny", [*SHORT, "rollout.engine=vllm"])
    assert any("needs vLLM" in problem for problem in check_run(config).problems)
    with pytest.raises(InputError, match="needs vLLM"):
        train(config, tmp_path / "run", {})
    assert not (tmp_path / "run").exists()


def test_an_engine_does_not_keep_its_policy(standin, small):
    sampler_of(small, VLLM).sample([[5]], 1, SamplingParams(2), np.random.default_rng(0))
    policy = load(small.name)
    sampler_of(policy, VLLM)
    found = weakref.ref(policy)
    del policy
    gc.collect()
    assert found() is None


def test_the_old_name_of_the_native_engine_is_accepted():
    assert load_config("tiny", ["rollout.engine=cache"]).rollout.engine == "native"
