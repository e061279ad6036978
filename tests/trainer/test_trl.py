"""Test recorded runs of TRL: bit-identical weights and a correct trace.

The trace must agree with independent passes and counts.
"""

import json
import logging
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
import torch
from peft import LoraConfig
from trl import GRPOTrainer, RLOOTrainer

import entrace
from entrace.analysis import queries
from entrace.analysis.trace import InputError
from entrace.trainer.algorithm.method import RolloutView
from entrace.trainer.algorithm.shaping import shape
from entrace.trainer.live import arguments
from entrace.trainer.live.batches import eos_ids
from entrace.trainer.live.recording import first_truths
from entrace.trainer.live.tracer import UNIFORM_ROUNDING
from entrace.trainer.seeding import Stream, generator
from entrace.trl import Traced, TracedGRPOTrainer, TracedRLOOTrainer
from tests.patience import HANG_S
from tests.slow import slow_after, slow_except

from . import trl_runs
from .trl_runs import (
    TracedWitnessGRPO,
    TracedWitnessRLOO,
    WitnessGRPO,
    WitnessRLOO,
    bare_policy,
    build,
    dataset,
    is_right,
    is_short,
    manifest,
    table,
    teacher_forced,
    weights,
)

# Largest difference from an independent pass, nats: the order in which floats are added differs.
TOLERANCE = 2e-5
SLOW = pytest.mark.slow
LORA = LoraConfig(r=4, lora_alpha=16, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], init_lora_weights=False)

CASES = {
    "defaults": {},
    "slices and iterations": {
        "steps_per_generation": 4,
        "num_iterations": 2,
        "max_steps": 8,
        "per_device_train_batch_size": 4,
    },
    "accumulation": {"gradient_accumulation_steps": 2, "max_steps": 2},
    "two batches per update": {"gradient_accumulation_steps": 4, "steps_per_generation": 2, "max_steps": 2},
    "masked truncation": {"mask_truncated_completions": True, "max_completion_length": 30, "max_steps": 2},
    "several rewards": {
        "rewards": (is_right, is_short),
        "reward_weights": [1.0, 0.5],
        "scale_rewards": "batch",
        "shuffle_dataset": False,
        "max_steps": 2,
    },
    "reference": {"beta": 0.1, "scale_rewards": "none", "temperature": 0.7, "max_steps": 2},
    "adapter with dropout": {"peft": LORA, "max_steps": 2},
    "adapter and reference": {"peft": LORA, "beta": 0.1, "max_steps": 2},
    "leave one out": {"beta": 0.05, "num_iterations": 2, "max_steps": 4},
}
MEASURES = ("logprob", "entropy")
QUICK = {
    "slices and iterations",
    "leave one out",
    "adapter with dropout",
}


