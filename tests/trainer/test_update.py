import itertools
import math

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from entrace.trainer.algorithm.losses import policy_loss
from entrace.trainer.config import OptimConfig, load_config
from entrace.trainer.faults import TrainingError
from entrace.trainer.kernels.packing import cut_by_tokens
from entrace.trainer.learner import Learner, learning_rate, make_objectives, mini_batches
from entrace.trainer.rollouts import PromptSource, collect_batch
from entrace.trainer.tasks import Score
from tests.slow import slow_after

from .conftest import SMALL, token_advantages


def make_case(policy, task, *overrides):
    config = load_config("tiny", [*SMALL, *overrides])
    learner = Learner(config, policy)
    batch = collect_batch(config, policy, PromptSource(task), step=1)
    return config, learner, batch, token_advantages(config, batch)


def gradients(policy):
    return {name: p.grad.clone() for name, p in policy.model.named_parameters()}


def test_gradient_equals_the_naive_token_mean(policy, task):
    """Take one response at a time, and one denominator for the whole batch.

    Logits are the model's own.
    """
    config, learner, batch, advantages = make_case(policy, task, "optim.grad_clip=1e9")
    learner.update(batch, make_objectives(learner.config, batch, advantages, step=1), step=1)
    # AdamW keeps the first moment: (1 - beta1) * gradient after one step.
    beta1 = learner.optimizer.defaults["betas"][0]
    found = {name: learner.optimizer.state[p]["exp_avg"] / (1 - beta1) for name, p in policy.model.named_parameters()}
    reference = type(policy).load(config.policy)
    kept = torch.nonzero(batch.is_kept).squeeze(1).tolist()
    responses = batch.rollouts.responses()
    denominator = sum(len(responses[row]) for row in kept)
    for row in kept:
        ids = torch.cat((torch.tensor(batch.rollouts.prompt_ids[row]), responses[row]))
        logp = torch.log_softmax(reference.model(ids[None]).logits[0, :-1], -1).gather(1, ids[1:, None]).squeeze(1)
        logp = logp[-len(responses[row]) :]
        loss = policy_loss(logp - logp.detach(), advantages[row, : len(responses[row])], 0.2, 0.28).loss.sum()
        (loss / denominator).backward()
    for name, wanted in gradients(reference).items():
        torch.testing.assert_close(found[name], wanted, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(
    "loss",
    slow_after(
        3,
        [
            ["loss.entropy_coef=0.01", "loss.kl_coef=0.1", "loss.aggregation=constant"],
            ["loss.method=kl_cov", "loss.kl_cov.frac=0.2", "optim.epochs=2"],
            [
                "loss.ratio=sequence",
                "loss.aggregation=sequence_mean",
                "loss.clip_low=3e-4",
                "loss.clip_high=4e-4",
                "optim.epochs=2",
            ],
            ["loss.entropy_coef=0.01"],
            ["loss.method=entropy_mask", "loss.aggregation=sequence_mean"],
            ["loss.method=clip_cov", "loss.clip_cov.low=0.01", "loss.clip_cov.frac=0.1"],
        ],
    ),
)
def test_micro_batches_do_not_change_the_update(policy, task, loss):
    options = [*loss, "optim.lr=1e-4", "optim.warmup_steps=0"]
    config, learner, batch, advantages = make_case(policy, task, *options)
    whole = learner.update(batch, make_objectives(learner.config, batch, advantages, step=1), step=1)
    other = type(policy).load(config.policy)
    cut = Learner(load_config("tiny", [*SMALL, *options, "optim.micro_batch_tokens=100"]), other)
    parts = cut.update(batch, make_objectives(cut.config, batch, advantages, step=1), step=1)
    # The second epoch starts where AdamW went, which may turn rounding of a tiny gradient into a whole step.
    first, second = (1e-6, 1e-4), (1e-5, 2e-3)
    loss_tolerance, norm_tolerance = second if "optim.epochs=2" in options else first
    assert parts.loss == pytest.approx(whole.loss, abs=loss_tolerance)
    assert parts.grad_norm == pytest.approx(whole.grad_norm, rel=norm_tolerance)
    assert whole.grad_norm > 0.01


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_responses_without_an_advantage_are_left_out_and_change_nothing(policy, task, monkeypatch, share):
    """Responses of uniform groups have no advantage and change nothing.

    If no response has an advantage, weight decay and moments continue.
    """
    options = ["rollout.dynamic_sampling=false", "optim.lr=1e-3", "optim.warmup_steps=0", "optim.epochs=2"]
    config, learner, batch, advantages = make_case(policy, task, *options)
    advantages = advantages.clone()
    advantages[: round(len(advantages) * (1 - share))] = 0
    scored = []
    score = type(policy).token_stats
    monkeypatch.setattr(
        type(policy), "token_stats", lambda self, p, r, *a: scored.append(len(r)) or score(self, p, r, *a)
    )
    found = learner.update(batch, make_objectives(learner.config, batch, advantages, step=1), step=1)
    assert sum(scored) <= 2 * max(1, share * len(advantages))
    other = Learner(config, type(policy).load(config.policy))
    monkeypatch.setattr(other, "_places_with_gradient", lambda objective: torch.arange(len(objective.mask)))
    wanted = other.update(batch, make_objectives(other.config, batch, advantages, step=1), step=1)
    assert sum(scored) >= 2 * len(advantages)
    assert (found.loss, found.grad_norm) == pytest.approx((wanted.loss, wanted.grad_norm), rel=1e-4, abs=1e-6)
    before = dict(type(policy).load(config.policy).model.named_parameters())
    for name, parameter in other.policy.model.named_parameters():
        mine = dict(policy.model.named_parameters())[name]
        torch.testing.assert_close(mine, parameter, rtol=1e-3, atol=2e-5)
        assert parameter.ndim < 2 or not torch.equal(mine, before[name]), "weights decay at least"


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("is_padded", [False, True])
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30), max_tokens=st.integers(1, 100))
def test_parts_cover_every_sequence_once_within_the_budget(lengths, max_tokens, is_padded, size):
    all_lengths = torch.tensor(lengths)
    ranks = [cut_by_tokens(all_lengths, max_tokens, is_padded=is_padded, rank=r, size=size) for r in range(size)]
    assert sorted(torch.cat([part for parts in ranks for part in parts]).tolist()) == list(range(len(lengths)))
    counts = [sum(map(len, parts)) for parts in ranks]
    assert max(counts) - min(counts) <= 1

    def tokens(part):
        return int(all_lengths[part].max()) * len(part) if is_padded else int(all_lengths[part].sum())

    for parts in ranks:
        assert all(len(part) == 1 or tokens(part) <= max_tokens for part in parts)
        # None is smaller than it needs to be.
        assert all(tokens(torch.cat((part, after[:1]))) > max_tokens for part, after in itertools.pairwise(parts))
        order = torch.cat(parts) if parts else all_lengths[:0]
        assert torch.equal(order, order.sort().values) or is_padded, "what stands together stays together"


