"""Real runs of TRL, recorded: weights stay bit-identical, and the trace agrees with independent passes and counts."""

import numpy as np
import polars as pl
import pytest
import torch

from entrace.trainer.live import tracer as live

pytest.importorskip("trl")

from peft import LoraConfig
from trl import RLOOTrainer

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

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
]

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
    "leave one out": {"beta": 0.05, "num_iterations": 2, "max_steps": 4},
}
QUICK = {
    "defaults",
    "slices and iterations",
    "masked truncation",
    "several rewards",
    "leave one out",
    "adapter with dropout",
}


@pytest.fixture(scope="module", params=[pytest.param(name, marks=[] if name in QUICK else SLOW) for name in CASES])
def recorded(request, tmp_path_factory):
    """The trainer, its folder, and the weights of the same run without recording."""
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
    ends = {*trainer.eos_token_ids, trainer._tokenizer.pad_token_id}
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
        np.testing.assert_allclose(rows["advantage"], batch["advantages"], atol=live.UNIFORM_ROUNDING)
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
        ids = rows["rollout_id"].unique(maintain_order=True)
        means = table(folder, "rollouts").filter(step=step)["surprisal_mean"]
        np.testing.assert_allclose(means, [-e[0].mean() for e in expected], atol=TOLERANCE)
        assert len(ids) == len(expected)


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
    assert tokens["grad_norm"].null_count() == 0
    unknown = manifest(folder)["unknown"]
    for name in ("tokens", "rollouts", "steps"):
        frame = table(folder, name)
        assert not [c for c in frame.columns if f"{name}.{c}" in unknown and frame[c].null_count() < frame.height]
