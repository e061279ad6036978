"""Test loss-level methods against a float64 loop and hand-computed numbers.

The numbers follow the formulas of the sources.
"""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from entrace.trainer.algorithm import objectives
from entrace.trainer.algorithm.method import REGISTRY, RolloutView
from entrace.trainer.algorithm.mini_batch import AGGREGATIONS, LossConfig, Objective

from .conftest import token_batch

MAX_TOKENS = 7
METHODS = REGISTRY["loss"]
AGGREGATION_SUMS = ("token_mean", "sequence_mean")


def loop_passes(name, advantages, batch):
    """Return (w, v, counted) per optimizer step, one token at a time.

    All three are indexed by (row, place).
    """
    places = [(i, t) for i in range(len(advantages)) for t in range(int(batch.response_mask[i].sum()))]
    a = {p: advantages[p].item() for p in places}
    logp = {p: batch.logprobs[p].item() for p in places}
    mean_a, mean_logp = sum(a.values()) / len(places), sum(logp.values()) / len(places)
    cov = {p: (a[p] - mean_a) * (logp[p] - mean_logp) for p in places}
    w, v, counted = dict.fromkeys(places, 1.0), dict.fromkeys(places, 0.0), set(places)
    if name == "entropy_mask":
        ranked = sorted(places, key=lambda p: -batch.entropy[p].item())
        counted = set(ranked[: math.ceil(0.2 * len(places))])
        w = {p: float(p in counted) for p in places}
    elif name == "clip_cov":
        candidates = [p for p in places if 0.02 < cov[p] < 5.0]
        order = np.random.default_rng(1).permutation(len(candidates))[: max(1, int(0.1 * len(places)))]
        for index in order:
            w[candidates[index]] = 0.0
    elif name == "kl_cov":
        for p in sorted(places, key=lambda p: -cov[p])[: max(1, int(0.1 * len(places)))]:
            v[p] = 0.7
    elif name.endswith("ppl_only"):
        sign, counted = (1 if name == "low_ppl_only" else -1), set()
        for group in sorted(set(batch.group_ids.tolist())):
            rows = [i for i in range(len(advantages)) if batch.group_ids[i] == group]
            surprisal = {i: [-logp[p] for p in places if p[0] == i] for i in rows}
            key = {i: sign * sum(s) / len(s) if s else math.inf for i, s in surprisal.items()}
            for i in sorted(rows, key=key.__getitem__)[: math.ceil(0.5 * len(rows))]:
                counted |= {p for p in places if p[0] == i}
        w = {p: float(p in counted) for p in places}
    elif name == "steer":
        change = released_steer_metric(a, logp, {p: batch.entropy[p].item() for p in places})
        low, high = min(change.values()), max(change.values())
        w = {p: 1.2 - (change[p] - low) * 0.4 / (high - low) for p in places}
    elif name == "lopti":
        is_low = {p: float(math.exp(logp[p]) < 0.5) for p in places}
        return [(is_low, v, counted), ({p: 1 - is_low[p] for p in places}, v, counted)]
    return [(w, v, counted)]


def released_steer_metric(a, logp, entropy):
    """Return STEER's ``compute_token_weights`` at the first update.

    |A / p_old * p (1 - p) (ln p + H)|.
    """
    return {p: abs(a[p] / math.exp(x) * math.exp(x) * (1 - math.exp(x)) * (x + entropy[p])) for p, x in logp.items()}


def loop_loss(name, rho, a, p_old, entropy_ratio):
    """Return L of one token and its slope in ln rho."""
    low, high = 0.8, 1.28
    if name == "dcpo":
        # ``get_clip_low_high`` of the released code.
        low = (1 + math.sqrt(max(1 - 4 * 0.16 / p_old, 0))) / 2
        high = min((1 + math.sqrt(1 + 4 * 0.2 / p_old)) / 2, 10)
    if name == "cispo":
        return -min(rho, 1.3) * a, -min(rho, 1.3) * a
    is_low, is_high = rho < low and a < 0, rho > high and a > 0
    if name == "ce_gppo" and (is_low or is_high):
        kept = 0.75 * low if is_low else 1.0 * high
        return -kept * a, -kept * a
    if name == "erc" and not 0.95 < entropy_ratio < 1.05:
        return max(-rho * a, -min(max(rho, low), high) * a), 0.0
    if name != "kl_cov" and (is_low or is_high):
        return -(low if is_low else high) * a, 0.0
    return -rho * a, -rho * a


