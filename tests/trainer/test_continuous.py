"""Continuous batching against the cache, and against a teacher-forced pass that knows nothing of either."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM

from analysis.trace import InputError
from trainer import continuous, rollout
from trainer.config import LoraConfig, PolicyConfig, RolloutConfig
from trainer.policy import Policy
from trainer.rollout import SamplingParams, check_engine, sample
from trainer.token_stats import WHOLE, Truncation

STATS = ("logprob", "entropy", "sum_p2")
ENGINE = "rollout.engine=continuous"


@pytest.fixture
def prompts(policy, task):
    encoded = [policy.encode_prompt(prompt.text) for prompt in task.heldout]
    assert len({len(prompt) for prompt in encoded}) > 1
    return encoded


def flat(samples, name):
    return getattr(samples.stats, name)[samples.response_mask]


def sample_continuously(policy, prompts, num_samples, seed=0, **params):
    params = SamplingParams(**{"max_tokens": 30, "engine": "continuous", **params})
    return sample(policy, prompts, num_samples, params, np.random.default_rng(seed))


def assert_same_responses(found, wanted):
    assert torch.equal(found.response_mask, wanted.response_mask)
    assert torch.equal(found.tokens[found.response_mask], wanted.tokens[wanted.response_mask])
    assert torch.equal(found.is_truncated, wanted.is_truncated)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("truncation", [WHOLE, Truncation(top_p=0.8), Truncation(top_k=3), Truncation(0.8, 5)])
def test_recorded_values_equal_a_teacher_forced_pass(policy, prompts, temperature, truncation):
    samples = sample_continuously(policy, prompts, 3, temperature=temperature, truncation=truncation)
    scored = policy.score(samples.prompts, samples.responses(), temperature, truncation)
    for name in STATS:
        torch.testing.assert_close(flat(samples, name), getattr(scored, name), rtol=1e-4, atol=2e-5)
    hidden, _, index = policy.read(samples.prompts, samples.responses())
    norms = hidden.norm(dim=-1)[index]
    torch.testing.assert_close(samples.hidden_norm[samples.response_mask], norms, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [5, 64])
def test_both_engines_draw_the_same_responses(policy, prompts, rows, monkeypatch):
    """Stop texts, stop tokens and limits, more responses than fit at once, prompts read in pieces."""
    monkeypatch.setattr(continuous, "MAX_ROWS", rows)
    monkeypatch.setattr(continuous, "MAX_BATCH_TOKENS", max(rows, 7))
    numbers = np.random.default_rng(3).random((8 * len(prompts), 40), dtype=np.float32)
    params, limits = SamplingParams(40, 0.9, Truncation(0.95, 50), ("so ", "= 1")), [40, 1, 7, 30, 12, 2]
    wanted, found = (engine.sample_at(policy, prompts, numbers, limits, params) for engine in (rollout, continuous))
    assert_same_responses(found, wanted)
    mask = wanted.response_mask
    for name in STATS:
        torch.testing.assert_close(flat(found, name), flat(wanted, name), rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(found.hidden_norm[mask], wanted.hidden_norm[mask], rtol=1e-4, atol=1e-5)
    texts = policy.decode([response.tolist() for response in found.responses()])
    assert all(any(stop in text for text in texts) for stop in params.stop), "a text ended no response"
    assert any(torch.isin(response[-1], policy.stop_ids) for response in found.responses())


def test_a_cache_that_is_small_changes_nothing_but_time(policy, prompts):
    wide, narrow = (sample_continuously(policy, prompts, 4, cache_tokens=tokens) for tokens in (10**6, 1))
    assert_same_responses(narrow, wide)


def test_responses_that_lose_their_pages_begin_again_where_they_were(policy, prompts, monkeypatch):
    """What the scheduler takes from one response for another, too few pages being there, is no new random number."""
    wanted = sample_continuously(policy, prompts, 4)
    original = continuous.ContinuousBatchingConfig
    taken = []
    monkeypatch.setattr(continuous, "ContinuousBatchingConfig", lambda **keys: original(**{**keys, "num_blocks": 12}))
    request = continuous.RequestState.create_equivalent_initial_request
    monkeypatch.setattr(
        continuous.RequestState, "create_equivalent_initial_request", lambda self: taken.append(1) or request(self)
    )
    assert_same_responses(sample_continuously(policy, prompts, 4), wanted)
    assert taken


def test_tokens_are_drawn_with_the_probabilities_recorded(policy, prompts):
    count = 2000
    draws = sample_continuously(policy, prompts[:1], count, max_tokens=1, seed=4)
    tokens, recorded = draws.tokens[:, 0], draws.stats.logprob[:, 0].exp()
    chi2, likely = 0.0, 0
    for token in tokens.unique():
        p = float(recorded[tokens == token].mean())
        if p * count >= 10:
            chi2 += (int((tokens == token).sum()) - p * count) ** 2 / (p * count)
            likely += 1
    assert likely > 3
    assert chi2 < 3 * likely + 20


def test_equal_seeds_give_equal_samples_and_leave_no_trace(policy, prompts):
    attention, state = policy.model.config._attn_implementation, torch.get_rng_state()
    first, second = (sample_continuously(policy, prompts, 4) for _ in range(2))
    assert policy.model.config._attn_implementation == attention != "sdpa"
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.tokens, second.tokens)
    for name in STATS:
        assert torch.equal(getattr(first.stats, name), getattr(second.stats, name))


def test_attention_is_restored_after_a_failure(policy, prompts, monkeypatch):
    attention = policy.model.config._attn_implementation
    monkeypatch.setattr(policy.model.base_model, "forward", lambda **inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample_continuously(policy, prompts, 1)
    assert policy.model.config._attn_implementation == attention


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_arithmetic_in_16_bits_records_the_distribution_it_samples_from(prompts, dtype):
    policy = Policy.load(PolicyConfig(device="cpu", dtype=dtype))
    samples = sample_continuously(policy, prompts, 4)
    exact = replace(policy, dtype=torch.float32).score(samples.prompts, samples.responses(), 1.0)
    entropy = flat(samples, "entropy")
    assert entropy.dtype == torch.float32
    assert not torch.equal(entropy, exact.entropy)
    assert (entropy - exact.entropy).abs().mean() < 0.02
    assert (flat(samples, "logprob") - exact.logprob).abs().mean() < 0.05


@pytest.mark.parametrize("config", [{"attention": "eager"}, {"lora": LoraConfig(r=4)}])
def test_other_ways_to_load_a_policy(prompts, config):
    policy = Policy.load(PolicyConfig(device="cpu", **config))
    if policy.adapter:
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    continuous.check(policy)
    samples = sample_continuously(policy, prompts, 2)
    scored = policy.score(samples.prompts, samples.responses(), 1.0)
    torch.testing.assert_close(flat(samples, "logprob"), scored.logprob, rtol=1e-4, atol=2e-5)


def test_layers_that_look_back_a_limited_way(policy, prompts):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=4,
        initializer_range=0.5,
    )
    other = replace(policy, model=MistralForCausalLM(config).eval(), packs=False)
    continuous.check(other)
    samples = sample_continuously(other, prompts, 2)
    scored = other.score(samples.prompts, samples.responses(), 1.0)
    torch.testing.assert_close(flat(samples, "logprob"), scored.logprob, rtol=1e-3, atol=1e-3)


def test_a_model_whose_attention_cannot_read_pages_is_refused_in_one_line(policy):
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=512, hidden_size=32, n_layer=2, n_head=2, initializer_range=0.5)
    other = replace(policy, model=BloomForCausalLM(config).eval(), packs=False)
    with pytest.raises(InputError, match=r'^rollout\.engine = "continuous": BloomForCausalLM cannot be sampled[^\n]*$'):
        check_engine(other, RolloutConfig(engine="continuous"))


def test_a_run_leaves_the_trace_that_it_leaves_with_the_cache(call, tmp_path):
    small = ("steps=2", "task.num_heldout=6", "rollout.prompts_per_step=6", "rollout.group_size=4", "eval.samples=2")
    every = ("record.flush_every=1", "record.checkpoint_every=2", "policy.device=cpu")
    for name, engine in (("paged", [ENGINE]), ("cached", [])):
        assert call("train", "tiny", *small, *every, *engine, "--out", tmp_path / name)[0] == 0
    paged, cached = (
        pl.read_parquet(tmp_path / name / "tokens").sort("rollout_id", "position") for name in ("paged", "cached")
    )
    assert paged["token_id"].to_list() == cached["token_id"].to_list()
    assert np.allclose(paged["entropy"], cached["entropy"], atol=1e-4)
