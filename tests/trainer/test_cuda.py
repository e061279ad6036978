"""Compare code that only a GPU runs with a CPU, or with the same GPU without it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from entrace.trainer.config import PolicyConfig
from entrace.trainer.kernels import blocked_stats
from entrace.trainer.kernels.blocked_stats import compute_token_stats
from entrace.trainer.kernels.token_stats import LMHead, Truncation
from entrace.trainer.model.policy import Policy
from entrace.trainer.sampling import backend
from entrace.trainer.sampling.backend import CUDA_GRAPH, ON, PACKING, TRITON, backend_of
from entrace.trainer.sampling.cuda_graph import CudaGraph
from entrace.trainer.sampling.sampler import sample
from entrace.trainer.sampling.samples import SamplingParams
from tests.benchmarks.logit_stats import stats_of_logits

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


@pytest.mark.parametrize("limit", [20, 200])
def test_sampling_with_a_cuda_graph_draws_the_same_tokens(policy, limit, monkeypatch):
    selected = backend_of(policy)
    assert selected.uses_cuda_graph
    prompts = [policy.encode_prompt(text) for text in ("1 + 2 =", "12 + 3 - 4 =", "7 =")]
    drawn = []
    for uses_cuda_graph in (True, False):
        monkeypatch.setitem(backend._BACKENDS, policy, replace(selected, uses_cuda_graph=uses_cuda_graph))
        drawn.append(sample(policy, prompts, 40, SamplingParams(limit, 1.2), np.random.default_rng(0)))
    found, expected = drawn
    is_same = (found.response_ids == expected.response_ids).all(1)
    # If a random number falls on the border of two tokens, rounding decides.
    assert is_same.float().mean() > 0.95
    mask = expected.response_mask & is_same[:, None]
    torch.testing.assert_close(found.entropies[mask], expected.entropies[mask], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("attention", ["auto", "packed"])
def test_recorded_values_equal_a_teacher_forced_pass(dtype, attention):
    policy = Policy.load(PolicyConfig(device="cuda", dtype=dtype, attention=attention))
    assert policy.uses_packing == (attention == "packed")
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
    fast_paths = backend_of(policy).fast_paths
    assert (fast_paths[CUDA_GRAPH], fast_paths[TRITON]) == (ON, ON)
    assert fast_paths[PACKING] == "policy.attention is not packed"