CONFIGS = {
    "clip_cov": {"clip_cov": {"frac": 0.1, "low": 0.02, "high": 5.0}},
    "kl_cov": {"kl_cov": {"frac": 0.1, "coef": 0.7}},
    "cispo": {"cispo": {"cap": 1.3}},
}


def loop_share(aggregation, counted, num_rows):
    rows = {i: sum(p[0] == i for p in counted) for i in range(num_rows)}
    with_any = sum(n > 0 for n in rows.values())
    return {
        "token_mean": lambda p: 1 / len(counted),
        "sequence_mean": lambda p: 1 / (with_any * rows[p[0]]),
        "constant": lambda p: 1 / (num_rows * MAX_TOKENS),
    }[aggregation]


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradient_equal_the_loop(name, aggregation, ratio):
    advantages, batch = token_batch()
    values = {"method": name, "aggregation": aggregation, "ratio": ratio, **CONFIGS.get(name, {})}
    if name == "dcpo" and ratio == "sequence":
        with pytest.raises(ValidationError, match='method dcpo needs "token", found "sequence"'):
            LossConfig(**values)
        return
    config, mask = LossConfig(**values), batch.response_mask
    generator = torch.Generator().manual_seed(3)
    moved = (0.5 * torch.randn(mask.shape, generator=generator, dtype=torch.float64)) * mask
    entropy = batch.entropy * (1 + 0.1 * torch.randn(mask.shape, generator=generator, dtype=torch.float64))

    objectives = Objective.of(config, advantages, batch, MAX_TOKENS)
    passes = loop_passes(name, advantages, token_batch()[1])
    for objective, (w, v, counted) in zip(objectives, passes, strict=True):
        log_ratio = moved.clone().requires_grad_()
        # In parts, as micro-batches come, one of them out of order.
        parts = [torch.tensor([5, 0]), torch.tensor([1, 2, 3, 4]), torch.tensor([6, 7])]
        found = sum(
            objective.evaluate(log_ratio[rows][mask[rows]], rows, entropy[rows][mask[rows]]).loss.sum()
            for rows in parts
        )
        found.backward()
        share = loop_share(aggregation, counted, len(mask))
        wanted, slopes = 0.0, torch.zeros_like(moved)
        for i, t in w:
            own = moved[i][mask[i]].mean() if ratio == "sequence" else moved[i, t]
            a, p_old = advantages[i, t].item(), batch.logprobs[i, t].exp().item()
            value, slope = loop_loss(name, own.exp().item(), a, p_old, (entropy[i, t] / batch.entropy[i, t]).item())
            scale = share((i, t)) if (i, t) in counted else 0
            wanted += scale * (w[i, t] * value + v[i, t] * abs(moved[i, t].item()))
            slopes[i, t] = scale * (w[i, t] * slope + v[i, t] * math.copysign(1, moved[i, t].item()))
        assert found.item() == pytest.approx(wanted, rel=1e-6, abs=1e-7)
        torch.testing.assert_close(log_ratio.grad, slopes, rtol=1e-6, atol=1e-7)
        assert abs(wanted) > 1e-4


@pytest.mark.parametrize("name", METHODS)
def test_method_is_described_with_the_defaults_of_its_function(name):
    method = METHODS[name]
    entry = method.describe()
    assert entry["source"].startswith("arXiv ")
    assert method.parameters(LossConfig()) == entry["parameters"]


def hand(name="grpo", **config):
    """Return the loss of two small responses.

    The responses have two tokens and one, ratios 1.1, 0.9, and 1.3, and advantages 1 and -1. The limit is four tokens.
    """
    batch = RolloutView(
        torch.tensor([[-0.1, -0.5], [-3.0, 0.0]]),
        torch.tensor([[0.2, 0.9], [0.5, 0.0]]),
        torch.tensor([True, False]),
        torch.tensor([[True, True], [True, False]]),
        torch.tensor([0, 0]),
        torch.tensor([1.0, 0.0]),
        np.random.default_rng(0),
    )
    advantages = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    objectives = Objective.of(LossConfig(method=name, **config), advantages, batch, 4)
    log_ratio = torch.tensor([1.1, 0.9, 1.3]).log()
    return sum(objective.evaluate(log_ratio, torch.tensor([0, 1])).loss.sum().item() for objective in objectives)


