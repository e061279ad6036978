import statistics

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from entrace.trainer.algorithm.advantages import (
    group_relative_advantage,
    mean_surprisal,
    mixed_groups,
    overlong_penalty,
    ppl_z,
)


def test_group_relative_advantage_equals_the_loop():
    rewards = torch.tensor([1.0, 0, 0, 1, 0.5, -1, 1, 1, 1])
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    found = group_relative_advantage(rewards.double(), groups)
    for group in range(3):
        values = rewards[groups == group].tolist()
        for value, advantage in zip(values, found[groups == group].tolist(), strict=True):
            wanted = (value - statistics.mean(values)) / (statistics.stdev(values) + 1e-6)
            assert advantage == pytest.approx(wanted, abs=1e-9)


@given(
    value=st.floats(-(2.0**100), 2.0**100, width=32),
    size=st.integers(1, 9),
    normalize_std=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@example(value=0.7, size=8, normalize_std=True, dtype=torch.float32)
@example(value=0.1, size=8, normalize_std=False, dtype=torch.float64)
def test_uniform_rewards_of_any_value_get_exactly_zero(value, size, normalize_std, dtype):
    # A second, mixed group shares the tensor.
    rewards = torch.tensor([value] * size + [0.0, 1.0], dtype=dtype)
    groups = torch.tensor([0] * size + [1, 1])
    found = group_relative_advantage(rewards, groups, normalize_std)
    assert found[:size].abs().max() == 0
    assert found[size:].abs().min() > 0.4


def test_responses_without_a_reward_enter_neither_mean_nor_spread():
    rewards, groups = torch.tensor([1.0, 0, 9, 0, 5, 5]).double(), torch.tensor([0, 0, 0, 0, 1, 1])
    is_counted = torch.tensor([True, True, False, True, True, False])
    found = group_relative_advantage(rewards, groups, is_counted=is_counted)
    wanted = group_relative_advantage(torch.tensor([1.0, 0, 0]).double(), torch.zeros(3, dtype=torch.int64))
    assert found[[0, 1, 3]].tolist() == wanted.tolist()
    assert found[[2, 4, 5]].tolist() == [0, 0, 0]


def test_without_std_only_the_mean_is_taken_off():
    found = group_relative_advantage(torch.tensor([1.0, 0, 0, 0]), torch.zeros(4, dtype=torch.int64), False)
    assert found.tolist() == [0.75, -0.25, -0.25, -0.25]


def test_mixed_groups_differ_in_what_is_counted():
    values, groups = torch.tensor([1.0, 1, 0, 1, 0, 0]), torch.tensor([0, 0, 1, 1, 2, 2])
    everything = torch.ones(6, dtype=torch.bool)
    assert mixed_groups(values, groups, everything).tolist() == [False, True, False]
    assert mixed_groups(values == 1, groups, everything).tolist() == [False, True, False]
    assert mixed_groups(values, groups, torch.tensor([True] * 3 + [False] + [True] * 2)).tolist() == [False] * 3


@pytest.mark.parametrize(("length", "penalty"), [(0, 0.0), (48, 0.0), (49, -2 / 16), (56, -1.0), (64, -2.0)])
def test_overlong_penalty(length, penalty):
    assert overlong_penalty(torch.tensor([length]), 64, 16, 2.0).item() == pytest.approx(penalty)


@pytest.mark.parametrize(("values", "factor"), [((-1.0, 1.0), 1.0), ((0.0, 1.0), 0.5)])
def test_a_correct_answer_at_the_length_limit_keeps_a_positive_advantage(values, factor):
    """DAPO subtracts up to 1 from rewards of -1 and 1: (0 + 3/8) / 0.9161 = .41.

    The 0/1 scale must give the same advantage.
    """
    wrong, right = values
    rewards = torch.tensor([right, right, right] + [wrong] * 5).double()
    lengths = torch.tensor([64] + [10] * 7)
    total = rewards + overlong_penalty(lengths, 64, 16, factor)
    found = group_relative_advantage(total, torch.zeros(8, dtype=torch.int64))
    assert found[0].item() == pytest.approx(0.4093, abs=1e-4)


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
