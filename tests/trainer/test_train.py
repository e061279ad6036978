import json

import numpy as np
import polars as pl
import pytest
import torch

from entrace.analysis.claims import judge
from entrace.analysis.runs import open_runs
from entrace.analysis.trace import InputError, read_manifest
from entrace.analysis.trace.manifest import count_cores
from entrace.trainer import train as train_module
from entrace.trainer.algorithm.plateau import PlateauDetector
from entrace.trainer.config import load_config
from entrace.trainer.learner import TrainingError
from entrace.trainer.train import train
from tests.slow import slow, slow_after

from .conftest import SHORT

# Groups are dropped by correctness; without a penalty, their rewards are uniform then.
RUN = [*SHORT, "rollout.overlong_buffer_tokens=0"]
LABELS = {"study": "test", "arm": "none"}
TABLES = ("tokens", "rollouts", "prompts", "vocab", "evals", "steps")
SECONDS = ("rollout_s", "reward_s", "update_s", "record_s")


def read(run_dir, table):
    frame = pl.read_parquet(run_dir / table / "*.parquet").drop("run_id")
    return frame.drop(SECONDS, strict=False)


def assert_same_trace(one, other):
    for table in TABLES:
        assert read(one, table).equals(read(other, table)), table


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """Train the recorded run that the tests below read."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    seen = []
    train(load_config("tiny", RUN), out, LABELS, on_step=lambda done, **figures: seen.append((done, figures)))
    assert [done for done, _ in seen] == [1, 2, 3, 4]
    assert set(seen[0][1]) == {"reward", "accuracy", "entropy", "tokens_per_s"}
    return out


def test_the_same_seed_gives_the_same_bytes(run_dir, tmp_path):
    train(load_config("tiny", RUN), tmp_path / "again", LABELS)
    assert_same_trace(run_dir, tmp_path / "again")


def test_another_seed_gives_another_run(run_dir, tmp_path):
    train(load_config("tiny", [*RUN, "steps=1", "seed=1"]), tmp_path / "other", LABELS)
    assert not read(tmp_path / "other", "tokens").equals(read(run_dir, "tokens").filter(pl.col("step") == 1))


def test_rows_agree_across_tables(run_dir):
    tokens, rollouts, steps = (read(run_dir, t) for t in ("tokens", "rollouts", "steps"))
    assert rollouts["rollout_id"].to_list() == list(range(len(rollouts)))
    per_rollout = tokens.group_by("rollout_id", maintain_order=True).agg(
        pl.len().alias("n"),
        pl.col("entropy").mean(),
        pl.col("logprob").mean(),
        pl.col("position").max(),
        pl.col("advantage").n_unique().alias("advantages"),
    )
    assert per_rollout["n"].to_list() == rollouts["response_length"].to_list()
    assert (per_rollout["position"] + 1).to_list() == rollouts["response_length"].to_list()
    assert set(per_rollout["advantages"]) == {1}
    np.testing.assert_allclose(per_rollout["entropy"], rollouts["entropy_mean"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(np.exp(-per_rollout["logprob"]), rollouts["ppl"], rtol=1e-4)
    per_step = tokens.group_by("step", maintain_order=True).agg(pl.len(), pl.col("entropy").mean())
    assert per_step["len"].to_list() == steps["tokens"].to_list()
    np.testing.assert_allclose(per_step["entropy"], steps["entropy_token_mean"], rtol=1e-4)
    by_group = rollouts.group_by("step", "prompt_id").agg(pl.col("reward").n_unique() > 1, pl.col("is_kept").first())
    assert (by_group["reward"] == by_group["is_kept"]).all()
    assert (rollouts.filter(~pl.col("is_kept"))["advantage"] == 0).all()


def test_groups_are_numbered_within_the_run(run_dir):
    rollouts = read(run_dir, "rollouts").sort("rollout_id")
    sizes = rollouts.group_by("group_id").agg(
        pl.len(), pl.col("prompt_id", "step").n_unique(), pl.col("rollout_id").min()
    )
    assert set(sizes["len"]) == {4}
    assert set(sizes["prompt_id"]) == set(sizes["step"]) == {1}
    assert sizes["group_id"].to_list() == sizes["rollout_id"].to_list()
    tokens = read(run_dir, "tokens").join(rollouts.select("rollout_id", kept="is_kept"), on="rollout_id")
    assert tokens["is_kept"].to_list() == tokens["kept"].to_list()
    assert set(tokens["is_kept"]) == {True, False}


def test_a_prompt_drawn_twice_in_one_step_is_two_groups(tmp_path):
    """A step larger than an epoch of its file repeats prompts."""
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "{i} + 1 =", "answer": "{i + 1}"}}\n' for i in range(4)))
    settings = [*RUN, f"task.name={tmp_path / 'rows.jsonl'}", "task.num_heldout=2", "task.params={}", "steps=1"]
    train(load_config("tiny", settings), tmp_path / "run", LABELS)
    rollouts = read(tmp_path / "run", "rollouts")
    assert rollouts["prompt_id"].n_unique() == 2
    groups = rollouts.group_by("group_id").agg(pl.col("prompt_id").n_unique(), pl.col("sample_index").sort())
    assert len(groups) >= 6
    assert set(groups["prompt_id"]) == {1}
    assert all(indices.to_list() == [0, 1, 2, 3] for indices in groups["sample_index"])


def test_a_response_without_answer_is_a_format_violation_and_earns_nothing(run_dir):
    rollouts = read(run_dir, "rollouts")
    missing = rollouts.filter(~pl.col("has_answer"))
    assert len(missing) > 0
    assert missing["answer"].is_null().all()
    assert (missing["reward"] <= 0).all()
    assert missing["defects"].list.contains("format_violation").all()
    assert not rollouts.filter("has_answer")["defects"].list.contains("format_violation").any()


def test_completions_carry_their_answers(run_dir):
    rollouts = read(run_dir, "rollouts").filter("has_answer")
    assert all(f"<answer>{r['answer']}" in r["completion"].replace(" ", "") for r in rollouts.to_dicts())


def test_heldout_prompts_are_never_trained_on(run_dir):
    prompts = read(run_dir, "prompts")
    heldout, trained = (set(prompts.filter(pl.col("split") == split)["prompt"]) for split in ("heldout", "train"))
    assert len(heldout) == 6
    assert trained
    assert not heldout & trained
    assert set(read(run_dir, "evals")["prompt_id"]) == set(prompts.filter(pl.col("split") == "heldout")["prompt_id"])


def test_evaluations_begin_with_the_base_policy_and_end_with_the_last(run_dir):
    evals = read(run_dir, "evals")
    assert evals["step"].unique(maintain_order=True).to_list() == [0, 2, 4]
    assert len(evals) == 3 * 6 * 2
    assert ((evals["reward"] >= 1) == evals["is_correct"]).all()


def test_the_manifest_says_what_was_run(run_dir):
    manifest = read_manifest(run_dir)
    assert manifest["status"] == "complete"
    assert manifest["last_durable_step"] == manifest["total_steps"] == 4
    assert manifest["config"] == load_config("tiny", RUN).model_dump(mode="json")
    assert manifest["versions"]["torch"] == torch.__version__
    assert (manifest["run_id"], manifest["study"], manifest["arm"]) == ("whole", "test", "none")


def test_bfloat16_arithmetic_trains_float32_weights(tmp_path):
    """Recorded and trained distributions may differ by rounding only.

    The test runs a GPU's default dtype on the CPU.
    """
    train(load_config("tiny", [*RUN, "policy.dtype=bfloat16", "steps=2"]), tmp_path / "bf16", LABELS)
    steps = read(tmp_path / "bf16", "steps")
    assert steps["grad_norm"].is_between(1e-3, 10).all()
    assert (steps["clip_frac_low"] + steps["clip_frac_high"] < 0.05).all()


class Interrupted(BaseException):
    """Stand for the loss of the machine."""


@pytest.mark.parametrize("last", slow_after(1, [2, 1, 3]))
def test_a_resumed_run_equals_an_uninterrupted_one(run_dir, tmp_path, last):
    def stop(done, **figures):
        if done == last:
            raise Interrupted

    config = load_config("tiny", RUN)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "cut", LABELS, on_step=stop)
    train(config, tmp_path / "cut", LABELS, resume=True)
    assert_same_trace(run_dir, tmp_path / "cut")
    assert read_manifest(tmp_path / "cut")["status"] == "complete"
    policies = [sorted(d.glob("checkpoints/*/policy/model.safetensors"))[-1] for d in (run_dir, tmp_path / "cut")]
    assert policies[0].read_bytes() == policies[1].read_bytes()


@pytest.mark.skipif(count_cores() < 2, reason="needs two cores")
def test_a_resumed_run_keeps_its_number_of_threads(tmp_path):
    def stop(done, **figures):
        raise Interrupted

    # Threads that wait for each other take their time, however little there is to compute.
    short = ["steps=2", "rollout.prompts_per_step=2", "rollout.max_response_tokens=24", "task.num_heldout=2"]
    config = load_config("tiny", [*RUN, *short, "eval.samples=1", "record.checkpoint_every=1"])
    try:
        torch.set_num_threads(2)
        with pytest.raises(Interrupted):
            train(config, tmp_path / "cut", LABELS, on_step=stop)
        torch.set_num_threads(1)
        train(config, tmp_path / "cut", LABELS, resume=True)
        assert torch.get_num_threads() == read_manifest(tmp_path / "cut")["num_threads"] == 2
    finally:
        torch.set_num_threads(1)


def test_arms_are_one_run_until_their_windows_open(run_dir, tmp_path):
    overrides = [*RUN, "shaping.method=position", "shaping.position.start_step=3"]
    train(load_config("tiny", overrides), tmp_path / "late", LABELS)
    for table in ("tokens", "rollouts"):
        base, late = (read(d, table) for d in (run_dir, tmp_path / "late"))
        before = pl.col("step") < 3
        assert late.filter(before).equals(base.filter(before))
    base, late = (read(d, "tokens").filter(pl.col("step") == 3) for d in (run_dir, tmp_path / "late"))
    assert late["logprob"].equals(base["logprob"])
    moved = late["shaped_advantage"] != late["advantage"]
    assert moved.any()
    assert read(tmp_path / "late", "steps")["is_shaped"].to_list() == [False, False, True, True]


def test_a_failed_run_is_marked_and_stays_readable(tmp_path, monkeypatch):
    monkeypatch.setattr(
        train_module,
        "shape",
        lambda a, b, c, step, plateau: (a * float("nan") if step == 3 else a, False),
    )
    config = load_config("tiny", [*RUN, "record.flush_every=2"])
    with pytest.raises(TrainingError, match="step 3: loss nan"):
        train(config, tmp_path / "nan", LABELS)
    manifest = read_manifest(tmp_path / "nan")
    assert (manifest["status"], manifest["last_durable_step"]) == ("failed", 2)
    assert "step 3" in manifest["error"]
    assert read(tmp_path / "nan", "tokens")["step"].unique().to_list() == [1, 2]


def test_an_existing_run_is_not_overwritten(run_dir):
    before = (run_dir / "run.json").read_bytes()
    with pytest.raises(InputError, match="--resume"):
        train(load_config("tiny", RUN), run_dir, LABELS)
    assert (run_dir / "run.json").read_bytes() == before


def test_a_complete_run_is_left_alone_and_another_config_refused(run_dir):
    before = (run_dir / "run.json").read_bytes()
    train(load_config("tiny", RUN), run_dir, LABELS, resume=True)
    assert (run_dir / "run.json").read_bytes() == before
    with pytest.raises(InputError, match=r"optim\.lr is 0\.0003 there, 1\.0 here; not resumed"):
        train(load_config("tiny", [*RUN, "optim.lr=1"]), run_dir, LABELS, resume=True)


@pytest.mark.parametrize("schedule", slow_after(1, [["optim.schedule=cosine", "optim.schedule_steps=9"], []]))
def test_an_extended_run_equals_one_that_was_as_long_from_the_start(run_dir, tmp_path, schedule):
    train(load_config("tiny", [*RUN, *schedule, "steps=2"]), tmp_path / "short", LABELS)
    assert read_manifest(tmp_path / "short")["status"] == "complete"
    train(load_config("tiny", [*RUN, *schedule]), tmp_path / "short", LABELS, resume=True)
    whole = run_dir
    if schedule:
        whole = tmp_path / "whole"
        train(load_config("tiny", [*RUN, *schedule]), whole, LABELS)
    assert_same_trace(whole, tmp_path / "short")
    manifest = read_manifest(tmp_path / "short")
    assert (manifest["status"], manifest["total_steps"], manifest["config"]["steps"]) == ("complete", 4, 4)
    policies = [sorted(d.glob("checkpoints/*/policy/model.safetensors"))[-1] for d in (whole, tmp_path / "short")]
    assert policies[0].read_bytes() == policies[1].read_bytes()


def test_a_run_whose_learning_rate_ends_with_it_is_not_extended(tmp_path):
    falling = [*RUN, "optim.schedule=linear"]
    train(load_config("tiny", [*falling, "steps=2"]), tmp_path / "run", LABELS)
    with pytest.raises(InputError, match=r"cannot be extended from 2 to 4 steps, .* needs optim.schedule_steps"):
        train(load_config("tiny", falling), tmp_path / "run", LABELS, resume=True)
    with pytest.raises(InputError, match="steps is 2 there, 1 here; not resumed"):
        train(load_config("tiny", [*falling, "steps=1"]), tmp_path / "run", LABELS, resume=True)


@pytest.mark.parametrize(
    ("threshold", "remark"), [(5.0, "none of the first"), slow(1.0, None), slow(-1.0, "every one of the")]
)
def test_a_threshold_that_separates_nothing_is_remarked_on(tmp_path, caplog, threshold, remark):
    train(load_config("tiny", [*RUN, "steps=3", f"task.correct_at={threshold}"]), tmp_path / "run", LABELS)
    remarks = [r.message for r in caplog.records if "is correct: their" in r.message]
    assert len(remarks) == (remark is not None)
    if remark:
        assert remark in remarks[0]
        assert f"task.correct_at is {threshold:g}" in remarks[0]
    assert read_manifest(tmp_path / "run")["config"]["task"]["correct_at"] == threshold


def test_a_verifier_may_give_no_verdict(tmp_path, monkeypatch):
    (tmp_path / "shy.py").write_text(
        "def score(completion, row):\n"
        "    return None if 'wait' in completion else float(f'<answer>{row[\"answer\"]}<' in completion)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    train(load_config("tiny", [*RUN, 'task.verifiers={chain_sum="shy:score"}']), tmp_path / "run", LABELS)
    rollouts, evals = read(tmp_path / "run", "rollouts"), read(tmp_path / "run", "evals")
    unjudged = rollouts.filter(pl.col("completion").str.contains("wait"))
    assert len(unjudged) > 0
    assert unjudged["reward"].is_null().all()
    assert unjudged["is_correct"].is_null().all()
    assert not unjudged["is_kept"].any()
    assert unjudged["drop_reason"].unique().to_list() == ["no_verdict"]
    assert (unjudged["advantage"] == 0).all()
    assert read_manifest(tmp_path / "run")["responses_without_verdict"] == len(unjudged)
    judged = rollouts.filter(pl.col("reward").is_not_null())
    accuracy = judged.group_by("step").agg(pl.mean("is_correct")).sort("step")["is_correct"]
    np.testing.assert_allclose(read(tmp_path / "run", "steps").sort("step")["accuracy"], accuracy, rtol=1e-6)
    assert evals["is_correct"].is_null().any()
    assert (evals["is_correct"].is_null() == evals["reward"].is_null()).all()
    runs = open_runs(tmp_path / "run")
    for stem in ("correctness_by_ppl", "defects_over_steps", "stage_dynamics", "eval_outcomes"):
        runs.query(stem)
    assert judge(runs)


def test_a_run_short_of_memory_goes_on_with_smaller_micro_batches(run_dir, tmp_path):
    def stop(done, **figures):
        if done == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(load_config("tiny", RUN), tmp_path / "cut", LABELS, on_step=stop)
    less = load_config("tiny", [*RUN, "optim.micro_batch_tokens=64"])
    train(less, tmp_path / "cut", LABELS, resume=True)
    manifest = read_manifest(tmp_path / "cut")
    assert (manifest["status"], manifest["config"]["optim"]["micro_batch_tokens"]) == ("complete", 64)
    np.testing.assert_allclose(read(tmp_path / "cut", "steps")["loss"], read(run_dir, "steps")["loss"], atol=1e-4)


def test_a_foreign_schema_version_is_refused(run_dir, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({**read_manifest(run_dir), "schema_version": 99}))
    with pytest.raises(InputError, match="schema_version 99"):
        read_manifest(tmp_path)


def test_a_run_without_a_plateau_says_that_position_shaping_stayed_off(tmp_path, caplog):
    train(load_config("tiny", [*RUN, "shaping.method=position"]), tmp_path / "run", LABELS)
    assert "no plateau was detected in 4 steps, so shaping that starts at the plateau stayed off" in caplog.text
    assert read_manifest(tmp_path / "run")["plateau_step"] is None
    assert not read(tmp_path / "run", "steps")["is_shaped"].any()


def test_the_detected_plateau_is_recorded(tmp_path):
    # With a window of two steps and any change tolerated, the seventh step follows the first plateau.
    detector = ["shaping.plateau.window_steps=2", "shaping.plateau.tolerance=1.0", "steps=8"]
    train(load_config("tiny", [*RUN, *detector]), tmp_path / "run", LABELS)
    found = read_manifest(tmp_path / "run")["plateau_step"]
    steps = read(tmp_path / "run", "steps")
    expected = PlateauDetector(load_config("tiny", detector).shaping.plateau)
    for entropy, accuracy in steps.select("entropy_token_mean", "accuracy").iter_rows():
        expected.update(entropy, accuracy)
    assert found == expected.plateau_step
