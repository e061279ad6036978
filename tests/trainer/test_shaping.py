"""Test every method against a naive loop, the registry, and windows.

Responses have all lengths, and groups may be uniform.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from entrace.analysis.trace import InputError
from entrace.trainer.algorithm import shaping
from entrace.trainer.algorithm.advantages import ppl_z
from entrace.trainer.algorithm.method import REGISTRY, RolloutView, Window
from entrace.trainer.algorithm.shaping import ShapingConfig, is_on, shape, waits_for_plateau
from entrace.trainer.config import load_config

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


def test_tensors_of_inference_mode_are_shaped_like_others(case):
    advantages, batch = case
    with torch.inference_mode():
        frozen = replace(batch, logprobs=batch.logprobs.clone(), entropy=batch.entropy.clone())
        found, _ = shape(advantages.clone(), frozen, ShapingConfig(method="ppl"), 1, None)
    wanted, _ = shape(advantages, batch, ShapingConfig(method="ppl"), 1, None)
    assert frozen.logprobs.is_inference()
    assert torch.equal(found, wanted)


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
    rng = np.random.default_rng(0)
    return RolloutView(torch.tensor(logprobs).double(), entropy, is_correct, mask, groups, is_correct.double(), rng)


def group_of(rewards, logprobs=None):
    """Return one group of responses of one token each."""
    rows = len(rewards)
    logprob = torch.tensor(logprobs or [-1.0] * rows).double()[:, None]
    values = torch.tensor(rewards).double()
    mask, groups = torch.ones(rows, 1, dtype=torch.bool), torch.zeros(rows, dtype=torch.int64)
    return RolloutView(logprob, -logprob, values == 1, mask, groups, values, np.random.default_rng(0))


def shaped(method, batch, **parameters):
    return getattr(shaping, method)(torch.zeros(len(batch.rewards), 1).double(), batch, **parameters)[:, 0].tolist()


NAN = math.nan
# Of 2 to 7 responses, all numbers of correct ones, in mixed order, one group with a missing verdict.
GROUPS = [[float(i * 3 % n < c) for i in range(n)] for n in (2, 4, 5, 7) for c in range(n + 1)] + [[1.0, NAN, 0.0, 0.0]]


def judged(rewards):
    return [r for r in rewards if not math.isnan(r)]


@pytest.mark.parametrize("rewards", GROUPS)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_pass_at_k_equals_the_released_code(rewards, k):
    """``calc_adv`` of the released code, one response at a time."""
    values = judged(rewards)
    n, c = len(values), int(sum(values))
    wanted = []
    for reward in rewards:
        rho = 1 - math.comb(n - c, k) / math.comb(n, k) if n >= k else 0.0
        sigma = math.sqrt(rho * (1 - rho)) + 1e-6
        if math.isnan(reward) or n < k:
            wanted.append(0.0)
        elif reward == 1:
            wanted.append((1 - rho) / sigma)
        else:
            wanted.append((1 - rho - math.comb(n - c - 1, k - 1) / math.comb(n - 1, k - 1)) / sigma)
    found = shaped("pass_at_k", group_of(rewards), k=k)
    assert found == pytest.approx(wanted, abs=1e-6)
    if c in (0, n):
        assert found == [0.0] * len(rewards)


@pytest.mark.parametrize("rewards", [*GROUPS, [0.3, 0.9, 0.1, 0.9, 0.2], [0.7] * 8])
@pytest.mark.parametrize("quantile", [0.2, 0.4, 0.5, 0.75])
@pytest.mark.parametrize("interpolate", [False, True])
def test_quantile_advantage_equals_paper_and_released_code(rewards, quantile, interpolate):
    """The paper uses the inverse CDF, the released code ``torch.quantile``."""
    values = judged(rewards)
    if interpolate:
        baseline = torch.tensor(values).double().quantile(quantile).item()
    else:
        ordered = sorted(values)
        baseline = next(r for i, r in enumerate(ordered, 1) if i / len(values) >= quantile - 1e-12)
        share = sum(values) / len(values)
        if set(values) <= {0.0, 1.0}:
            assert baseline == (0.0 if share <= 1 - quantile + 1e-12 else 1.0)
    found = shaped("quantile_advantage", group_of(rewards), quantile=quantile, interpolate=interpolate)
    if len(set(values)) == 1:
        # torch.quantile leaves rounding errors here.
        assert all(value == 0 for value in found)
        return
    std = np.std(values, ddof=1)
    wanted = [0.0 if math.isnan(r) else (r - baseline) / (std + 1e-6) for r in rewards]
    assert found == pytest.approx(wanted, abs=1e-7)


def test_unlikeliness_equals_the_released_code():
    """``_compute_advantages`` ranks from the least likely by mean log probability.

    This is the function of the released code.
    """
    rewards, logprobs = [1.0, 0.0, 1.0, NAN, 1.0], [-0.5, -2.0, -1.0, -0.1, -3.0]
    # Ranks of the responses with a verdict 3, 1, 2, 0 of 4; scores 1 - .25 rank / 4.
    scores = [1 - 0.25 * 3 / 4, 0.0, 1 - 0.25 * 2 / 4, 1.0]
    wanted = [(score - np.mean(scores)) / (np.std(scores, ddof=1) + 1e-6) for score in scores]
    found = shaped("unlikeliness", group_of(rewards, logprobs), beta=0.25)
    assert found == pytest.approx([*wanted[:3], 0.0, wanted[3]], abs=1e-6)
    assert found[4] > found[2] > found[0] > 0 > found[1]


def test_a_method_that_replaces_the_advantage_comes_first():
    for method in ("ppl+pass_at_k", "position+unlikeliness"):
        with pytest.raises(ValidationError, match="replaces the advantage, so that what precedes it has no effect"):
            ShapingConfig(method=method)
    assert ShapingConfig(method="pass_at_k+ppl").method == "pass_at_k+ppl"
    for values, message in (
        (
            ["shaping.method=pass_at_k", "shaping.pass_at_k.k=8"],
            "below rollout.group_size; found 8, and a group size of 8",
        ),
        (["shaping.method=unlikeliness", "loss.normalize_std=false"], "loss.normalize_std: has no effect"),
    ):
        with pytest.raises(InputError, match=message):
            load_config("tiny", values)


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
    by_group = {"quantile_advantage", "pass_at_k", "unlikeliness"}
    assert set(LOOPS) | {"ppl_permuted", "scale_matched"} | by_group == {
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
