import math

import pytest
import torch

from trainer.advantage import ppl_z
from trainer.config import PositionConfig, PplConfig, ShapingConfig, Window
from trainer.shaping import ShapingBatch, is_on, position_shaping, ppl_shaping, shape


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(8, 6, generator=generator).double()
    lengths = torch.tensor([6, 1, 0, 3, 6, 2, 5, 4])
    mask = torch.arange(6) < lengths[:, None]
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    advantages = torch.tensor([1.2, -0.7, 0.3, -0.1, 0, 0, 0, 0], dtype=torch.float64)[:, None].expand(8, 6)
    return advantages, ShapingBatch(logprobs, mask, groups)


@pytest.mark.parametrize("alpha", [0.01, 0.5, -0.5])
def test_ppl_shaping_equals_the_loop(case, alpha):
    advantages, batch = case
    found = ppl_shaping(advantages, batch.logprobs, batch.response_mask, batch.group_ids, alpha)
    z = ppl_z(batch.logprobs, batch.response_mask, batch.group_ids)
    for i in range(8):
        factor = min(max(1 - alpha * z[i].item(), 0.8), 1.2)
        for t in range(6):
            assert found[i, t].item() == pytest.approx(advantages[i, t].item() * factor, abs=1e-12)


def test_ppl_shaping_favours_the_surer_response():
    logprobs = torch.tensor([[-0.1], [-0.9]])
    shaped = ppl_shaping(
        torch.ones(2, 1), logprobs, torch.ones(2, 1, dtype=torch.bool), torch.zeros(2, dtype=torch.int64), 0.1
    )
    assert shaped.flatten().tolist() == pytest.approx([1.1, 0.9])


@pytest.mark.parametrize("reverse", [False, True])
def test_position_shaping_equals_the_loop(case, reverse):
    advantages, batch = case
    found = position_shaping(advantages, batch.response_mask, reverse=reverse)
    for i in range(8):
        length = int(batch.response_mask[i].sum())
        for t in range(1, 7):
            a = advantages[i, t - 1].item()
            wanted = a
            if t <= length:
                r = (t - 1) / length
                r = 1 - r if reverse else r
                bonus = min(0.1 / (1 + math.exp(-15 * (r - 0.5))), 0.5 * abs(a))
                wanted = a + math.copysign(bonus, a) if a else 0.0
            assert found[i, t - 1].item() == pytest.approx(wanted, abs=1e-7)


def test_position_bonus_is_capped_by_the_advantage():
    shaped = position_shaping(torch.full((1, 2), 0.02), torch.ones(1, 2, dtype=torch.bool), gamma=10.0)
    assert shaped.flatten().tolist() == pytest.approx([0.02 + min(10 / (1 + math.exp(7.5)), 0.01), 0.03])


def test_none_changes_nothing(case):
    advantages, batch = case
    shaped, active = shape(advantages, batch, ShapingConfig(), step=5, plateau_step=1)
    assert not active
    assert torch.equal(shaped, advantages)


def test_composition_is_the_parts_in_order(case):
    advantages, batch = case
    config = ShapingConfig(method="ppl+position", ppl=PplConfig(alpha=0.3), position=PositionConfig(start_step=1))
    shaped, active = shape(advantages, batch, config, step=1, plateau_step=None)
    by_ppl = ppl_shaping(advantages, batch.logprobs, batch.response_mask, batch.group_ids, 0.3)
    assert active
    assert torch.equal(shaped, position_shaping(by_ppl, batch.response_mask))


def test_controls_mirror_their_methods(case):
    advantages, batch = case
    high, _ = shape(advantages, batch, ShapingConfig(method="ppl_high"), step=1, plateau_step=None)
    assert torch.equal(high, ppl_shaping(advantages, batch.logprobs, batch.response_mask, batch.group_ids, -0.01))
    config = ShapingConfig(method="position_reversed", position=PositionConfig(start_step=1))
    early, _ = shape(advantages, batch, config, step=1, plateau_step=None)
    assert torch.equal(early, position_shaping(advantages, batch.response_mask, reverse=True))


@pytest.mark.parametrize(
    ("window", "on"),
    [
        (Window(), [1, 2, 3, 4, 5, 6]),
        (Window(start_step=3), [3, 4, 5, 6]),
        (Window(end_step=2), [1, 2]),
        (Window(start_step=2, end_step=4), [2, 3, 4]),
        (Window(start_step="plateau"), [4, 5, 6]),
        (Window(start_step="plateau", end_step=5), [4, 5]),
    ],
)
def test_windows_include_both_ends(window, on):
    assert [step for step in range(1, 7) if is_on(window, step, plateau_step=4)] == on


def test_no_plateau_no_window():
    assert not is_on(Window(start_step="plateau"), 100, plateau_step=None)
