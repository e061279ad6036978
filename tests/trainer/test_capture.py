"""Test token statistics after an update.

Statistics are recomputed under the new weights, and recorded every n-th step.
"""

import numpy as np
import polars as pl
import pytest
import torch

from entrace.analysis.trace import TraceWriter, read_manifest
from entrace.trainer.config import load_config
from entrace.trainer.learner import Learner, make_objectives
from entrace.trainer.model.policy import Policy
from entrace.trainer.rollouts import PromptSource, collect_batch
from entrace.trainer.runs.record import record_batch, sample_tokens
from entrace.trainer.sampling.backend import backend_of
from entrace.trainer.train import train

from .conftest import SMALL, token_advantages

SCORED = ["logprob_after", "entropy_after"]
CAPTURED = [*SCORED, "is_clipped"]
# Two epochs with a large step between them, which is certain to clip.
LEAP = ["optim.epochs=2", "optim.lr=5e-3", "optim.warmup_steps=0"]


def read(run_dir, table):
    return pl.read_parquet(run_dir / table / "*.parquet")


@pytest.fixture(scope="module")
def leap(tmp_path_factory):
    """Return a run of four steps that captures steps 2 and 4."""
    out = tmp_path_factory.mktemp("runs") / "leap"
    train(load_config("tiny", [*SMALL, *LEAP]), out, {})
    return out


def with_is_kept(run_dir):
    return read(run_dir, "tokens").join(read(run_dir, "rollouts").select("rollout_id", "is_kept"), on="rollout_id")


def test_values_equal_a_float64_pass_with_the_updated_weights(policy, task, tmp_path):
    config = load_config("tiny", [*SMALL, *LEAP, "rollout.temperature=0.8", "optim.micro_batch_tokens=300"])
    learner = Learner(config, policy)
    batch = collect_batch(config, policy, PromptSource(task), step=1)
    advantages = token_advantages(config, batch)
    metrics = learner.update(batch, make_objectives(learner.config, batch, advantages, step=1), step=1)
    writer = TraceWriter.create(tmp_path / "run", {"run_id": "run"}, policy.vocab())
    after = learner.capture(batch, metrics, torch.nonzero(batch.is_kept).squeeze(1))
    record_batch(writer, batch, advantages[:, 0], advantages, after, step=1, first_rollout_id=0, temperature=0.8)
    writer.flush(1)
    tokens = read(tmp_path / "run", "tokens")
    assert (tokens["logprob"] - tokens["logprob_after"]).abs().max() > 0.1, "the update changed nothing"
    assert 0 < batch.is_kept.sum() < len(batch.is_kept), "no response was excluded"
    model = policy.model.double()
    for row, (prompt, response) in enumerate(zip(batch.rollouts.prompt_ids, batch.rollouts.responses(), strict=True)):
        recorded = tokens.filter(pl.col("rollout_id") == row)
        if not batch.is_kept[row]:
            assert recorded.select(CAPTURED).null_count().row(0) == (len(response),) * 3
            continue
        with torch.no_grad():
            logits = model(torch.cat((torch.tensor(prompt), response))[None]).logits[0, len(prompt) - 1 : -1] / 0.8
        logp = torch.log_softmax(logits, -1)
        wanted = {
            "logprob_after": logp.gather(1, response[:, None]).squeeze(1),
            "entropy_after": -(logp.exp() * logp).sum(-1),
        }
        for name, values in wanted.items():
            torch.testing.assert_close(torch.tensor(recorded[name]).double(), values, rtol=1e-4, atol=2e-5)


def test_other_steps_and_responses_outside_the_update_are_null(leap):
    tokens = with_is_kept(leap)
    assert set(tokens["is_kept"]) == {True, False}
    is_captured = pl.col("is_kept") & (pl.col("step") % 2 == 0)
    for name in CAPTURED:
        assert tokens.select((pl.col(name).is_not_null() == is_captured).all()).item(), name


def test_clipped_tokens_match_the_clip_fraction_of_the_step(leap):
    """The step's fraction is half that of the second epoch.

    There is one update per epoch, and no clipping in the first.
    """
    captured = read(leap, "tokens").drop_nulls("is_clipped")
    per_step = captured.group_by("step", maintain_order=True).agg(pl.col("is_clipped").mean())
    steps = read(leap, "steps").filter(pl.col("step") % 2 == 0)
    assert per_step["is_clipped"].min() > 0.05
    assert per_step["is_clipped"].to_list() == pytest.approx(
        (2 * (steps["clip_frac_low"] + steps["clip_frac_high"])).to_list(), rel=1e-5
    )
    assert captured.filter(pl.col("shaped_advantage") == 0).filter("is_clipped").is_empty()


