import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from entrace.trainer.algorithm.losses import kl_penalty, policy_loss

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


@pytest.mark.parametrize("cap", [1.1, 2.0, 10.0])
@pytest.mark.parametrize("advantage", [-1.5, 0.0, 0.7])
def test_dual_clip_equals_the_equation_with_its_gradient(advantage, cap):
    """Dual-clip PPO, as in verl: for A < 0, min(max(-rho A, -clip(rho) A), -c A)."""
    ratios = [*RATIOS, 9.0, 11.0]
    logprob = torch.tensor([math.log(r) for r in ratios], dtype=torch.float64).requires_grad_()
    result = policy_loss(logprob, torch.full((9,), advantage).double(), 0.2, 0.28, cap)
    result.loss.sum().backward()
    for i, ratio in enumerate(ratios):
        wanted = max(-ratio * advantage, -min(max(ratio, 0.8), 1.28) * advantage)
        is_capped = advantage < 0 and ratio > cap
        wanted = min(wanted, -cap * advantage) if advantage < 0 else wanted
        assert result.loss[i].item() == pytest.approx(wanted)
        assert bool(result.is_clipped_dual[i]) == is_capped
        if is_capped:
            assert logprob.grad[i] == 0


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=20), st.floats(1.28, 20))
def test_dual_clip_equals_the_two_sided_clip(log_ratios, delta):
    """TRL's delta: -min(min(rho, delta) A, clip(rho) A)."""
    log_ratio = torch.tensor(log_ratios, dtype=torch.float64)
    for advantage in (-1.3, 0.4):
        found = policy_loss(log_ratio, torch.full_like(log_ratio, advantage), 0.2, 0.28, delta).loss
        rho = log_ratio.exp()
        wanted = -torch.minimum(rho.clamp(max=delta) * advantage, rho.clamp(0.8, 1.28) * advantage)
        torch.testing.assert_close(found, wanted)


def test_dual_clip_has_a_gradient_where_the_ratio_overflows():
    log_ratio = torch.tensor([1000.0, -1000.0, 0.1]).requires_grad_()
    result = policy_loss(log_ratio, torch.tensor([-1.0, -1.0, -1.0]), 0.2, 0.28, 3.0)
    result.loss.sum().backward()
    assert result.loss.tolist() == pytest.approx([3.0, 0.8, math.exp(0.1)])
    assert log_ratio.grad.tolist() == pytest.approx([0.0, 0.0, math.exp(0.1)])


@pytest.mark.parametrize(
    ("delta", "expected"), [(0.5, math.exp(0.5) - 1.5), (4.0, 10.0), (30.0, 10.0), (-30.0, 10.0), (-8.0, 7.000335)]
)
def test_clamped_k3_has_the_values_of_low_var_kl(delta, expected):
    """verl: d clamped to +-20, exp(d) - d - 1 clamped to +-10."""
    logprob = torch.zeros(1, dtype=torch.float64).requires_grad_()
    found = kl_penalty(logprob, torch.tensor([delta], dtype=torch.float64), "k3", clamp=True)
    found.sum().backward()
    assert found.item() == pytest.approx(expected, rel=1e-6)
    assert logprob.grad.isfinite().all()


def test_clamped_estimators_are_bounded_and_equal_within_the_bounds():
    logprob, reference = torch.zeros(3).double(), torch.tensor([-200.0, 0.3, 200.0]).double()
    for estimator in ("k1", "k2", "k3"):
        found = kl_penalty(logprob, reference, estimator, clamp=True)
        assert found.abs().max() <= 10
        assert found[1] == kl_penalty(logprob, reference, estimator)[1]


def test_no_tokens():
    empty = torch.zeros(0)
    assert policy_loss(empty, empty, 0.2, 0.28).loss.shape == (0,)


def test_kl_estimators_in_expectation():
    """Summed over the vocabulary, k1 and k3 are the KL; k2 is its second-order part."""
    p = torch.softmax(torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64), 0)
    q = torch.softmax(torch.tensor([0.1, 0.0, 1.5, -0.5], dtype=torch.float64), 0)
    exact = float((p * (p / q).log()).sum())
    expected = {name: float((p * kl_penalty(p.log(), q.log(), name)).sum()) for name in ("k1", "k2", "k3")}
    assert expected["k1"] == pytest.approx(exact)
    assert expected["k3"] == pytest.approx(exact)
    assert expected["k2"] == pytest.approx(float((p * (p / q).log() ** 2 / 2).sum()))
    assert (kl_penalty(p.log(), q.log(), "k3") >= 0).all()
