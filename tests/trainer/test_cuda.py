"""What only a GPU runs, against the same on a CPU or without it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from entrace.trainer.config import PolicyConfig
from entrace.trainer.kernels import token_stats
from entrace.trainer.kernels.token_stats import LMHead, Truncation, compute_stats, compute_token_stats
from entrace.trainer.model.policy import Policy
from entrace.trainer.sampling.cuda_graph import Replay
from entrace.trainer.sampling.sampler import sample
from entrace.trainer.sampling.samples import SamplingParams

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(scope="module")
def policy():
    return Policy.load(PolicyConfig(device="cuda", dtype="float32"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gap", [0, 5, 15, 30])
def test_statistics_of_logits(dtype, gap):
    logits = torch.randn(20, 50_000, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, 7] = logits.logsumexp(1) + gap
    logits, targets = logits.to(dtype), torch.arange(20) // 10 * 7 + 7
    expected = compute_stats(logits.float(), targets, 0.8)
    found = compute_stats(logits.cuda(), targets.cuda(), 0.8)
    for name, values in vars(expected).items():
        torch.testing.assert_close(getattr(found, name).cpu(), values, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(getattr(found, name)[:10].cpu(), values[:10], rtol=1e-5, atol=0)


@pytest.mark.parametrize("truncation", [Truncation(), Truncation(0.9), Truncation(0.8, 50)], ids=str)
def test_both_passes_from_hidden_states(truncation, monkeypatch):
    monkeypatch.setitem(token_stats.BLOCK, "cuda", (50, 1000))
    generator = torch.Generator().manual_seed(0)
    case = [torch.randn(*shape, generator=generator) for shape in ((130, 8), (3333, 8), (3333,))]
    targets = torch.randint(3333, (130,), generator=generator)
    weights = torch.randn(2, 130, generator=generator)
    results = []
    for device in ("cpu", "cuda"):
        leaves = [x.to(device, copy=True).requires_grad_() for x in case]
        stats = compute_token_stats(leaves[0], LMHead(*leaves[1:]), targets.to(device), 0.9, truncation)
        a, b = weights.to(device)
        (a * stats.logprob + b * stats.entropy).sum().backward()
        results.append([x.cpu() for x in (*vars(stats).values(), *(leaf.grad for leaf in leaves))])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_work_is_recorded_once_and_replayed_on_what_its_memory_holds():
    calls, x = [], torch.zeros(3, device="cuda")

    def work():
        calls.append(None)
        return x * 2 + 1

    replay = Replay()
    for value in range(4):
        x.fill_(value)
        assert replay(work).tolist() == [2 * value + 1] * 3
    assert len(calls) == 2


@pytest.mark.parametrize("limit", [20, 200])
def test_replayed_sampling_draws_what_the_other_draws(policy, limit):
    assert policy.replays
    prompts = [policy.encode_prompt(text) for text in ("1 + 2 =", "12 + 3 - 4 =", "7 =")]
    drawn = []
    for replays in (True, False):
        policy.replays = replays
        drawn.append(sample(policy, prompts, 40, SamplingParams(limit, 1.2), np.random.default_rng(0)))
    policy.replays = True
    found, expected = drawn
    is_same = (found.tokens == expected.tokens).all(1)
    # Where a random number lies on the border of two tokens, rounding decides.
    assert is_same.float().mean() > 0.95
    mask = expected.response_mask & is_same[:, None]
    torch.testing.assert_close(found.stats.entropy[mask], expected.stats.entropy[mask], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("attention", ["auto", "packed"])
def test_what_is_recorded_is_what_a_pass_over_the_whole_text_gives(dtype, attention):
    policy = Policy.load(PolicyConfig(device="cuda", dtype=dtype, attention=attention))
    assert policy.uses_packing == (attention == "packed")
    prompts = [policy.encode_prompt(text) for text in ("1 + 2 =", "12 + 3 - 4 =", "7 =")]
    samples = sample(policy, prompts, 20, SamplingParams(60), np.random.default_rng(0))
    with torch.no_grad():
        scored = policy.token_stats(samples.prompt_ids, samples.responses(), 1.0)
    mask = samples.response_mask
    tolerance = 1e-3 if dtype == "float32" else 0.3
    for name in ("logprob", "entropy"):
        difference = (getattr(samples.stats, name)[mask] - getattr(scored, name).cpu()).abs()
        assert difference.max() < tolerance
        assert difference.mean() < tolerance / 10


def test_the_trial_is_for_what_can_be_replayed(policy):
    assert policy.replays
    assert not replace(policy, device=torch.device("cpu")).replays