@pytest.mark.parametrize(
    ("method", "config", "loss"),
    [
        # Token losses -1.1, -0.9 and 1.3 (the upper bound does not protect a negative advantage).
        ("grpo", {"aggregation": "token_mean"}, -0.7 / 3),  # TRL loss_type "bnpo", "dapo"
        ("grpo", {"aggregation": "sequence_mean"}, (-1.0 + 1.3) / 2),  # TRL loss_type "grpo"
        ("grpo", {"aggregation": "constant"}, -0.7 / 8),  # TRL loss_type "dr_grpo": 2 responses x 4 tokens
        # One ratio per response: sqrt(1.1 x 0.9) and 1.3. TRL importance_sampling_level "sequence".
        ("grpo", {"ratio": "sequence", "aggregation": "sequence_mean"}, (-math.sqrt(0.99) + 1.3) / 2),
        # The bounds of GSPO: 1.3 stays (negative advantage), sqrt(0.99) is not above 1.0004.
        (
            "grpo",
            {"ratio": "sequence", "aggregation": "sequence_mean", "clip_low": 3e-4, "clip_high": 4e-4},
            (-math.sqrt(0.99) + 1.3) / 2,
        ),
        # The entropy .9 is the highest of three: that token alone, or divided by all, as TRL does.
        ("entropy_mask", {"entropy_mask": {"top_frac": 0.33}}, -0.9),
        ("entropy_mask", {"entropy_mask": {"top_frac": 0.33, "denominator": "all"}}, -0.3),
        # 1.02 tokens are two, as in the released code.
        ("entropy_mask", {"entropy_mask": {"top_frac": 0.34}}, (-0.9 + 1.3) / 2),
        # Means A 1/3, ln p -1.2: cov .73, .47, 2.4. Only the third lies between 1 and 5, and has the highest.
        ("clip_cov", {}, -2.0 / 3),
        ("kl_cov", {"kl_cov": {"frac": 0.34}}, (-0.7 + math.log(1.3)) / 3),
        ("low_ppl_only", {}, -1.0),
        ("high_ppl_only", {}, 1.3),
        # (1 - p) |ln p + H|: .0951626 x .1, .3934693 x .4, .9502129 x 2.5; weights 1.2, 1.1750008, .8.
        ("steer", {}, (-1.1 * 1.2 - 0.9 * 1.1750008 + 1.3 * 0.8) / 3),
        # Exponential: .8 to the power of the change divided by the largest.
        ("steer", {"steer": {"mapping": "exponential"}}, (-1.1 * 0.9991065 - 0.9 * 0.9853247 + 1.3 * 0.8) / 3),
        # The bound 1.05 is passed by 1.1 with a positive advantage.
        ("ce_gppo", {"clip_high": 0.05, "ce_gppo": {"keep_high": 0.5}}, (-0.525 - 0.9 + 1.3) / 3),
        ("cispo", {"cispo": {"cap": 1.05}}, (-1.05 - 0.9 + 1.05) / 3),
        # Old probabilities .905, .61, .05: the first may reach (1 + sqrt(1 + .04 / .905)) / 2.
        ("dcpo", {"dcpo": {"high": 0.01}}, (-1.0109322 - 0.9 + 1.3) / 3),
        ("erc", {}, -0.7 / 3),
        ("lopti", {}, -0.7 / 3),
        ("adaptive_entropy", {}, -0.7 / 3),
    ],
)
def test_loss_is_the_one_worked_out_by_hand(method, config, loss):
    assert hand(method, **config) == pytest.approx(loss, rel=1e-6)


def test_an_upper_bound_protects_a_positive_advantage():
    assert hand(clip_low=0.2, clip_high=0.05) == pytest.approx((-1.05 - 0.9 + 1.3) / 3)


