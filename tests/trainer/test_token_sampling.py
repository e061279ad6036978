"""Test that sampling stored tokens changes nothing else.

Later pruning must give the same trace.
"""

import shutil

import numpy as np
import polars as pl
import pytest
import torch

from entrace.analysis.runs import open_runs
from entrace.analysis.trace import InputError, TraceWriter, read_manifest
from entrace.analysis.trace.parts import list_parts
from entrace.analysis.trace.prune import prune
from entrace.analysis.trace.sampling import TokenSampling, response_draws
from entrace.trainer.config import load_config
from entrace.trainer.dry_run import make_plan, trace_bytes
from entrace.trainer.interventions.candidates import load_candidates
from entrace.trainer.rollouts import PromptSource, collect_batch
from entrace.trainer.runs.record import record_batch, sample_tokens
from entrace.trainer.train import train

from .conftest import SHORT, token_advantages

SHAPE = [*SHORT, "steps=8", "record.flush_every=2", "record.checkpoint_every=4", "record.after_update_every=5"]
FEWER = ["record.after_update_responses=3"]
SAMPLING = TokenSampling(3, 0.5)
SAMPLED = ["record.token_steps=3", "record.token_responses=0.5"]
COMPLETE = ("rollouts", "prompts", "vocab", "evals", "steps")
SECONDS = ("rollout_s", "reward_s", "update_s", "record_s")


def read(run, table):
    paths = list(list_parts(run, read_manifest(run))[table])
    return pl.read_parquet(paths).drop("run_id").drop(SECONDS, strict=False)