@pytest.fixture(scope="module", params=slow_except(QUICK, CASES))
def recorded(request, tmp_path_factory):
    """Return the trainer, its folder, and the weights of an unrecorded run."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("trl")
    is_rloo = request.param == "leave one out"
    plain = build(WitnessRLOO if is_rloo else WitnessGRPO, out / "plain", **CASES[request.param])
    plain.train()
    traced = build(
        TracedWitnessRLOO if is_rloo else TracedWitnessGRPO,
        out / "traced",
        traced={"trace": out / "run", "correct": "is_right", "after_update_every": 2, "flush_every": 2},
        **CASES[request.param],
    )
    traced.train()
    return traced, out / "run", weights(plain)


def test_weights_equal_those_of_plain_trl(recorded):
    trainer, _, expected = recorded
    found = weights(trainer)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_steps_responses_and_rewards_are_those_of_the_generation_batches(recorded):
    trainer, folder, _ = recorded
    rollouts, steps = table(folder, "rollouts"), table(folder, "steps")
    assert manifest(folder)["status"] == "complete"
    assert steps["step"].to_list() == list(range(1, len(trainer.batches) + 1))
    assert manifest(folder)["total_steps"] == len(trainer.batches)
    ends = {*eos_ids(trainer), trainer._tokenizer.pad_token_id}
    for step, batch in enumerate(trainer.batches, 1):
        rows = rollouts.filter(step=step)
        assert rows["completion"].to_list() == batch["completions"]
        assert rows["response_length"].to_list() == [len(ids) for ids in batch["ids"]]
        is_truncated = [ids[-1] not in ends for ids in batch["ids"]]
        assert rows["is_truncated"].to_list() == is_truncated
        count = len(batch["ids"])
        groups = np.arange(count) // trainer.num_generations
        first = (step - 1) * count
        assert rows["rollout_id"].to_list() == list(range(first, first + count))
        assert rows["group_id"].to_list() == (first + groups * trainer.num_generations).tolist()
        scores = batch["rewards"]
        total = (scores * trainer.reward_weights).nansum(1)
        np.testing.assert_allclose(rows["reward"], total, rtol=1e-6)
        assert rows["is_correct"].to_list() == (scores[:, 0] >= 1).tolist()
        np.testing.assert_allclose(rows["advantage"], batch["advantages"], atol=UNIFORM_ROUNDING)
        uniform = [np.ptp(total[groups == group]) == 0 for group in groups]
        if not isinstance(trainer, RLOOTrainer):
            assert all(x == 0 for x, same in zip(rows["advantage"], uniform, strict=True) if same)
        masked = np.array(is_truncated) & trainer.mask_truncated_completions
        assert rows["is_kept"].to_list() == (~masked).tolist()
        assert rows["drop_reason"].to_list() == ["truncated" if cut else None for cut in masked]
        expected = float((scores[:, 0] >= 1).double().mean())
        assert steps.filter(step=step)["accuracy"].item() == pytest.approx(expected)
        before = [other for other in trainer.batches[: step - 1] if other["global_step"] < batch["global_step"]]
        assert set(rows["policy_step"]) == {len(before)}
    prompts = dict(table(folder, "prompts").select("prompt_id", "prompt").iter_rows())
    assert [prompts[p] for p in rollouts["prompt_id"]] == [
        text for batch in trainer.batches for text in batch["prompts"]
    ]
    answers = dict(table(folder, "prompts").select("prompt", "ground_truth").iter_rows())
    assert answers == {
        row["prompt"][0]["content"]: row["solution"] for row in dataset() if row["prompt"][0]["content"] in answers
    }


def test_values_agree_with_an_independent_pass(recorded):
    trainer, folder, _ = recorded
    tokens = table(folder, "tokens")
    model = bare_policy(trainer)
    for step, batch in enumerate(trainer.batches, 1):
        model.load_state_dict(batch["weights"])
        expected = [
            teacher_forced(model, p, ids, trainer.temperature)
            for p, ids in zip(batch["prompt_ids"], batch["ids"], strict=True)
        ]
        rows = tokens.filter(step=step)
        assert rows["token_id"].to_list() == [i for ids in batch["ids"] for i in ids]
        np.testing.assert_allclose(rows["logprob"], np.concatenate([e[0] for e in expected]), atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(rows["entropy"], np.concatenate([e[1] for e in expected]), atol=TOLERANCE, rtol=0)
        means = table(folder, "rollouts").filter(step=step)["surprisal_mean"]
        np.testing.assert_allclose(means, [-e[0].mean() for e in expected], atol=TOLERANCE)
        assert rows["rollout_id"].n_unique() == len(expected)


def test_values_after_the_update_are_those_of_the_updated_policy(recorded):
    trainer, folder, _ = recorded
    tokens = table(folder, "tokens").filter(pl.col("logprob_after").is_not_null())
    model = bare_policy(trainer)
    steps = list(range(2, len(trainer.batches) + 1, 2))
    assert tokens["step"].unique().to_list() == steps
    for step in steps:
        later = trainer.batches[step]["weights"] if step < len(trainer.batches) else weights(trainer)
        if (
            step < len(trainer.batches)
            and trainer.batches[step]["global_step"] == trainer.batches[step - 1]["global_step"]
        ):
            later = trainer.weights_at[trainer.batches[step]["global_step"] + 1]
        model.load_state_dict(later)
        batch = trainer.batches[step - 1]
        rows = tokens.filter(step=step)
        index = (rows["rollout_id"] - (step - 1) * len(batch["ids"])).unique(maintain_order=True)
        expected = [teacher_forced(model, batch["prompt_ids"][i], batch["ids"][i], trainer.temperature) for i in index]
        np.testing.assert_allclose(
            rows["logprob_after"], np.concatenate([e[0] for e in expected]), atol=TOLERANCE, rtol=0
        )
        np.testing.assert_allclose(
            rows["entropy_after"], np.concatenate([e[1] for e in expected]), atol=TOLERANCE, rtol=0
        )


def test_measures_of_the_update_are_recorded(recorded):
    trainer, folder, _ = recorded
    steps = table(folder, "steps")
    for name in ("loss", "grad_norm", "lr", "clip_frac_low", "clip_frac_high", "rollout_s", "reward_s", "update_s"):
        assert steps[name].null_count() == 0, name
    assert steps["lr"].to_list() == pytest.approx([1e-4] * steps.height)
    assert (steps["kl"].null_count() == 0) == bool(trainer.args.beta)
    tokens = table(folder, "tokens")
    assert (tokens["reference_logprob"].null_count() == 0) == bool(trainer.args.beta)
    # TRL 1.14 and 1.15 compute no entropies of the reference model.
    has_entropies = bool(trainer.args.beta) and (
        trainer._entrace.passes.has_reference_entropy or trainer.ref_model is None
    )
    assert ("reference_entropy" in tokens.columns) == has_entropies
    if has_entropies:
        first, batch = tokens.filter(step=1), trainer.batches[0]
        if trainer.ref_model is None:
            # The base model of an adapter does not change.
            with trainer.model.disable_adapter():
                pairs = zip(batch["prompt_ids"], batch["ids"], strict=True)
                expected = [teacher_forced(trainer.model.eval(), *pair, trainer.temperature) for pair in pairs]
            wanted = {name: np.concatenate([row[i] for row in expected]) for i, name in enumerate(MEASURES)}
        else:
            # The first batch comes from the reference policy itself.
            wanted = {name: first[name] for name in MEASURES}
        for name in MEASURES:
            np.testing.assert_allclose(first[f"reference_{name}"], wanted[name], atol=TOLERANCE, rtol=0)
        later = tokens.filter(step=tokens["step"].max())
        assert later["reference_entropy"].null_count() == 0
        assert (later["reference_entropy"] != later["entropy"]).any()
    # TRL 1.14 has no fused LM head to ask for sums of squared probabilities.
    assert (tokens["grad_norm"].null_count() == 0) == (trainer._entrace.passes.probe is not None)
    unknown = manifest(folder)["unknown"]
    for name in ("tokens", "rollouts", "steps"):
        frame = table(folder, name)
        assert not [c for c in frame.columns if f"{name}.{c}" in unknown and frame[c].null_count() < frame.height]


def expected_shaping(trainer, step, shaping, statistics):
    """Shape one batch by hand.

    Each response has only its own tokens, and statistics come from an independent pass.
    """
    batch = trainer.batches[step - 1]
    width = max(map(len, batch["ids"]))
    logprob, entropy = (
        torch.tensor(np.array([np.pad(row[i], (0, width - len(row[i]))) for row in statistics]), dtype=torch.float32)
        for i in range(2)
    )
    mask = torch.arange(width) < torch.tensor([len(ids) for ids in batch["ids"]])[:, None]
    groups = torch.arange(len(batch["ids"])) // trainer.num_generations
    rng = generator(trainer.args.seed, Stream.SHAPING, step)
    rewards = batch["rewards"][:, 0]
    view = RolloutView(logprob, entropy, rewards >= 1, mask, groups, rewards, rng)
    advantage = batch["raw"][:, None].expand(mask.shape)
    return shape(advantage, view, arguments.shaping_config(shaping), step, None)[0], mask


class RawAdvantages:
    """Keep the advantages that TRL computes, below the recorder."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.raw = output["advantages"].clone()
        return output


