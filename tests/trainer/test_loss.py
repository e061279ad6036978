import math

import pytest
import torch

from trainer.loss import kl_penalty, policy_loss

RATIOS = [0.5, 0.79, 0.8, 1.0, 1.28, 1.29, 3.0]


@pytest.mark.parametrize("advantage", [-1.5, 0.0, 0.7])
def test_policy_loss_equals_the_equation_with_its_gradient(advantage):
    logprob = torch.tensor([math.log(r) for r in RATIOS], dtype=torch.float64).requires_grad_()
    result = policy_loss(logprob, torch.full((7,), advantage).double(), 0.2, 0.28)
    result.loss.sum().backward()
    for i, ratio in enumerate(RATIOS):
        wanted = max(-ratio * advantage, -min(max(ratio, 0.8), 1.28) * advantage)
        assert result.loss[i].item() == pytest.approx(wanted)
        is_cut = (advantage > 0 and ratio > 1.28) or (advantage < 0 and ratio < 0.8)
        if abs(ratio - 0.8) > 1e-9 and abs(ratio - 1.28) > 1e-9:
            assert logprob.grad[i].item() == pytest.approx(0.0 if is_cut else -ratio * advantage)
            assert bool(result.is_clipped_low[i] | result.is_clipped_high[i]) == is_cut


def test_no_tokens():
    empty = torch.zeros(0)
    assert policy_loss(empty, empty, 0.2, 0.28).loss.shape == (0,)


def test_kl_estimators_in_expectation():
    """Summed over the whole vocabulary, k1 and k3 are the KL itself; k2 is its second-order part."""
    p = torch.softmax(torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64), 0)
    q = torch.softmax(torch.tensor([0.1, 0.0, 1.5, -0.5], dtype=torch.float64), 0)
    exact = float((p * (p / q).log()).sum())
    expected = {name: float((p * kl_penalty(p.log(), q.log(), name)).sum()) for name in ("k1", "k2", "k3")}
    assert expected["k1"] == pytest.approx(exact)
    assert expected["k3"] == pytest.approx(exact)
    assert expected["k2"] == pytest.approx(float((p * (p / q).log() ** 2 / 2).sum()))
    assert (kl_penalty(p.log(), q.log(), "k3") >= 0).all()