def test_capturing_fewer_responses_changes_nothing_else(leap, tmp_path):
    """Five kept responses per step have values, equal to those when all are captured."""
    config = load_config("tiny", [*SMALL, *LEAP, "record.after_update_responses=5"])
    train(config, tmp_path / "run", {})
    tokens, everything = with_is_kept(tmp_path / "run"), with_is_kept(leap)
    assert tokens.drop("run_id", *SCORED).equals(everything.drop("run_id", *SCORED))
    scored = tokens.filter(pl.col("logprob_after").is_not_null())
    assert scored.select("is_kept", (pl.col("step") % 2 == 0).alias("is_even")).unique().rows() == [(True, True)]
    assert scored["entropy_after"].null_count() == 0
    same = everything.join(scored.select("rollout_id", "position"), on=["rollout_id", "position"])
    for name in SCORED:
        np.testing.assert_allclose(scored[name], same[name], rtol=1e-4, atol=1e-5)
    assert len(scored) == len(tokens.join(scored, on="rollout_id", how="semi")), "only part of a response has values"
    num_responses = [
        dict(rows.group_by("step").agg(pl.col("rollout_id").n_unique()).rows())
        for rows in (scored, everything.drop_nulls("logprob_after"))
    ]
    assert num_responses[0] == {step: min(5, kept) for step, kept in num_responses[1].items()}
    assert num_responses[0] != num_responses[1]


def test_the_captured_responses_depend_only_on_the_step(small_config, policy, task):
    config = load_config("tiny", [*SMALL, "record.after_update_responses=5"])
    batch = collect_batch(config, policy, PromptSource(task), step=1)

    def captured(config, step):
        return sample_tokens(config, config.record.token_sampling, batch, step, first_rollout_id=7).captured

    chosen = [set(captured(config, step).tolist()) for step in range(2, 82, 2)]
    assert chosen == [set(captured(config, step).tolist()) for step in range(2, 82, 2)]
    kept = torch.nonzero(batch.is_kept).squeeze(1)
    assert all(len(rows) == 5 and rows <= set(kept.tolist()) for rows in chosen)
    assert set.union(*chosen) == set(kept.tolist()), "some response is never chosen"
    assert torch.equal(captured(small_config, 2).sort().values, kept)
    assert len(captured(small_config, 1)) == 0


def test_any_epoch_counts(policy, task):
    """The fraction clipped in any epoch lies between mean and sum over epochs."""
    config = load_config("tiny", [*SMALL, *LEAP, "optim.epochs=5", "optim.mini_batches=2"])
    batch = collect_batch(config, policy, PromptSource(task), step=1)
    advantages = token_advantages(config, batch)
    metrics = Learner(config, policy).update(batch, make_objectives(config, batch, advantages, step=1), step=1)
    share = float(metrics.is_clipped.sum() / batch.rollouts.lengths[batch.is_kept].sum())
    mean = metrics.clip_frac_low + metrics.clip_frac_high
    assert mean < share < 5 * mean
    assert not metrics.is_clipped[~batch.rollouts.response_mask].any()
    assert not metrics.is_clipped[~batch.is_kept].any()


def test_run_json_has_the_state_of_every_fast_path(leap, policy):
    assert read_manifest(leap)["fast_paths"] == backend_of(policy).fast_paths


def test_one_update_clips_nothing(tmp_path):
    train(load_config("tiny", [*SMALL, "steps=2"]), tmp_path / "run", {})
    assert set(read(tmp_path / "run", "tokens").drop_nulls("is_clipped")["is_clipped"]) == {False}


def test_zero_captures_nothing_and_changes_nothing(leap, tmp_path):
    train(load_config("tiny", [*SMALL, *LEAP, "record.after_update_every=0"]), tmp_path / "without", {})
    without, captured = (read(d, "tokens").drop("run_id") for d in (tmp_path / "without", leap))
    assert without.select(CAPTURED).null_count().row(0) == (len(without),) * 3
    assert without.drop(CAPTURED).equals(captured.drop(CAPTURED))
    weights = [d / "checkpoints" / "step-000004" / "policy" / "model.safetensors" for d in (tmp_path / "without", leap)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_step_without_kept_groups_captures_nothing(policy: Policy, task, small_config):
    learner = Learner(small_config, policy)
    batch = collect_batch(small_config, policy, PromptSource(task), step=1)
    batch.is_kept[:] = False
    metrics = learner.update(
        batch, make_objectives(learner.config, batch, torch.zeros(batch.rollouts.response_ids.shape), step=1), step=1
    )
    sample = sample_tokens(small_config, small_config.record.token_sampling, batch, step=2, first_rollout_id=0)
    after = learner.capture(batch, metrics, sample.captured)
    assert metrics.loss == 0.0
    assert not after.is_evaluated.any()
    assert not after.is_clipped.any()
    assert not after.logprob_after.any()