def test_mini_batches_cover_kept_groups_once_an_epoch(policy, task):
    config, _, batch, _ = make_case(policy, task, "optim.mini_batches=3", "optim.epochs=2")
    parts = list(mini_batches(config, batch, step=1))
    kept = torch.nonzero(batch.is_kept).squeeze(1).tolist()
    assert len(parts) == 6
    for epoch in (parts[:3], parts[3:]):
        assert sorted(torch.cat(epoch).tolist()) == kept
    for part in parts:
        groups = batch.group_ids[part]
        assert all((groups == g).sum() == config.rollout.group_size for g in groups.unique())


def test_first_update_has_ratio_one_and_zero_loss(policy, task):
    """A group's advantages sum to zero, so only lengths give a nonzero loss."""
    _, learner, batch, advantages = make_case(policy, task)
    metrics = learner.update(batch, make_objectives(learner.config, batch, advantages, step=1), step=1)
    rows = batch.is_kept
    weights = (advantages[:, 0] * batch.rollouts.lengths)[rows].sum() / batch.rollouts.lengths[rows].sum()
    assert metrics.loss == pytest.approx(-float(weights), abs=1e-4)
    assert (metrics.clip_frac_low, metrics.clip_frac_high, metrics.kl) == (0.0, 0.0, None)


def test_later_epochs_clip(policy, task):
    _, learner, batch, advantages = make_case(policy, task, "optim.epochs=6", "optim.lr=3e-3", "optim.warmup_steps=0")
    metrics = learner.update(batch, make_objectives(learner.config, batch, advantages, step=1), step=1)
    assert metrics.clip_frac_low > 0
    assert metrics.clip_frac_high > 0


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_to_the_reference_starts_at_zero_and_grows(policy, task, estimator):
    _, learner, batch, advantages = make_case(
        policy, task, "loss.kl_coef=0.1", f"loss.kl_estimator={estimator}", "optim.lr=1e-3", "optim.warmup_steps=0"
    )
    first = learner.update(batch, make_objectives(learner.config, batch, advantages, step=1), step=1).kl
    second = learner.update(batch, make_objectives(learner.config, batch, advantages, step=2), step=2).kl
    assert first == pytest.approx(0.0, abs=1e-4)
    assert abs(second) > 10 * abs(first)


def test_kl_pulls_back_to_the_reference(policy, task):
    _, learner, batch, advantages = make_case(policy, task, "loss.kl_coef=1.0", "loss.kl_estimator=k2")
    with torch.no_grad():
        for p in policy.model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    nothing = torch.zeros_like(advantages)
    before = learner.update(batch, make_objectives(learner.config, batch, nothing, step=5), step=5).kl
    for _ in range(10):
        after = learner.update(batch, make_objectives(learner.config, batch, nothing, step=5), step=5).kl
    assert after < before