class ShapedGRPO(Traced, trl_runs.Witness, RawAdvantages, GRPOTrainer):
    pass


class ShapedRLOO(Traced, trl_runs.Witness, RawAdvantages, RLOOTrainer):
    pass


SHAPINGS = {
    # One slice: the loss's own pass comes before its advantages are used.
    "in the loss": (ShapedGRPO, ["ppl", "entropy_advantage"], {}),
    # Several slices: an extra pass, or TRL's own one.
    "before slices": (
        ShapedGRPO,
        {"method": ["ppl", "position"], "ppl": {"alpha": 0.2}, "position": {"start_step": 1}},
        {"gradient_accumulation_steps": 2},
    ),
    "with old values": (ShapedGRPO, "reweighting", {"num_iterations": 2}),
    "per response": (ShapedRLOO, {"method": "ppl", "ppl": {"alpha": 0.2}}, {}),
}


@pytest.mark.parametrize("case", slow_after(2, SHAPINGS))
def test_shaped_advantages_enter_the_loss_and_the_trace(case, tmp_path):
    cls, shaping, changed = SHAPINGS[case]
    trainer = build(
        cls, tmp_path / "out", traced={"trace": tmp_path / "run", "shaping": shaping}, max_steps=2, **changed
    )
    trainer.train()
    tokens = table(tmp_path / "run", "tokens")
    assert table(tmp_path / "run", "steps")["is_shaped"].all()
    model = bare_policy(trainer)
    for step, batch in enumerate(trainer.batches, 1):
        model.load_state_dict(batch["weights"])
        pairs = zip(batch["prompt_ids"], batch["ids"], strict=True)
        statistics = [teacher_forced(model, prompt, ids, trainer.temperature) for prompt, ids in pairs]
        shaped, mask = expected_shaping(trainer, step, shaping, statistics)
        rows = tokens.filter(step=step)
        np.testing.assert_allclose(rows["shaped_advantage"], shaped[mask], atol=1e-4)
        assert (rows["shaped_advantage"] - rows["advantage"]).abs().max() > 1e-3
        # What the loss read, by the tokens of each response.
        by_ids = {tuple(ids): row for ids, row in zip(batch["ids"], shaped, strict=True)}
        for loss in (loss for loss in trainer.losses if loss["batch"] == step - 1):
            for ids, seen, given in zip(
                loss["completion_ids"], loss["completion_mask"], loss["advantages"], strict=True
            ):
                own = by_ids[tuple(ids[seen.bool()].tolist())]
                length = int(seen.sum())
                np.testing.assert_allclose(given.expand(len(ids))[:length], own[:length], atol=1e-4)


