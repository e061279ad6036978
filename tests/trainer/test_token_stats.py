import math

import pytest
import torch

from entrace.trainer.kernels import blocked_stats
from entrace.trainer.kernels.blocked_stats import compute_token_stats, compute_vocabulary_sums
from entrace.trainer.kernels.token_stats import LEFT_OUT, LMHead, Truncation, lm_head_grad_norm
from tests.benchmarks.allocator import peak_bytes
from tests.benchmarks.logit_stats import stats_of_logits


def naive_stats(hidden, weight, bias, targets, temperature):
    """Compute the statistics in float64, one token and entry at a time.

    Entries are those of the vocabulary.
    """
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


@pytest.fixture(params=[(1, 1), (8, 3), (50, 4), (256, 1024)], ids=str)
def blocks(request, monkeypatch):
    """Set blocks of one logit, of a few, and of all."""
    monkeypatch.setitem(blocked_stats.BLOCK, "cpu", request.param)


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
@pytest.mark.usefixtures("blocks")
def test_equals_the_naive_float64_loop(case, temperature, with_bias):
    hidden, weight, bias, targets = case
    bias = bias if with_bias else None
    stats = compute_token_stats(hidden, LMHead(weight, bias), targets, temperature)
    expected = naive_stats(hidden, weight, bias, targets, temperature)
    for found, wanted in zip((stats.logprob, stats.entropy, stats.sum_p2), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def naive_vocabulary_sums(logits, targets):
    """Compute sums over other entries in float64, one token and entry at a time.

    Entries are those of the vocabulary.
    """
    rows = []
    for row, target in zip(torch.log_softmax(logits.double(), -1).tolist(), targets.tolist(), strict=True):
        others = [value for v, value in enumerate(row) if v != target]
        squares = [math.exp(2 * value) for value in others]
        products = [square * value for square, value in zip(squares, others, strict=True) if square]
        rows.append((math.fsum(squares), math.fsum(products)))
    return torch.tensor(rows, dtype=torch.float64).T


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize(
    "truncation", [Truncation(), Truncation(top_k=4), Truncation(0.9), Truncation(0.8, 5)], ids=str
)
@pytest.mark.usefixtures("blocks")
def test_vocabulary_sums_equal_the_naive_float64_loop(case, temperature, truncation):
    hidden, weight, bias, targets = case
    sums = compute_vocabulary_sums(hidden, LMHead(weight, bias), targets, temperature, truncation)
    logits = truncation.apply(hidden @ weight.T + bias, temperature, targets)
    expected = naive_vocabulary_sums((logits.double() / temperature).masked_fill(logits <= LEFT_OUT, -1e9), targets)
    for found, wanted in zip(vars(sums).values(), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("gap", [0, 5, 10, 15, 20, 30])
def test_vocabulary_sums_beside_a_certain_token_have_a_small_relative_error(gap):
    """Check sums down to 1e-26.

    Sums over all entries would be 1 and the largest log-probability.
    """
    logits = torch.randn(20, 3000, generator=torch.Generator().manual_seed(2))
    logits[:, 7] = logits.logsumexp(1) + gap
    targets = torch.full((20,), 7)
    sums = compute_vocabulary_sums(logits, LMHead(torch.eye(3000), None), targets)
    for found, wanted in zip(vars(sums).values(), naive_vocabulary_sums(logits, targets), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)


def test_vocabulary_sums_need_no_memory_per_token_and_entry():
    vocab, width = 4000, 16
    peaks = {}
    for num_tokens in (1000, 4000):
        hidden, head = torch.randn(num_tokens, width), LMHead(torch.randn(vocab, width), None)
        targets = torch.arange(num_tokens) % vocab
        peaks[num_tokens] = peak_bytes(lambda h=hidden, w=head, t=targets: compute_vocabulary_sums(h, w, t))
    assert (peaks[4000] - peaks[1000]) / 3000 < 300 < 4 * vocab


def test_uniform_logits_have_entropy_ln_v():
    stats = compute_token_stats(torch.zeros(1, 3), LMHead(torch.ones(4, 3), None), torch.tensor([2]))
    assert stats.entropy.item() == pytest.approx(math.log(4))
    assert stats.logprob.item() == pytest.approx(-math.log(4))
    assert stats.sum_p2.item() == pytest.approx(0.25)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(
    "truncation", [Truncation(), Truncation(top_k=4), Truncation(0.9), Truncation(0.8, 5)], ids=str
)
def test_gradients_equal_autograd_in_float64(case, truncation):
    hidden, weight, bias, targets = case
    a, b = torch.randn(2, len(targets), generator=torch.Generator().manual_seed(1))
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    stats = compute_token_stats(leaves[0], LMHead(leaves[1], leaves[2]), targets, 0.8, truncation)
    (a * stats.logprob + b * stats.entropy).sum().backward()

    reference = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    logits = reference[0] @ reference[1].T + reference[2]
    kept = truncation.apply(logits.detach(), 0.8, targets) > LEFT_OUT
    assert kept.all() == (truncation == Truncation())
    logp = torch.log_softmax((logits / 0.8).masked_fill(~kept, -1e9), -1)
    entropy = -(logp.exp() * logp).sum(-1)
    torch.testing.assert_close(stats.entropy.double(), entropy, rtol=1e-5, atol=1e-6)
    (a * logp.gather(1, targets[:, None]).squeeze(1) + b * entropy).sum().backward()
    for found, wanted in zip(leaves, reference, strict=True):
        torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=1e-4, atol=1e-5)


def test_a_frozen_head_gets_no_gradient_and_changes_none(case):
    hidden, weight, bias, targets = case
    grads = []
    for requires_grad in (True, False):
        leaf = hidden.clone().requires_grad_()
        head = LMHead(weight.clone().requires_grad_(requires_grad), bias.clone().requires_grad_(requires_grad))
        compute_token_stats(leaf, head, targets).logprob.sum().backward()
        assert (head.weight.grad is None) == (head.bias.grad is None) == (not requires_grad)
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_16_bit_hidden_states_on_a_cpu_multiply_the_head_in_float32(case):
    hidden, weight, bias, targets = case
    rounded = hidden.bfloat16()
    leaves = [rounded.clone().requires_grad_(), rounded.float().requires_grad_()]
    found, wanted = (compute_token_stats(leaf, LMHead(weight, bias), targets) for leaf in leaves)
    assert torch.equal(found.entropy, wanted.entropy)
    found.logprob.sum().backward()
    wanted.logprob.sum().backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad.bfloat16())


