import math

import pytest
import torch

from trainer import token_stats
from trainer.token_stats import LMHead, compute_token_stats, lm_head_grad_norm


def naive_stats(hidden, weight, bias, targets, temperature):
    """Float64, one token and one vocabulary entry at a time."""
    rows = []
    for h, target in zip(hidden.double(), targets, strict=True):
        logits = [
            (float(h @ w) + (0.0 if bias is None else float(bias[v]))) / temperature
            for v, w in enumerate(weight.double())
        ]
        peak = max(logits)
        total = sum(math.exp(z - peak) for z in logits)
        p = [math.exp(z - peak) / total for z in logits]
        rows.append((math.log(p[target]), -sum(q * math.log(q) for q in p), sum(q * q for q in p)))
    return torch.tensor(rows, dtype=torch.float64).T


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 8, generator=generator)
    weight = torch.randn(11, 8, generator=generator)
    bias = torch.randn(11, generator=generator)
    targets = torch.randint(11, (37,), generator=generator)
    return hidden, weight, bias, targets


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk_logits", [1, 50, 1 << 20])
def test_equals_the_naive_float64_loop(case, temperature, with_bias, chunk_logits, monkeypatch):
    monkeypatch.setitem(token_stats.CHUNK_LOGITS, "cpu", chunk_logits)
    hidden, weight, bias, targets = case
    bias = bias if with_bias else None
    stats = compute_token_stats(hidden, LMHead(weight, bias), targets, temperature)
    expected = naive_stats(hidden, weight, bias, targets, temperature)
    for found, wanted in zip((stats.logprob, stats.entropy, stats.sum_p2), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def test_uniform_logits_have_entropy_ln_v():
    stats = compute_token_stats(torch.zeros(1, 3), LMHead(torch.ones(4, 3), None), torch.tensor([2]))
    assert stats.entropy.item() == pytest.approx(math.log(4))
    assert stats.logprob.item() == pytest.approx(-math.log(4))
    assert stats.sum_p2.item() == pytest.approx(0.25)


@pytest.mark.parametrize("chunk_logits", [50, 1 << 20])
def test_gradients_equal_autograd_in_float64(case, chunk_logits, monkeypatch):
    monkeypatch.setitem(token_stats.CHUNK_LOGITS, "cpu", chunk_logits)
    hidden, weight, bias, targets = case
    a, b = torch.randn(2, len(targets), generator=torch.Generator().manual_seed(1))
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    stats = compute_token_stats(leaves[0], LMHead(leaves[1], leaves[2]), targets, 0.8)
    (a * stats.logprob + b * stats.entropy).sum().backward()

    reference = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    logp = torch.log_softmax((reference[0] @ reference[1].T + reference[2]) / 0.8, -1)
    entropy = -(logp.exp() * logp).sum(-1)
    (a * logp.gather(1, targets[:, None]).squeeze(1) + b * entropy).sum().backward()
    for found, wanted in zip(leaves, reference, strict=True):
        torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=1e-4, atol=1e-5)


def test_no_tokens_give_no_values(case):
    hidden, weight, _, targets = case
    assert compute_token_stats(hidden[:0], LMHead(weight, None), targets[:0]).entropy.shape == (0,)


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_grad_norm_equals_autograd(case, temperature):
    hidden, weight, _, targets = case
    advantage = torch.linspace(-2, 2, len(targets))
    stats = compute_token_stats(hidden, LMHead(weight, None), targets, temperature)
    found = lm_head_grad_norm(advantage, stats.logprob, stats.sum_p2, hidden.norm(dim=1), temperature)
    for i in range(len(targets)):
        leaf = weight.double().requires_grad_()
        logp = torch.log_softmax(hidden[i].double() @ leaf.T / temperature, -1)
        (advantage[i] * logp[targets[i]]).backward()
        assert found[i].item() == pytest.approx(leaf.grad.norm().item(), rel=1e-4, abs=1e-5)


def test_grad_norm_of_a_certain_token_is_zero_not_nan():
    norm = lm_head_grad_norm(torch.ones(1), torch.zeros(1), torch.tensor([1 - 1e-7]), torch.ones(1), 1.0)
    assert norm.item() == 0.0