def test_a_method_of_tokens_is_refused_where_advantages_are_per_response(tmp_path):
    shaping = {"method": "position", "position": {"start_step": 1}}
    trainer = build(TracedRLOOTrainer, tmp_path / "out", traced={"trace": tmp_path / "run", "shaping": shaping})
    with pytest.raises(
        InputError, match=r"position gives the tokens of a response different advantages, and TracedRLOO"
    ):
        trainer.train()
    assert manifest(tmp_path / "run")["status"] == "failed"


def test_an_extra_pass_is_logged_once_and_only_where_needed(tmp_path, caplog):
    def passes(name, **changed):
        caplog.clear()
        traced = {"trace": tmp_path / name, "after_update_every": 0, **changed.pop("traced", {})}
        build(TracedGRPOTrainer, tmp_path / "out", traced=traced, max_steps=2, **changed).train()
        return [record.message for record in caplog.records if "extra forward pass" in record.message]

    with caplog.at_level(logging.WARNING, "entrace"):
        assert passes("aligned", gradient_accumulation_steps=2) == []
        (message,) = passes("shaped", gradient_accumulation_steps=2, traced={"shaping": "ppl"})
    assert message.endswith("where shaping needs the whole generation batch before its first slice")


def test_truncated_sampling_is_logged_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "entrace"):
        build(TracedGRPOTrainer, tmp_path / "out", traced={"trace": tmp_path / "run"}, top_p=0.9, top_k=5)
    messages = [record.message for record in caplog.records if "as recorded" in record.message]
    assert messages == ["top_p=0.9, top_k=5: TRL's log-probabilities and entropies, as recorded, are those without it"]