@pytest.mark.parametrize("offset", [0.0, 80.0])
@pytest.mark.parametrize("gap", [0, 5, 10, 15, 20, 30, 40])
def test_statistics_of_certain_tokens_have_a_relative_error_of_a_millionth(gap, offset):
    """Check log-probabilities and entropies down to 1e-15.

    Figures show them on logarithmic axes.
    """
    logits = torch.randn(20, 3000, generator=torch.Generator().manual_seed(2))
    logits[:, 7] = logits.logsumexp(1) + gap
    logits += offset
    targets = torch.full((20,), 7)
    stats = stats_of_logits(logits, targets)
    shifted = logits.double() - logits.max(1, keepdim=True).values
    rest = shifted.exp().scatter(1, targets[:, None], 0).sum(1)
    logprob = -torch.log1p(rest)
    entropy = -logprob - (shifted.exp() * shifted).sum(1) / (1 + rest)
    torch.testing.assert_close(stats.logprob.double(), logprob, rtol=2e-6, atol=0)
    torch.testing.assert_close(stats.entropy.double(), entropy, rtol=2e-6, atol=0)
    sum_p2 = (2 * (shifted - torch.log1p(rest)[:, None])).exp().sum(1)
    torch.testing.assert_close(stats.sum_p2.double(), sum_p2, rtol=2e-6, atol=0)


@pytest.mark.parametrize("gap", [0, 10, 20, 30])
def test_gradient_of_a_certain_token_has_a_relative_error_of_a_millionth(gap):
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(3))
    logits[:, 7] = logits.logsumexp(1) + gap
    leaf = logits.clone().requires_grad_()
    stats = compute_token_stats(leaf, LMHead(torch.eye(300), None), torch.full((5,), 7))
    stats.logprob.sum().backward()
    p = torch.softmax(logits.double(), 1)
    p[:, 7] = 0
    torch.testing.assert_close(leaf.grad[:, 7].double(), p.sum(1), rtol=3e-6, atol=0)


def test_log_probability_of_an_unlikely_target():
    logits = torch.tensor([[0.0, 100.0, 99.0, -200.0]])
    for target in range(4):
        expected = torch.log_softmax(logits.double(), 1)[0, target].item()
        assert stats_of_logits(logits, torch.tensor([target])).logprob.item() == pytest.approx(expected, rel=1e-6)


def test_memory_of_both_passes_is_independent_of_the_number_of_tokens():
    vocab, width, temperature = 4000, 16, 0.9
    extra = {}
    for num_tokens in (1000, 4000):
        leaves = [torch.randn(num_tokens, width, requires_grad=True), torch.randn(vocab, width, requires_grad=True)]
        targets = torch.arange(num_tokens) % vocab

        def work(leaves=leaves, targets=targets):
            stats = compute_token_stats(leaves[0], LMHead(leaves[1], None), targets, temperature)
            (stats.logprob + stats.entropy).sum().backward()

        extra[num_tokens] = peak_bytes(work) - sum(leaf.grad.nbytes for leaf in leaves)
    per_token = (extra[4000] - extra[1000]) / 3000
    assert per_token < 300 < 4 * vocab
    tokens, entries = blocked_stats.BLOCK["cpu"]
    assert extra[4000] < 5 * tokens * entries * 4 + 300 * 4000 < 4000 * vocab * 4


def test_no_tokens_give_empty_statistics(case):
    hidden, weight, _, targets = case
    assert compute_token_stats(hidden[:0], LMHead(weight, None), targets[:0]).entropy.shape == (0,)
    assert compute_vocabulary_sums(hidden[:0], LMHead(weight, None), targets[:0]).sum_p2_others.shape == (0,)


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


def test_grad_norm_of_a_nearly_certain_token_survives_rounding():
    """With two tokens and 1 - p = 1e-6, |G| is a difference of numbers near 1.

    |G| = sqrt(2) (1 - p).
    """
    missing = torch.tensor([1e-6], dtype=torch.float64)
    logprob, sum_p2 = torch.log1p(-missing), (1 - missing).square() + missing.square()
    norm = lm_head_grad_norm(torch.ones(1), logprob.float(), sum_p2.float(), torch.ones(1), 1.0)
    assert 1 - 1e-3 < norm.item() / 1e-6 < math.sqrt(2) + 1e-3