def test_nan_stops_before_the_weights_change(policy, task):
    _, learner, batch, advantages = make_case(policy, task)
    before = [p.clone() for p in policy.model.parameters()]
    with pytest.raises(TrainingError, match="step 7: loss nan"):
        learner.update(batch, make_objectives(learner.config, batch, advantages * float("nan"), step=7), step=7)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))


def test_learning_rate_warms_up_and_stays():
    optim = OptimConfig(lr=1e-3, warmup_steps=4)
    assert [learning_rate(optim, step, 200) for step in (1, 2, 4, 100)] == pytest.approx([2.5e-4, 5e-4, 1e-3, 1e-3])


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules_from_zero_are_those_of_transformers(schedule, warmup):
    steps = 30
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    reference = transformers.get_scheduler(name, optimizer, warmup, steps)
    optim = OptimConfig(lr=1e-3, warmup_steps=warmup, warmup_from_zero=True, schedule=schedule)
    for step in range(1, steps + 1):
        assert learning_rate(optim, step, steps) == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        reference.step()


def test_schedules_end_at_schedule_steps_and_stay_there():
    optim = OptimConfig(lr=1.0, warmup_steps=2, schedule="cosine", schedule_steps=12)
    # x = (step - 3) / 10.
    expected = [0.5, 1.0, 1.0, (1 + math.cos(math.pi * 0.5)) / 2, 0.0, 0.0]
    assert [learning_rate(optim, step, 99) for step in (1, 2, 3, 8, 13, 40)] == pytest.approx(expected)


@pytest.mark.parametrize("decay_all", [False, True])
def test_weight_decay_spares_vectors_unless_told_otherwise(policy, task, decay_all):
    _, learner, batch, advantages = make_case(
        policy, task, "optim.lr=0.01", "optim.warmup_steps=0", f"optim.decay_all={str(decay_all).lower()}"
    )
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    learner.update(batch, make_objectives(learner.config, batch, torch.zeros_like(advantages), step=1), step=1)
    for name, p in policy.model.named_parameters():
        factor = 1 - 0.01 * 0.1 if p.ndim > 1 or decay_all else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor, rtol=1e-5, atol=1e-8)


def judged_by(task, monkeypatch, verdict):
    """Let ``verdict`` judge completions of a task.

    ``verdict`` maps a completion and its number within the task so far to a score or None.
    """
    count = itertools.count()
    monkeypatch.setattr(task, "score", lambda text, prompt: Score(text, verdict(text, next(count))))
    return task


def test_dynamic_sampling_keeps_mixed_groups_and_bounds_refills(policy, task):
    _, _, batch, advantages = make_case(policy, task, "rollout.max_refills=1")
    is_correct = torch.tensor([score.is_correct for score in batch.scores])
    for group in batch.group_ids.unique():
        is_mixed = len(is_correct[batch.group_ids == group].unique()) > 1
        assert bool(batch.is_kept[batch.group_ids == group].all()) == is_mixed
        if not is_mixed:
            assert {batch.drop_reasons[row] for row in torch.nonzero(batch.group_ids == group)} == {"uniform_group"}
    groups = int(batch.group_ids[-1]) + 1
    first_round = batch.is_kept[: 6 * 4].sum() // 4
    assert groups == 12 - first_round
    assert advantages.isfinite().all()


PENALIZED = ["rollout.overlong_buffer_tokens=60", "rollout.max_refills=0"]


def test_wrong_answers_of_different_length_are_dropped_by_correctness(policy, task, monkeypatch):
    judged_by(task, monkeypatch, lambda text, _: 0.0)
    _, _, batch, _ = make_case(policy, task, *PENALIZED)
    assert batch.length_penalties.unique().numel() > 1
    assert batch.drop_reasons == ["uniform_group"] * len(batch.prompts)
    _, _, batch, _ = make_case(policy, task, *PENALIZED, "rollout.filter_metric=reward")
    for group in batch.group_ids.unique():
        rows = batch.group_ids == group
        assert batch.is_kept[rows].all() == (batch.length_penalties[rows].unique().numel() > 1)
    assert batch.is_kept.any()


def test_penalties_are_on_the_scale_of_rewards(policy, task, monkeypatch):
    judged_by(task, monkeypatch, lambda text, i: float(i % 2))
    _, _, unit, unit_advantages = make_case(policy, task, *PENALIZED)
    _, _, signed, signed_advantages = make_case(policy, task, *PENALIZED, "task.reward_values=[-1, 1]")
    assert unit.rewards.unique().tolist() == [0, 1]
    assert signed.rewards.unique().tolist() == [-1, 1]
    torch.testing.assert_close(signed.length_penalties, 2 * unit.length_penalties)
    torch.testing.assert_close(signed_advantages, unit_advantages, rtol=1e-4, atol=1e-5)
    assert unit.length_penalties.min() >= -0.5