def test_resuming_continues_the_trace_without_duplicates(tmp_path):
    settings = {
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 5,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    held = dataset(2)

    def make(name):
        return build(
            TracedGRPOTrainer,
            tmp_path / name,
            eval_dataset=held,
            traced={"trace": tmp_path / f"{name}-run"},
            max_steps=5,
            **settings,
        )

    whole = make("whole")
    whole.train()
    broken = make("broken")
    generate, calls = broken._generate_single_turn, []

    def fail_in_the_fourth_step(*args):
        calls.append(broken.model.training)
        if sum(calls) == 4:
            raise KeyboardInterrupt
        return generate(*args)

    broken._generate_single_turn = fail_in_the_fourth_step
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    assert manifest(tmp_path / "broken-run")["status"] == "running"
    resumed = make("broken")
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken/checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(resumed).values(), strict=True))
    timed = [name for name in table(tmp_path / "whole-run", "steps").columns if name.endswith("_s")]
    for name in ("steps", "rollouts", "tokens", "evals", "prompts"):
        frames = [
            table(tmp_path / f"{run}-run", name).drop("run_id", *timed, strict=False) for run in ("whole", "broken")
        ]
        assert frames[0].equals(frames[1], null_equal=True), name
    assert manifest(tmp_path / "broken-run")["status"] == "complete"
    assert manifest(tmp_path / "broken-run")["checkpoints"] == {"2": 2, "4": 4, "5": 5}


