"""Compare the Triton kernels with the statistics in plain torch.

Triton's interpreter runs the kernels.
"""

import pytest
import torch

from entrace.trainer.kernels import blocked_stats, token_stats
from entrace.trainer.kernels.blocked_stats import compute_token_stats, compute_vocabulary_sums
from entrace.trainer.kernels.token_stats import LMHead, Truncation
from tests.benchmarks import logit_stats
from tests.benchmarks.logit_stats import stats_of_logits
from tests.slow import slow_after

pytest.importorskip("triton")
# The interpreter warns about values beyond the last column.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture
def with_kernels(monkeypatch):
    """Return a function that switches to the kernels.

    tests/conftest.py selects the interpreter.
    """
    if torch.cuda.is_available():
        pytest.skip("tests/trainer/test_cuda.py runs them")
    from entrace.trainer.kernels import token_stats_triton

    for name, value in {"LANES": 32, "DEPTH": 2, "BLOCK": 64}.items():
        monkeypatch.setattr(token_stats_triton, name, value)

    def switch():
        for module in (token_stats, logit_stats):
            monkeypatch.setattr(module, "triton_kernels", lambda device: token_stats_triton)

    return switch


@pytest.mark.parametrize("gap", [0, 5, 15, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_statistics_of_logits(with_kernels, gap, dtype):
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, 7] = logits.logsumexp(1) + gap
    logits = logits.to(dtype)
    targets = torch.tensor([7, 7, 0, 63, 64, 299])
    expected = stats_of_logits(logits.float(), targets, 0.8)
    with_kernels()
    found = stats_of_logits(logits, targets, 0.8)
    for name, values in vars(expected).items():
        torch.testing.assert_close(getattr(found, name), values, rtol=3e-6, atol=5e-7)
        # Statistics of certain tokens have a relative error; those of others pass through 1.
        torch.testing.assert_close(getattr(found, name)[:2], values[:2], rtol=3e-6, atol=0)


@pytest.mark.parametrize("block", [(5, 100), (64, 1000)], ids=str)
def test_vocabulary_sums_beside_the_kernels(with_kernels, monkeypatch, block):
    """The sums are computed in plain torch, in separate memory."""
    monkeypatch.setitem(blocked_stats.BLOCK, "cpu", block)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(13, 8, generator=generator), torch.randn(333, 8, generator=generator)
    targets = torch.randint(333, (13,), generator=generator)
    expected = compute_vocabulary_sums(hidden, LMHead(weight, None), targets, 0.9)
    with_kernels()
    found = compute_vocabulary_sums(hidden, LMHead(weight, None), targets, 0.9)
    for name, values in vars(expected).items():
        assert torch.equal(getattr(found, name), values)


@pytest.mark.parametrize("block", slow_after(1, [(5, 100), (64, 1000)]), ids=str)
@pytest.mark.parametrize("truncation", [Truncation(), Truncation(0.9), Truncation(0.8, 50)], ids=str)
def test_both_passes_from_hidden_states(with_kernels, monkeypatch, block, truncation):
    monkeypatch.setitem(blocked_stats.BLOCK, "cpu", block)
    generator = torch.Generator().manual_seed(0)
    case = [torch.randn(*shape, generator=generator) for shape in ((13, 8), (333, 8), (333,))]
    targets = torch.randint(333, (13,), generator=generator)
    weights = torch.randn(2, 13, generator=generator)
    results = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in case]
        stats = compute_token_stats(leaves[0], LMHead(*leaves[1:]), targets, 0.9, truncation)
        (weights[0] * stats.logprob + weights[1] * stats.entropy).sum().backward()
        results.append([*vars(stats).values(), *(leaf.grad for leaf in leaves)])
        with_kernels()
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_arguments_may_have_any_strides(with_kernels):
    logits, targets = torch.randn(300, 6, generator=torch.Generator().manual_seed(0)), torch.arange(12).view(6, 2)
    expected = stats_of_logits(logits.T.contiguous(), targets[:, 1].contiguous())
    with_kernels()
    torch.testing.assert_close(vars(stats_of_logits(logits.T, targets[:, 1])), vars(expected))
    weight = torch.eye(300, requires_grad=True)
    stats = compute_token_stats(logits.T, LMHead(weight, None), targets[:, 1])
    torch.testing.assert_close(vars(stats), vars(expected), rtol=1e-5, atol=1e-5)
    stats.logprob.sum().backward()
    assert weight.grad is not None


def test_no_tokens_give_empty_statistics(with_kernels):
    with_kernels()
    stats = stats_of_logits(torch.zeros(0, 9), torch.zeros(0, dtype=torch.int64))
    assert [len(values) for values in vars(stats).values()] == [0, 0, 0]