def weights(run, step=8):
    return (run / "checkpoints" / f"step-{step:06d}" / "policy" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "full"
    train(load_config("tiny", [*SHAPE, *FEWER]), out, {})
    return out


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "sampled"
    train(load_config("tiny", [*SHAPE, *FEWER, *SAMPLED]), out, {})
    return out


def test_sampling_changes_neither_training_nor_other_tables(full, sampled):
    assert weights(sampled) == weights(full)
    for table in COMPLETE:
        assert read(sampled, table).equals(read(full, table)), table
    assert "token_sampling" not in read_manifest(full)
    assert read_manifest(sampled)["token_sampling"] == {"steps": 3, "responses": 0.5}


def test_whole_responses_of_the_chosen_steps_are_stored(full, sampled):
    everything, tokens = read(full, "tokens"), read(sampled, "tokens")
    assert tokens["step"].unique().sort().to_list() == [1, 3, 5, 6, 8]
    draws = response_draws(0, everything["step"].to_numpy(), everything["rollout_id"].to_numpy())
    wanted = everything.filter(pl.Series(draws < 0.5) & pl.col("step").is_in([1, 3, 5, 6, 8]))
    assert tokens.equals(wanted)
    shares = (
        tokens["rollout_id"].n_unique() / read(full, "rollouts").filter(pl.col("step").is_in([1, 3, 5, 6, 8])).height
    )
    assert 0.35 < shares < 0.65


def test_captured_responses_are_stored(full, sampled):
    """Captured responses are those of a full run, except for unstored ones."""
    everything, found = (
        read(run, "tokens").drop_nulls("logprob_after").select("step", "rollout_id", "position", "logprob_after")
        for run in (full, sampled)
    )
    draws = response_draws(0, everything["step"].to_numpy(), everything["rollout_id"].to_numpy())
    assert everything["rollout_id"].n_unique() == 3
    assert found.equals(everything.filter(pl.Series(draws < 0.5)))


def test_pruning_a_full_trace_equals_recording_a_sampled_one(full, sampled, tmp_path):
    shutil.copytree(full, tmp_path / "run")
    prune(tmp_path / "run", SAMPLING)
    for table in (*COMPLETE, "tokens"):
        assert read(tmp_path / "run", table).equals(read(sampled, table)), table
    assert read_manifest(tmp_path / "run")["token_sampling"] == read_manifest(sampled)["token_sampling"]


@pytest.mark.parametrize("is_pruned", [False, True])
def test_a_resumed_run_stores_the_same_tokens(sampled, full, tmp_path, is_pruned):
    """A pruned run continues as pruned, with the configuration of the full run."""
    options = [*SHAPE, *FEWER, *([] if is_pruned else SAMPLED)]
    shutil.copytree(full if is_pruned else sampled, tmp_path / "run")
    if is_pruned:
        prune(tmp_path / "run", SAMPLING)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000008")
    writer = TraceWriter.resume(tmp_path / "run", 4)
    assert writer.manifest["last_durable_step"] == 4
    train(load_config("tiny", options), tmp_path / "run", {}, resume=True)
    for table in (*COMPLETE, "tokens"):
        assert read(tmp_path / "run", table).equals(read(sampled, table)), table
    assert weights(tmp_path / "run") == weights(sampled)
    assert read_manifest(tmp_path / "run")["token_sampling"] == read_manifest(sampled)["token_sampling"]


def test_processes_store_together_what_one_would_store(policy, task, tmp_path):
    """Each process records the responses that it sampled."""
    config = load_config("tiny", [*SHORT, "record.token_responses=0.4"])
    batch = collect_batch(config, policy, PromptSource(task), step=1)
    shaped = token_advantages(config, batch)
    is_own = torch.arange(len(batch.prompts)) % 2 == 0
    stored = {}
    for name, own in {"one": torch.ones_like(is_own), "even": is_own, "odd": ~is_own}.items():
        batch.is_own = own
        sample = sample_tokens(config, config.record.token_sampling, batch, 1, 9)
        writer = TraceWriter.create(tmp_path / name, {"run_id": "r"}, policy.vocab())
        record_batch(
            writer,
            batch,
            shaped[:, 0],
            shaped,
            None,
            step=1,
            first_rollout_id=9,
            temperature=1.0,
            is_stored=sample.is_stored,
        )
        writer.flush(1)
        stored[name] = set(read(tmp_path / name, "tokens")["rollout_id"])
    assert stored["one"] == stored["even"] | stored["odd"]
    draws = response_draws(0, 1, 9 + np.arange(len(batch.prompts)))
    assert stored["one"] == {9 + row for row in np.flatnonzero(draws < 0.4).tolist()}


def test_a_step_without_stored_responses_in_the_update_captures_nothing(policy, task):
    config = load_config("tiny", [*SHORT, "record.token_steps=50", "record.token_responses=1e-9"])
    batch = collect_batch(config, policy, PromptSource(task), step=2)
    sample = sample_tokens(config, config.record.token_sampling, batch, 2, 0)
    assert len(sample.captured) == 0
    assert not sample.is_stored.any()


def test_interventions_use_stored_responses(full, sampled, tmp_path):
    found, everything = load_candidates(sampled, 4), load_candidates(full, 4)
    assert found["step"].unique().sort().to_list() == [1, 3]
    keys = ["rollout_id", "position"]
    same = everything.join(found.select(keys), on=keys, how="semi").drop("run_id")
    assert found.drop("run_id").equals(same)
    # A file that an interrupted command has left over does not count.
    shutil.copytree(sampled, tmp_path / "run")
    part = next((tmp_path / "run" / "tokens").iterdir())
    shutil.copy(part, part.with_name("part-000001-000002.pruned-1.parquet"))
    assert load_candidates(tmp_path / "run", 4).equals(found)


def test_a_window_without_stored_responses_is_one_line(full, tmp_path):
    shutil.copytree(full, tmp_path / "run")
    prune(tmp_path / "run", TokenSampling(50, 1e-9))
    with pytest.raises(InputError, match=r"or none of which tokens are stored; see record\.token_steps") as refused:
        load_candidates(tmp_path / "run", 4)
    assert "\n" not in str(refused.value)


SIZES = ["rollout.prompts_per_step=24", "rollout.group_size=8", "record.flush_every=8", "record.checkpoint_every=8"]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Train a run with as many prompts per step as in practice."""
    out = tmp_path_factory.mktemp("runs") / "large"
    train(load_config("tiny", [*SHAPE, *SIZES]), out, {})
    return out


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], SAMPLED])
def test_the_predicted_size_is_near_that_of_a_run(large, tmp_path, options):
    """The comparison uses sampled tokens instead of the largest possible number."""
    config = load_config("tiny", [*SHAPE, *SIZES, *options])
    shutil.copytree(large, tmp_path / "run")
    if options:
        prune(tmp_path / "run", SAMPLING)
    plan = make_plan(config)
    share = plan.token_steps / plan.steps * plan.token_responses
    assert (plan.steps, plan.token_steps) == (8, 5 if options else 8)
    assert plan.trace_bytes == trace_bytes(8 * plan.tokens_per_step, 8 * plan.tokens_per_step * share)
    num_tokens = open_runs(tmp_path / "run").sql("select sum(tokens)::bigint from steps").item()
    low, high = trace_bytes(num_tokens, num_tokens * share)
    tables = ("tokens", "rollouts", "steps")
    size = sum(path.stat().st_size for table in tables for path in (tmp_path / "run" / table).iterdir())
    # The footers of files weigh on a short run, and its first steps have the longest responses.
    assert low < size < 1.1 * high


@pytest.mark.parametrize("option", ["record.token_steps=0", "record.token_responses=0", "record.token_responses=1.5"])
def test_values_out_of_range_are_refused(option):
    with pytest.raises(InputError, match=option.partition("=")[0]):
        load_config("tiny", [option])