@SLOW
def test_a_checkpoint_inside_a_generation_batch_drops_the_batch(tmp_path):
    """TRL generates anew on resuming; the step that it had begun is replaced."""
    settings = {"steps_per_generation": 4, "save_strategy": "steps", "save_steps": 6, "save_total_limit": 5}
    first = build(TracedGRPOTrainer, tmp_path / "out", traced={"trace": tmp_path / "run"}, max_steps=8, **settings)
    first.train()
    assert manifest(tmp_path / "run")["checkpoints"] == {"6": 1, "8": 2}
    second = build(TracedGRPOTrainer, tmp_path / "out", traced={"trace": tmp_path / "run"}, max_steps=10, **settings)
    second.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-6"))
    assert table(tmp_path / "run", "steps")["step"].to_list() == [1, 2]
    rollouts = table(tmp_path / "run", "rollouts")
    assert rollouts["rollout_id"].to_list() == list(range(64))
    assert table(tmp_path / "run", "tokens")["policy_version"].unique().to_list() == [0, 6]


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    first = build(
        TracedGRPOTrainer,
        tmp_path / "out",
        traced={"trace": tmp_path / "a"},
        max_steps=1,
        save_strategy="steps",
        save_steps=1,
    )
    first.train()
    build(TracedGRPOTrainer, tmp_path / "other", traced={"trace": tmp_path / "b"}, max_steps=1).train()
    second = build(TracedGRPOTrainer, tmp_path / "out", traced={"trace": tmp_path / "b"}, max_steps=2)
    with pytest.raises(InputError, match="holds no step that ends at the checkpoint of optimizer step 1"):
        second.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-1"))
    third = build(TracedGRPOTrainer, tmp_path / "out", traced={"trace": tmp_path / "a"})
    with pytest.raises(InputError, match=r"already holds files; choose another folder for trace, or resume with train"):
        third.train()


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Train with two held-out sets, evaluated before, during, and after training."""
    folder = tmp_path_factory.mktemp("evaluated")
    trainer = build(
        TracedGRPOTrainer,
        folder / "out",
        eval_dataset={"easy": dataset(3), "hard": dataset(5)},
        traced={"trace": folder / "run"},
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
        num_generations_eval=2,
        per_device_eval_batch_size=4,
        max_steps=3,
    )
    trainer.train()
    trainer.evaluate()
    trainer.evaluate(dataset(2), metric_key_prefix="eval_extra")
    return trainer, folder / "run"


def test_evaluations_are_recorded_by_set_and_step(evaluated):
    _, folder = evaluated
    evals = table(folder, "evals")
    counts = evals.group_by("step", "benchmark").len().sort("step", "benchmark").rows()
    assert counts == [
        (step, name, size)
        for step in (0, 2, 3)
        for name, size in [("easy", 6), ("extra", 4), ("hard", 10)]
        if name != "extra" or step == 3
    ]
    assert (
        evals.group_by("step", "benchmark", "prompt_id")
        .agg(pl.col("sample_index").sort())
        .select((pl.col("sample_index") == [0, 1]).all())
        .item()
    )
    assert evals["entropy_mean"].null_count() == evals["is_correct"].null_count() == 0
    assert evals["is_correct"].to_list() == (evals["reward"] >= 1).to_list()
    prompts = table(folder, "prompts")
    assert set(evals["prompt_id"]) <= set(prompts["prompt_id"])
    assert manifest(folder)["status"] == "complete"
    assert "evals" not in manifest(folder)["unknown"]


def test_every_question_and_claim_can_be_asked(evaluated, command):
    _, folder = evaluated
    runs = entrace.open_runs(str(folder))
    for stem, path in queries.BUILT_IN.paths.items():
        if path.parent.name != "claims":
            runs.query(stem)
    assert runs.query("entropy_by_position").height
    assert {verdict.claim for verdict in entrace.judge(runs)} >= {"S1", "E1"}
    code, out, err = command("claims", str(folder))
    assert (code, bool(out)) == (0, True), err


def environment(prompts, trainer):
    """Return the result of a rollout function: two turns with context in between.

    Log-probabilities are those of an engine.
    """
    chats = [trainer._tokenizer.apply_chat_template(p, add_generation_prompt=True)["input_ids"] for p in prompts]
    rng = np.random.default_rng(len(trainer.batches))
    ids = [
        [*rng.integers(4, 500, size=size).tolist(), trainer._tokenizer.eos_token_id]
        for size in rng.integers(4, 9, len(chats))
    ]
    mask = [[1, 1, 0, 0] + [1] * (len(row) - 4) for row in ids]
    logprobs = [[-0.5] * len(row) for row in ids]
    return {"prompt_ids": chats, "completion_ids": ids, "logprobs": logprobs, "env_mask": mask}


def test_context_and_the_log_probabilities_of_an_engine_are_recorded(tmp_path):
    trainer = TracedWitnessGRPO(
        model=trl_runs.POLICY,
        reward_funcs=[is_short],
        args=trl_runs.config(tmp_path / "out", max_steps=2),
        train_dataset=dataset(),
        rollout_func=environment,
        trace=tmp_path / "run",
        shaping={"method": "position", "position": {"start_step": 1}},
    )
    trainer.train()
    rows = table(tmp_path / "run", "tokens")
    context = rows.filter(~pl.col("loss_mask"))
    assert set(context["position"]) == {2, 3}
    assert context.height == 2 * table(tmp_path / "run", "rollouts").height
    for name in ("logprob", "entropy", "advantage", "shaped_advantage", "sampling_logprob", "grad_norm"):
        assert context[name].null_count() == context.height, name
    generated = rows.filter("loss_mask")
    assert generated["sampling_logprob"].unique().to_list() == [-0.5]
    lengths = table(tmp_path / "run", "rollouts").select(pl.col("response_length") - pl.col("generated_length"))
    assert lengths.to_series().unique().to_list() == [2]
    model = bare_policy(trainer)
    model.load_state_dict(trainer.batches[0]["weights"])
    prompt, ids = trainer.batches[0]["prompt_ids"][0], trainer.batches[0]["ids"][0]
    expected = teacher_forced(model, prompt, ids, 1.0)[0]
    first = rows.filter(rollout_id=0)
    np.testing.assert_allclose(first["logprob"].drop_nulls(), np.delete(expected, [2, 3]), atol=TOLERANCE)
    # Relative positions count generated tokens only.
    bonus = (first["shaped_advantage"] - first["advantage"]).drop_nulls().abs().to_numpy()
    share = np.arange(len(ids) - 2) / (len(ids) - 2)
    size = np.minimum(0.1 / (1 + np.exp(-15 * (share - 0.5))), 0.5 * abs(first["advantage"][0]))
    np.testing.assert_allclose(bonus, size, atol=1e-6)


def test_responses_without_any_score_have_no_reward(tmp_path):
    def unsure(completions, **kwargs):
        return [None if i % 2 else 1.0 for i in range(len(completions))]

    build(
        TracedGRPOTrainer, tmp_path / "out", rewards=(unsure,), traced={"trace": tmp_path / "run"}, max_steps=1
    ).train()
    rollouts = table(tmp_path / "run", "rollouts")
    assert rollouts["reward"].to_list() == [1.0, None] * 4
    assert rollouts["is_correct"].to_list() == [True, None] * 4
    assert rollouts["advantage"].to_list() == [0.0] * 8


@pytest.mark.parametrize(
    ("traced", "message"),
    [
        ({"shaping": "pppl"}, 'unknown shaping method "pppl"; did you mean "ppl"?'),
        ({"shaping": {"method": "ppl", "ppl": {"alpa": 1}}}, "ppl.alpa"),
        ({"correct": "is_rihgt"}, 'correct: no reward function "is_rihgt"; did you mean "is_right"?'),
        ({"correct": True}, "correct: expected the name of a reward function or a number, found True"),
        ({"after_update_every": -1}, "after_update_every: -1 is not an integer of at least 0"),
    ],
)
def test_bad_arguments_are_one_error(tmp_path, traced, message):
    with pytest.raises(InputError) as raised:
        build(TracedGRPOTrainer, tmp_path / "out", traced={"trace": tmp_path / "run", **traced})
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("correct", "names", "expected"),
    [
        (None, ["is_right"], "is_right"),
        (None, ["style", "accuracy_reward"], "accuracy_reward"),
        (None, ["style", "length"], None),
        (0.5, ["style", "length"], 0.5),
        ("style", ["style", "length"], "style"),
    ],
)
def test_correctness_has_a_named_source(correct, names, expected):
    assert arguments.choose_correct(correct, names)[0] == expected


def test_an_untested_version_warns_once(monkeypatch, caplog):
    monkeypatch.setattr(arguments, "trl_version", lambda: "9.1.0")
    with caplog.at_level(logging.WARNING, "entrace"):
        arguments.check_version()
        arguments.check_version()
    (record,) = caplog.records
    assert (
        record.message
        == "TRL 9.1.0 has not been tested with entrace, which was tested with 1.14 up to, not including, 1.17"
    )


def test_a_missing_extra_is_named():
    script = "import sys; sys.modules['trl'] = None; import entrace.trl"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "ImportError: entrace.trl needs TRL: pip install 'entrace[trl]'"


@SLOW
@pytest.mark.parametrize(
    "changed",
    [{}, {"num_generations": 8, "steps_per_generation": 2, "num_iterations": 2}],
    ids=["groups", "split groups"],
)
def test_two_processes_record_one_trace(tmp_path, changed):
    """Groups of eight are split over both processes."""
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--standalone",
        "-m",
        "tests.trainer.trl_two",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stderr[-3000:]
    weights_of = [torch.load(tmp_path / f"{name}.pt") for name in ("plain", "traced")]
    assert all(torch.equal(weights_of[0][key], weights_of[1][key]) for key in weights_of[0])
    run = tmp_path / "run"
    batches = [torch.load(tmp_path / f"batches-{rank}.pt", weights_only=False) for rank in range(2)]
    rollouts, tokens = table(run, "rollouts"), table(run, "tokens")
    assert table(run, "steps")["step"].to_list() == list(range(1, len(batches[0]) + 1))
    size = changed.get("num_generations", 4)
    model = trl_runs.load_policy().eval()
    for step, parts in enumerate(zip(*batches, strict=True), 1):
        ids = [row for part in parts for row in part["ids"]]
        prompts = [row for part in parts for row in part["prompt_ids"]]
        rows = rollouts.filter(step=step)
        assert rows["response_length"].to_list() == [len(row) for row in ids]
        assert rows["completion"].to_list() == [text for part in parts for text in part["completions"]]
        np.testing.assert_allclose(rows["reward"], parts[0]["rewards"][:, 0])
        assert (rows["group_id"] - rows["rollout_id"].min()).to_list() == [i // size * size for i in range(len(ids))]
        assert tokens.filter(step=step)["token_id"].to_list() == [i for row in ids for i in row]
        model.load_state_dict(parts[0]["weights"])
        expected = [teacher_forced(model, prompt, row, 1.0) for prompt, row in zip(prompts, ids, strict=True)]
        found = tokens.filter(step=step)
        np.testing.assert_allclose(found["logprob"], np.concatenate([e[0] for e in expected]), atol=TOLERANCE)
        np.testing.assert_allclose(found["entropy"], np.concatenate([e[1] for e in expected]), atol=TOLERANCE)
    evals = table(run, "evals")
    assert evals.group_by("step", "prompt_id").len()["len"].unique().to_list() == [size]
    assert evals["prompt_id"].n_unique() == 3
    shaped = tables_of(tmp_path / "shaped-run")
    factor = (1 - 0.1 * shaped["ppl_z"]).clip(0.8, 1.2)
    np.testing.assert_allclose(shaped["shaped_advantage"], shaped["advantage"] * factor, atol=1e-5)
    assert (shaped["shaped_advantage"] != shaped["advantage"]).any()


def tables_of(folder):
    """Responses with the shaped advantage of their first token."""
    first = table(folder, "tokens").filter(position=0).select("rollout_id", "shaped_advantage")
    return table(folder, "rollouts").join(first, on="rollout_id")


def test_only_the_first_ground_truth_of_a_prompt_is_recorded(tmp_path):
    with entrace.Recorder(tmp_path / "run", ["<eos>", "a"]) as recorder:
        for step, prompts, truths, expected in (
            (1, ["p", "q", "p"], ["1", None, "2"], ["1", None, None]),
            (2, ["p", "r", "r", "r"], ["3", None, "4", "5"], [None, None, "4", None]),
        ):
            found = first_truths(recorder, prompts, truths)
            assert found == expected
            named = {"prompt": prompts, "prompt_id": prompts, "ground_truth": found}
            recorder.record(step, **named, response_ids=[[1]] * len(prompts))
    stored = pl.read_parquet(tmp_path / "run/prompts/*.parquet").select("prompt", "ground_truth")
    assert dict(stored.iter_rows()) == {"p": "1", "q": None, "r": "4"}
