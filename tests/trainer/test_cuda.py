"""Compare code that only a GPU runs with a CPU, or with the same GPU without it."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from entrace.trainer.config import PolicyConfig
from entrace.trainer.kernels import blocked_stats
from entrace.trainer.kernels.blocked_stats import compute_token_stats
from entrace.trainer.kernels.decoding import LayerCache, Rows, attend
from entrace.trainer.kernels.token_stats import LMHead, Truncation
from entrace.trainer.model.policy import Policy
from entrace.trainer.sampling import backend, batched
from entrace.trainer.sampling.backend import BATCHED, COMPILED, CUDA_GRAPH, ON, PACKING, TRITON, backend_of
from entrace.trainer.sampling.batched import BatchedSampler
from entrace.trainer.sampling.cuda_graph import CudaGraph
from entrace.trainer.sampling.sampler import sample
from entrace.trainer.sampling.samples import SamplingParams
from tests.benchmarks.logit_stats import stats_of_logits
from tests.trainer.test_batched import random_step

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
    expected = stats_of_logits(logits.float(), targets, 0.8)
    found = stats_of_logits(logits.cuda(), targets.cuda(), 0.8)
    for name, values in vars(expected).items():
        torch.testing.assert_close(getattr(found, name).cpu(), values, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(getattr(found, name)[:10].cpu(), values[:10], rtol=1e-5, atol=0)


@pytest.mark.parametrize("truncation", [Truncation(), Truncation(0.9), Truncation(0.8, 50)], ids=str)
def test_both_passes_from_hidden_states(truncation, monkeypatch):
    monkeypatch.setitem(blocked_stats.BLOCK, "cuda", (50, 1000))
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


def test_work_is_captured_once_and_replayed_on_current_memory():
    calls, x = [], torch.zeros(3, device="cuda")

    def work():
        calls.append(None)
        return x * 2 + 1

    graph = CudaGraph()
    for value in range(4):
        x.fill_(value)
        assert graph(work).tolist() == [2 * value + 1] * 3
    assert len(calls) == 2


def assert_equal_tokens(found, expected):
    is_same = (found.response_ids == expected.response_ids).all(1)
    # If a random number falls on the border of two tokens, rounding decides.
    assert is_same.float().mean() > 0.95
    mask = expected.response_mask & is_same[:, None]
    for name in ("logprob", "entropy", "sum_p2"):
        found_values, values = (getattr(one.stats, name)[mask] for one in (found, expected))
        torch.testing.assert_close(found_values, values, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("limit", [20, 200])
@pytest.mark.parametrize(
    "options",
    [{}, {"truncation": Truncation(0.9, 20)}, {"stop": ("</answer>", "so ", "= 1")}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_every_way_to_sample_draws_the_same_tokens(policy, limit, options, monkeypatch):
    """Compare the batched sampler and the decoder with a CPU.

    Each is run with and without a CUDA graph.
    """
    selected = backend_of(policy)
    prompts = [policy.encode_prompt(text) for text in ("1 + 2 =", "12 + 3 - 4 =", "7 =")]
    params = SamplingParams(limit, 1.2, **options)

    def draw(policy):
        return sample(policy, prompts, 40, params, np.random.default_rng(0))

    expected = draw(Policy.load(PolicyConfig(device="cpu")))
    for captures in (True, False):
        sampler = BatchedSampler(policy, captures=captures, compiles=False, note=pytest.fail)
        monkeypatch.setitem(backend._BACKENDS, policy, replace(selected, batched=sampler))
        assert_equal_tokens(draw(policy), expected)
        if limit == 200:
            assert len(sampler._memory.rows) > 1, "no response left the batch early"
        decoder = replace(selected, batched=None, uses_cuda_graph=captures)
        monkeypatch.setitem(backend._BACKENDS, policy, decoder)
        assert_equal_tokens(draw(policy), expected)


def test_the_host_does_not_wait_for_each_token(policy):
    """Count synchronizations of a call, which must not grow with its tokens.

    Regular looks at the tokens are the exception.
    """
    sampler = backend_of(policy).batched
    prompts = [policy.encode_prompt("1 + 2 =")] * 2
    uniforms = np.full((8, 129), 0.5, dtype=np.float32)
    counts = []
    stop_ids, policy.stop_ids = policy.stop_ids, policy.stop_ids[:0]
    try:
        for limit in (65, 129):
            sampler.sample_at(prompts, uniforms[:, :limit], [limit] * 2, SamplingParams(limit))
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                sampler.sample_at(prompts, uniforms[:, :limit], [limit] * 2, SamplingParams(limit))
            torch.cuda.set_sync_debug_mode("default")
            counts.append(len(caught))
    finally:
        torch.cuda.set_sync_debug_mode("default")
        policy.stop_ids = stop_ids
    assert counts[1] - counts[0] <= 64 // batched.CHECK_EVERY


def test_a_batch_beyond_memory_is_divided(policy, monkeypatch):
    prompts = [policy.encode_prompt(text) for text in ("1 + 2 =", "7 =")]
    sampler = BatchedSampler(policy, captures=True, compiles=False, note=pytest.fail)
    uniforms = np.random.default_rng(0).random((40, 20), dtype=np.float32)
    arguments = (prompts, uniforms, [20] * 2, SamplingParams(20))
    expected = sampler.sample_at(*arguments)
    monkeypatch.setattr(batched, "_free_bytes", lambda device, kept: 2e6)
    counts, inner = [], BatchedSampler._sample
    monkeypatch.setattr(BatchedSampler, "_sample", lambda *a: counts.append(len(a[3])) or inner(*a))
    assert_equal_tokens(sampler.sample_at(*arguments), expected)
    assert len(counts) > 1


@pytest.mark.parametrize(("group", "width"), [(3, 64), (7, 64), (1, 24), (4, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_of_a_decoding_step(group, width, dtype):
    arguments = random_step(group, width, dtype)
    expected = attend(*arguments, 40)
    qkv, cos, sin, rows, cache, scale = arguments
    rows = Rows(*(tensor.cuda() for tensor in vars(rows).values()))
    cache = LayerCache(*(tensor.cuda() for tensor in vars(cache).values()))
    found = attend(qkv.cuda(), cos.cuda(), sin.cuda(), rows, cache, scale, 40)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found[:7].cpu(), expected[:7], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("attention", ["auto", "packed"])
def test_recorded_values_equal_a_teacher_forced_pass(dtype, attention):
    policy = Policy.load(PolicyConfig(device="cuda", dtype=dtype, attention=attention))
    if attention == "packed":
        assert policy.uses_packing
    prompts = [policy.encode_prompt(text) for text in ("1 + 2 =", "12 + 3 - 4 =", "7 =")]
    rollouts = sample(policy, prompts, 20, SamplingParams(60), np.random.default_rng(0))
    with torch.no_grad():
        scored = policy.token_stats(rollouts.prompt_ids, rollouts.responses(), 1.0)
    mask = rollouts.response_mask
    tolerance = 1e-3 if dtype == "float32" else 0.3
    for name in ("logprob", "entropy"):
        difference = (getattr(rollouts.stats, name)[mask] - getattr(scored, name).cpu()).abs()
        assert difference.max() < tolerance
        assert difference.mean() < tolerance / 10


def test_fast_paths_of_a_gpu(policy):
    found = backend_of(policy)
    assert [found.fast_paths[name] for name in (BATCHED, COMPILED, CUDA_GRAPH, TRITON)] == [ON] * 4
    assert found.batched.captures
    packing = found.fast_paths[PACKING]
    assert packing == ON or packing.startswith("padding is faster")
