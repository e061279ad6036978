"""Every method against a naive loop, on responses of all lengths and uniform groups; the registry; windows."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from entrace.trainer.algorithm import shaping
from entrace.trainer.algorithm.advantages import ppl_z
from entrace.trainer.algorithm.method import REGISTRY, RolloutView, Window
from entrace.trainer.algorithm.shaping import ShapingConfig, is_on, shape, waits_for_plateau

from .conftest import token_batch

METHODS = REGISTRY["shaping"]


@pytest.fixture
def case():
    return token_batch()


def z_of(batch):
    return ppl_z(batch.logprobs, batch.response_mask, batch.group_ids).tolist()


def position_bonus(batch, i, t, a, sign):
    r = t / int(batch.response_mask[i].sum())
    return math.copysign(min(0.1 / (1 + math.exp(-sign * 15 * (r - 0.5))), 0.5 * abs(a)), a) if a else 0.0


# (advantage, batch, row, place from 0, its z) -> shaped; where is_inside, places outside the mask keep their value.
LOOPS = {
    "ppl": (False, lambda a, b, i, t, z: a * min(max(1 - 0.5 * z, 0.8), 1.2)),
    "ppl_high": (False, lambda a, b, i, t, z: a * min(max(1 + 0.5 * z, 0.8), 1.2)),
    "position": (True, lambda a, b, i, t, z: a + position_bonus(b, i, t, a, 1)),
    "position_reversed": (True, lambda a, b, i, t, z: a + position_bonus(b, i, t, a, -1)),
    "entropy_advantage": (True, lambda a, b, i, t, z: a + min(0.4 * b.entropy[i, t].item(), abs(a) / 2)),
    "reweighting": (True, lambda a, b, i, t, z: a * (0.2 * math.exp(b.logprobs[i, t].item()) + 0.8)),
    "psr": (False, lambda a, b, i, t, z: 1.0 if b.is_correct[i] else 0.0),
    "nsr": (False, lambda a, b, i, t, z: 0.0 if b.is_correct[i] else -1.0),
    "weighted_reinforce": (False, lambda a, b, i, t, z: 0.1 if b.is_correct[i] else -1.0),
    "released_noop": (False, lambda a, b, i, t, z: a),
}


@pytest.mark.parametrize("name", LOOPS)
def test_method_equals_the_loop(case, name):
    advantages, batch = case
    config = ShapingConfig(method=name, ppl={"alpha": 0.5}, position={"start_step": 1})
    found, is_shaped = shape(advantages, batch, config, step=1, plateau_step=None)
    is_inside, loop = LOOPS[name]
    assert is_shaped
    for i, z in enumerate(z_of(batch)):
        for t in range(6):
            a = advantages[i, t].item()
            wanted = a if is_inside and not batch.response_mask[i, t] else loop(a, batch, i, t, z)
            assert found[i, t].item() == pytest.approx(wanted, abs=1e-7)


def test_permuted_factors_are_those_of_the_group_on_other_responses(case):
    _, batch = case
    ones = torch.ones(8, 6, dtype=torch.float64)
    factors = shaping.ppl(ones, batch, alpha=0.3)[:, 0]
    found = [shaping.ppl_permuted(ones, batch, alpha=0.3)[:, 0] for _ in range(200)]
    for permuted in found:
        for group in (slice(0, 4), slice(4, 8)):
            assert sorted(permuted[group].tolist()) == sorted(factors[group].tolist())
    # Each response gets each factor of its group equally often.
    mean = torch.stack(found).mean(0)
    torch.testing.assert_close(mean[4:], factors[4:].mean().expand(4), atol=0.03, rtol=0)


def test_permutation_is_that_of_seed_and_step(case):
    advantages, batch = case
    first, second, other = (
        shaping.ppl_permuted(advantages, replace(batch, rng=np.random.default_rng(seed)), alpha=0.3)
        for seed in (5, 5, 6)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def hand(logprobs, entropy=None, is_correct=None):
    rows = len(logprobs)
    mask = torch.ones(rows, len(logprobs[0]), dtype=torch.bool)
    entropy = torch.tensor(entropy or logprobs).double()
    is_correct = torch.tensor(is_correct or [True] * rows)
    groups = torch.zeros(rows, dtype=torch.int64)
    return RolloutView(torch.tensor(logprobs).double(), entropy, is_correct, mask, groups, np.random.default_rng(0))


# Log perplexities .1, .2, .3, 1: quartiles .175 and .475, so that 1 lies outside [-.275, .925]; mean .2, population
# deviation .0816497 of the other three; z = -1.224745, 0, 1.224745, 9.797959.
FOUR = hand([[-0.1], [-0.2], [-0.3], [-1.0]])
# r = 0, .25, .5, .75: .1 sigmoid(15 (r - .5)) = .0000553, .0022977, .05, .0977023; capped at half of |A|.
PLACES = hand([[-1.0] * 4] * 2)


@pytest.mark.parametrize(
    ("method", "batch", "advantages", "options", "wanted"),
    [
        # The released code of 2508.02260, alpha .01, and the clamp of its factor at alpha .1.
        (shaping.ppl, FOUR, [[1.0]] * 4, {}, [1.0122474, 1, 0.9877526, 0.9020204]),
        (shaping.ppl, FOUR, [[1.0]] * 4, {"alpha": 0.1}, [1.1224745, 1, 0.8775255, 0.8]),
        (shaping.ppl_high, FOUR, [[1.0]] * 4, {"alpha": 0.1}, [0.8775255, 1, 1.1224745, 1.2]),
        (
            shaping.position,
            PLACES,
            [[1.0] * 4, [-0.1] * 4],
            {},
            [1.0000553, 1.0022977, 1.05, 1.0977023, -0.1000553, -0.1022977, -0.15, -0.15],
        ),
        # 2506.14758, alpha .4, kappa 2: min(.2, .5), min(.8, .5); min(.2, .15) twice.
        (
            shaping.entropy_advantage,
            hand([[-1.0, -1.0]] * 2, [[0.5, 2.0]] * 2),
            [[1.0] * 2, [-0.3] * 2],
            {},
            [1.2, 1.5, -0.15, -0.15],
        ),
        # 2505.12929: .2 p + .8 at p = 1/2 and 1.
        (shaping.reweighting, hand([[math.log(0.5), 0.0]]), [[-2.0, -2.0]], {}, [-1.8, -2.0]),
        # 2506.01347, lambda .1.
        (shaping.weighted_reinforce, hand([[0.0]] * 2, is_correct=[True, False]), [[1.0], [-1.0]], {}, [0.1, -1.0]),
    ],
)
def test_values_worked_out_by_hand(method, batch, advantages, options, wanted):
    found = method(torch.tensor(advantages, dtype=torch.float64), batch, **options)
    assert found.flatten().tolist() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("mirrors", ["ppl", "position", "ppl+position", "weighted_reinforce"])
def test_scale_matched_is_a_constant_with_the_magnitude_of_what_it_mirrors(case, mirrors):
    advantages, batch = case
    parts = {"ppl": {"alpha": 0.5}, "position": {"start_step": 2}}
    config = ShapingConfig(method="scale_matched", scale_matched={"mirrors": mirrors}, **parts)
    found, is_shaped = shape(advantages, batch, config, step=2, plateau_step=None)
    mirrored, _ = shape(advantages, batch, ShapingConfig(method=mirrors, **parts), step=2, plateau_step=None)
    inside = [(i, t) for i in range(8) for t in range(int(batch.response_mask[i].sum()))]
    scale = sum(abs(mirrored[p].item()) for p in inside) / sum(abs(advantages[p].item()) for p in inside)
    assert is_shaped
    torch.testing.assert_close(found, scale * advantages)
    assert scale != pytest.approx(1, abs=1e-3)


def test_scale_matched_is_on_when_what_it_mirrors_is(case):
    advantages, batch = case
    config = ShapingConfig(method="scale_matched", scale_matched={"mirrors": "position"})
    found, is_shaped = shape(advantages, batch, config, step=5, plateau_step=None)
    assert not is_shaped
    assert torch.equal(found, advantages)
    nothing, _ = shape(torch.zeros(8, 6), batch, config, step=5, plateau_step=1)
    assert torch.equal(nothing, torch.zeros(8, 6))


def test_what_was_released_equals_none_bit_for_bit(case):
    advantages, batch = case
    shaped, _ = shape(advantages, batch, ShapingConfig(method="released_noop"), step=5, plateau_step=1)
    assert torch.equal(shaped, advantages)


def test_ppl_shaping_favours_the_surer_response(case):
    _, batch = case
    pair = replace(
        batch,
        logprobs=torch.tensor([[-0.1], [-0.9]]),
        response_mask=torch.ones(2, 1, dtype=torch.bool),
        group_ids=torch.zeros(2, dtype=torch.int64),
    )
    assert shaping.ppl(torch.ones(2, 1), pair, alpha=0.1).flatten().tolist() == pytest.approx([1.1, 0.9])


def test_position_bonus_is_capped_by_the_advantage(case):
    pair = replace(case[1], response_mask=torch.ones(1, 2, dtype=torch.bool))
    shaped = shaping.position(torch.full((1, 2), 0.02), pair, gamma=10.0)
    assert shaped.flatten().tolist() == pytest.approx([0.02 + min(10 / (1 + math.exp(7.5)), 0.01), 0.03])


def test_entropy_advantage_turns_no_sign(case):
    _, batch = case
    shaped = shaping.entropy_advantage(torch.full((8, 6), -0.2, dtype=torch.float64), batch, alpha=100.0)
    assert (shaped <= -0.1).all()


def test_none_changes_nothing(case):
    advantages, batch = case
    shaped, active = shape(advantages, batch, ShapingConfig(), step=5, plateau_step=1)
    assert not active
    assert torch.equal(shaped, advantages)


def test_composition_is_the_parts_in_order(case):
    advantages, batch = case
    config = ShapingConfig(method="ppl+position", ppl={"alpha": 0.3}, position={"start_step": 1})
    shaped, active = shape(advantages, batch, config, step=1, plateau_step=None)
    assert active
    assert torch.equal(shaped, shaping.position(shaping.ppl(advantages, batch, alpha=0.3), batch))


def test_every_method_is_compared_with_a_loop():
    assert set(LOOPS) | {"ppl_permuted", "scale_matched"} == {
        name for name, spec in METHODS.items() if spec.function.__module__ == shaping.__name__
    }


@pytest.mark.parametrize("name", METHODS)
def test_method_is_described_with_the_defaults_of_its_function(name):
    method = METHODS[name]
    entry = method.describe()
    assert entry["equation"].startswith("A' = ")
    assert entry["source"]
    assert method.parameters(ShapingConfig()) == entry["parameters"]


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


@pytest.mark.parametrize(
    ("options", "waits"),
    [
        ({"method": "none"}, False),
        ({"method": "ppl"}, False),
        ({"method": "ppl+position"}, True),
        ({"method": "position", "position": {"start_step": 3}}, False),
        ({"method": "scale_matched", "scale_matched": {"mirrors": "position"}}, True),
    ],
)
def test_shaping_that_starts_at_the_plateau_waits_for_it(options, waits):
    assert waits_for_plateau(ShapingConfig.model_validate(options)) == waits
