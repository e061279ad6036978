import statistics

import numpy as np
import pytest
import torch

from trainer.advantage import group_relative_advantage, mean_surprisal, mixed_groups, overlong_penalty, ppl_z


def test_group_relative_advantage_equals_the_loop():
    rewards = torch.tensor([1.0, 0, 0, 1, 0.5, -1, 1, 1, 1])
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    found = group_relative_advantage(rewards.double(), groups)
    for group in range(3):
        values = rewards[groups == group].tolist()
        for value, advantage in zip(values, found[groups == group].tolist(), strict=True):
            wanted = (value - statistics.mean(values)) / (statistics.stdev(values) + 1e-6)
            assert advantage == pytest.approx(wanted, abs=1e-9)


def test_uniform_and_single_groups_get_zero():
    found = group_relative_advantage(torch.tensor([1.0, 1, 0.3]), torch.tensor([0, 0, 1]))
    assert found.tolist() == [0, 0, 0]


def test_without_std_only_the_mean_is_taken_off():
    found = group_relative_advantage(torch.tensor([1.0, 0, 0, 0]), torch.zeros(4, dtype=torch.int64), False)
    assert found.tolist() == [0.75, -0.25, -0.25, -0.25]


def test_mixed_groups_differ_in_reward():
    assert mixed_groups(torch.tensor([1.0, 1, 0, 1, 0, 0]), torch.tensor([0, 0, 1, 1, 2, 2])).tolist() == [
        False,
        True,
        False,
    ]


@pytest.mark.parametrize(("length", "penalty"), [(0, 0.0), (48, 0.0), (49, -2 / 16), (56, -1.0), (64, -2.0)])
def test_overlong_penalty(length, penalty):
    assert overlong_penalty(torch.tensor([length]), 64, 16, 2.0).item() == pytest.approx(penalty)


def test_no_buffer_no_penalty():
    assert overlong_penalty(torch.tensor([64]), 64, 0, 1.0).tolist() == [0.0]


def test_mean_surprisal_ignores_what_lies_outside_the_mask():
    logprobs = torch.tensor([[-1.0, -3.0, 99.0], [-2.0, 99.0, 99.0], [99.0, 99.0, 99.0]])
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    found = mean_surprisal(logprobs, mask)
    assert found[:2].tolist() == [2.0, 2.0]
    assert found[2].isnan()


def naive_z(surprisals):
    q1, q3 = np.quantile(surprisals, [0.25, 0.75])
    inside = [s for s in surprisals if q1 - 1.5 * (q3 - q1) <= s <= q3 + 1.5 * (q3 - q1)]
    std = statistics.pstdev(inside)
    return [(s - statistics.mean(inside)) / (std if std >= 1e-6 else 1.0) for s in surprisals]


def test_ppl_z_leaves_outliers_out_of_the_moments():
    surprisals = [0.1, 0.2, 0.3, 0.25, 0.15, 9.0, 0.5, 0.5, 0.5, 0.7]
    groups = torch.tensor([0] * 6 + [1] * 3 + [2])
    logprobs = -torch.tensor(surprisals, dtype=torch.float64)[:, None]
    found = ppl_z(logprobs, torch.ones(10, 1, dtype=torch.bool), groups).tolist()
    assert found == pytest.approx(naive_z(surprisals[:6]) + naive_z(surprisals[6:9]) + [0.0])
    assert found[5] > 50


def test_ppl_z_of_an_empty_response_is_zero():
    logprobs = -torch.tensor([[1.0], [2.0], [5.0]])
    mask = torch.tensor([[True], [True], [False]])
    assert ppl_z(logprobs, mask, torch.zeros(3, dtype=torch.int64)).tolist() == [-1.0, 1.0, 0.0]