def test_adaptive_entropy_moves_its_coefficient_as_trl_does():
    """An update's coefficient is applied if the entropy before it was low.

    This is the controller of TRL 1.16.
    """
    advantages, batch = token_batch()
    entropies = [0.5, 0.15, 0.2, 0.1, 0.3, 0.05, 0.05, 0.4, 0.4, 0.4, 0.1]
    coefficient, last = 0.004, math.inf
    for step, entropy in enumerate(entropies):
        view = replace(batch, past_entropy=tuple(entropies[:step]))
        found = objectives.adaptive_entropy(advantages, view, 0.2, initial=0.004, delta=0.005, highest=0.012)
        assert found.entropy_coef == pytest.approx(coefficient if last <= 0.2 else 0.0)
        moved = coefficient + (0.005 if entropy <= 0.2 else -0.005)
        coefficient, last = min(moved, 0.012) if entropy <= 0.2 else max(moved, 0.0), entropy
    assert coefficient == pytest.approx(0.005)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_bonus_of_adaptive_entropy_is_a_mean_over_tokens_at_any_aggregation(aggregation):
    advantages, batch = token_batch()
    config = LossConfig(method="adaptive_entropy", aggregation=aggregation, adaptive_entropy={"initial": 0.3})
    [objective] = Objective.of(config, advantages, replace(batch, past_entropy=(0.1,)), MAX_TOKENS)
    weights = objective.take(objective.entropy_weights, torch.arange(len(advantages)))
    assert weights.tolist() == pytest.approx([0.305 / len(weights)] * len(weights))


def test_kl_and_entropy_terms_of_lopti_act_on_the_tokens_of_each_pass():
    advantages, batch = token_batch()
    config = LossConfig(method="lopti", aggregation="sequence_mean", entropy_coef=0.1, kl_coef=0.2)
    plain = Objective.of(config.model_copy(update={"method": "grpo"}), advantages, batch, MAX_TOKENS)[0]
    low, high = Objective.of(config, advantages, batch, MAX_TOKENS)
    is_low = batch.logprobs.exp() < 0.5
    for objective, part in ((low, is_low), (high, ~is_low)):
        torch.testing.assert_close(objective.regularized_scale, plain.regularized_scale * part)
        torch.testing.assert_close(objective.entropy_weights, 0.1 * plain.token_scale * part)
        assert (objective.regularized_scale > 0).any()


def test_the_scripts_of_clip_cov_leave_the_ratio_without_a_lower_bound():
    assert METHODS["clip_cov"].settings == {"clip_low": 1.0, "clip_high": 1.0}
    found = hand("clip_cov", clip_low=1.0, clip_high=0.05)
    assert found == pytest.approx((-1.05 - 0.9) / 3)


def test_lopti_takes_the_order_that_is_asked_for():
    advantages, batch = token_batch()
    first, second = objectives.lopti(advantages, batch, low_first=False)
    assert torch.equal(first.token_weights + second.token_weights, batch.response_mask.double())
    assert (batch.logprobs.exp()[first.token_weights > 0] >= 0.5).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "cispo", "dual_clip": 3.0}, "dual_clip: method cispo needs no value, found 3.0"),
        ({"method": "adaptive_entropy", "entropy_coef": 0.1}, "entropy_coef: method adaptive_entropy needs 0.0"),
    ],
)
def test_settings_that_exclude_a_method_are_rejected(values, message):
    with pytest.raises(ValidationError, match=re.escape(message)):
        LossConfig(**values)


def test_shares_sum_to_one_over_what_is_counted():
    _, batch = token_batch()
    for name in AGGREGATION_SUMS:
        assert AGGREGATIONS[name](batch.response_mask, MAX_TOKENS).sum().item() == pytest.approx(1)
        assert AGGREGATIONS[name](torch.zeros(2, 3, dtype=torch.bool), MAX_TOKENS).sum().item() == 0


def test_clip_cov_draws_anew_with_every_mini_batch():
    advantages, batch = token_batch()
    first, second = (objectives.clip_cov(advantages, batch, 0.1, 0.0, 5.0).token_weights for _ in range(2))
    assert (first == 0).sum() == (second == 0).sum() == 2
    assert not torch.equal(first, second)


def test_halves_of_an_even_group_are_disjoint_and_together_all():
    advantages, batch = token_batch()
    batch = batch.take(torch.arange(4, 8))
    low, high = (f(advantages[4:], batch).loss_mask for f in (objectives.low_ppl_only, objectives.high_ppl_only))
    assert not (low & high).any()
    assert torch.equal(low | high, batch.response_mask)
