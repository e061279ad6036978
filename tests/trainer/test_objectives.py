"""Loss-level methods against a loop in float64 and against numbers worked out by hand from the sources' formulas."""

import math

import numpy as np
import pytest
import torch

from entrace.trainer.algorithm import objectives
from entrace.trainer.algorithm.method import REGISTRY, RolloutView
from entrace.trainer.algorithm.objectives import AGGREGATIONS, LossConfig, Objective

from .conftest import token_batch

MAX_TOKENS = 7
METHODS = REGISTRY["loss"]
AGGREGATION_SUMS = ("token_mean", "sequence_mean")


def loop_weights(name, advantages, batch):
    """(w, v, counted) as dictionaries by (row, place), one token at a time."""
    places = [(i, t) for i in range(len(advantages)) for t in range(int(batch.response_mask[i].sum()))]
    a = {p: advantages[p].item() for p in places}
    logp = {p: batch.logprobs[p].item() for p in places}
    mean_a, mean_logp = sum(a.values()) / len(places), sum(logp.values()) / len(places)
    cov = {p: (a[p] - mean_a) * (logp[p] - mean_logp) for p in places}
    w, v, counted = dict.fromkeys(places, 1.0), dict.fromkeys(places, 0.0), set(places)
    if name == "entropy_mask":
        ranked = sorted(places, key=lambda p: -batch.entropy[p].item())
        counted = set(ranked[: max(1, int(0.2 * len(places)))])
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
    return w, v, counted


CONFIGS = {
    "grpo": {},
    "entropy_mask": {},
    "clip_cov": {"clip_cov": {"frac": 0.1, "low": 0.02, "high": 5.0}},
    "kl_cov": {"kl_cov": {"frac": 0.1, "coef": 0.7}},
    "low_ppl_only": {},
    "high_ppl_only": {},
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
    config = LossConfig(method=name, aggregation=aggregation, ratio=ratio, **CONFIGS[name])
    mask = batch.response_mask
    moved = (0.5 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)) * mask
    fast, slow = moved.clone().requires_grad_(), moved.clone().requires_grad_()

    objective = Objective.of(config, advantages, batch, MAX_TOKENS)
    # In parts, as micro-batches come, one of them out of order.
    parts = [torch.tensor([5, 0]), torch.tensor([1, 2, 3, 4]), torch.tensor([6, 7])]
    found = sum(objective.evaluate(fast[rows][mask[rows]], rows).loss.sum() for rows in parts)
    found.backward()

    w, v, counted = loop_weights(name, advantages, token_batch()[1])
    share = loop_share(aggregation, counted, len(mask))
    wanted = torch.zeros((), dtype=torch.float64)
    for i, t in w:
        log_ratio = slow[i, t]
        if ratio == "sequence":
            row = slow[i][mask[i]]
            log_ratio = log_ratio - log_ratio.detach() + row.detach().mean()
        rho, a = log_ratio.exp(), advantages[i, t].item()
        clipped = rho.clamp(0.8, 1.28) if name != "kl_cov" else rho
        loss = w[i, t] * torch.maximum(-rho * a, -clipped * a) + v[i, t] * slow[i, t].abs()
        wanted = wanted + (share((i, t)) * loss if (i, t) in counted else 0)
    wanted.backward()
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(fast.grad, slow.grad, rtol=1e-6, atol=1e-7)
    assert found.abs() > 1e-4


@pytest.mark.parametrize("name", METHODS)
def test_method_is_described_with_the_defaults_of_its_function(name):
    method = METHODS[name]
    entry = method.describe()
    assert entry["source"].startswith("arXiv ")
    assert method.parameters(LossConfig()) == entry["parameters"]


def hand(name="grpo", **config):
    """Two responses, of two tokens and one; ratios 1.1, 0.9 and 1.3; advantages 1 and -1; at most four tokens."""
    batch = RolloutView(
        torch.tensor([[-0.1, -0.5], [-3.0, 0.0]]),
        torch.tensor([[0.2, 0.9], [0.5, 0.0]]),
        torch.tensor([True, False]),
        torch.tensor([[True, True], [True, False]]),
        torch.tensor([0, 0]),
        np.random.default_rng(0),
    )
    advantages = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    objective = Objective.of(LossConfig(method=name, **config), advantages, batch, 4)
    return objective.evaluate(torch.tensor([1.1, 0.9, 1.3]).log(), torch.tensor([0, 1])).loss.sum().item()


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
        ("entropy_mask", {"entropy_mask": {"top_frac": 0.34}}, -0.9),
        ("entropy_mask", {"entropy_mask": {"top_frac": 0.34, "denominator": "all"}}, -0.3),
        # Means A 1/3, ln p -1.2: cov .73, .47, 2.4. Only the third lies between 1 and 5, and has the highest.
        ("clip_cov", {}, -2.0 / 3),
        ("kl_cov", {"kl_cov": {"frac": 0.34}}, (-0.7 + math.log(1.3)) / 3),
        ("low_ppl_only", {}, -1.0),
        ("high_ppl_only", {}, 1.3),
    ],
)
def test_loss_is_the_one_worked_out_by_hand(method, config, loss):
    assert hand(method, **config) == pytest.approx(loss, rel=1e-6)


def test_an_upper_bound_protects_a_positive_advantage():
    assert hand(clip_low=0.2, clip_high=0.05) == pytest.approx((-1.05 - 0.9 + 1.3) / 3)


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