@pytest.mark.parametrize(("when_short", "rounds"), [("fewer", 2), ("more", 4), ("error", None)])
def test_what_follows_when_groups_run_short(policy, task, monkeypatch, when_short, rounds):
    # Groups differ from the fourth round of 6 x 4 responses on.
    judged_by(task, monkeypatch, lambda text, i: float(i >= 72 and i % 2))
    options = [f"rollout.when_short={when_short}", "rollout.max_refills=1"]
    if rounds is None:
        with pytest.raises(TrainingError, match="step 1: after 2 rounds, 0 of 6 groups differ in acc; choose easier"):
            make_case(policy, task, *options)
        return
    _, _, batch, _ = make_case(policy, task, *options)
    assert len(batch.prompts) == rounds * 24
    assert int(batch.is_kept.sum()) == (24 if when_short == "more" else 0)


def test_more_rounds_end_where_no_group_is_ever_mixed(policy, task, monkeypatch):
    judged_by(task, monkeypatch, lambda text, i: 1.0)
    monkeypatch.setattr("entrace.trainer.rollouts.MAX_ROUNDS_IN_VAIN", 3)
    with pytest.raises(TrainingError, match="after 3 rounds, 0 of 6 groups"):
        make_case(policy, task, "rollout.when_short=more", "rollout.max_refills=0")


def test_responses_without_a_verdict_enter_neither_group_mean_nor_loss(policy, task, monkeypatch):
    judged_by(task, monkeypatch, lambda text, i: None if i % 4 == 0 else float(i % 2))
    config, learner, batch, advantages = make_case(policy, task)
    is_judged = torch.arange(len(batch.prompts)) % 4 != 0
    assert torch.equal(batch.has_verdict, is_judged)
    assert torch.equal(batch.is_kept, is_judged)
    assert {batch.drop_reasons[row] for row in torch.nonzero(~is_judged)} == {"no_verdict"}
    # 1, 0, 1 in each group: mean 2/3, standard deviation .5774.
    assert advantages[:4, 0].tolist() == pytest.approx([0, 0.57735, -1.1547, 0.57735], abs=1e-4)
    rows = torch.cat(list(mini_batches(config, batch, 1)))
    assert is_judged[rows].all()
    assert learner.update(batch, make_objectives(learner.config, batch, advantages, step=1), step=1).grad_norm > 0


def test_a_step_without_any_verdict_stops(policy, task, monkeypatch):
    judged_by(task, monkeypatch, lambda text, i: None)
    with pytest.raises(TrainingError, match="step 1: the verifier gave no verdict on any of 24 responses"):
        make_case(policy, task, "rollout.dynamic_sampling=false")


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize("kl_coef", slow_after(1, [0.1, 0.0]))
def test_masked_truncated_responses_enter_the_mean_but_not_the_loss(policy, task, aggregation, kl_coef):
    options = [
        "rollout.dynamic_sampling=false",
        "rollout.max_response_tokens=40",
        "rollout.overlong_buffer_tokens=0",
        f"loss.aggregation={aggregation}",
        f"loss.kl_coef={kl_coef}",
        "optim.grad_clip=1e9",
    ]
    _, learner, batch, advantages = make_case(policy, task, *options, "loss.mask_truncated=true")
    cut = batch.rollouts.is_truncated
    assert 0 < cut.sum() < len(cut)
    assert torch.equal(batch.is_kept, ~cut)
    assert {batch.drop_reasons[row] for row in torch.nonzero(cut)} == {"truncated"}
    # The group's mean and spread are those of all its responses.
    _, _, _, unmasked = make_case(policy, task, *options)
    assert torch.equal(advantages, unmasked)
    found = learner.update(batch, make_objectives(learner.config, batch, advantages, step=1), step=1)
    # At ratio 1 the loss is minus the weighted mean advantage; its denominators differ by aggregation.
    lengths, values = batch.rollouts.lengths.double(), advantages[:, 0].double()
    total = -(values * lengths)[~cut].sum()
    wanted = {
        "token_mean": total / lengths[~cut].sum(),
        "sequence_mean": -values[~cut].sum() / (~cut).sum(),
        "constant": total / (len(cut) * 40),
    }[aggregation]
    assert found.loss == pytest.approx(float(wanted), abs=1e-4)
    assert found.grad_norm > 0


def test_without_dynamic_sampling_everything_is_kept(policy, task):
    _, _, batch, _ = make_case(policy, task, "rollout.dynamic_sampling=false")
    assert batch.is_kept.all()
    assert len(batch.prompts) == 6 * 4
