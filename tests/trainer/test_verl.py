"""Test recorded runs of verl on a CPU.

Configs, Ray, TransferQueue, agent loops, and actor workers are real. Only the rollout engine is a stand-in; see
``verl_engine``.
"""

import json
import logging
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import polars as pl
import pytest

pytest.importorskip("verl", reason="verl is not installed; make test-verl runs these tests")

import ray
import torch
import transfer_queue as tq
from hydra import compose, initialize_config_module
from tensordict import TensorDict
from transformers import AutoModelForCausalLM, AutoTokenizer
from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

import entrace
from entrace.analysis.trace import InputError
from entrace.trainer.live import arguments, verl_tracer
from entrace.trainer.live.verl import Traced, base_mode, read_arguments
from entrace.verl import TracedColocateAsync, TracedSeparateAsync, TracedSync

from . import verl_runs
from .verl_runs import compose_config, table

# Largest difference from an independent pass, nats: the order in which floats are added differs.
TOLERANCE = 2e-5
PPL, SLOPE, GAMMA, CAP = 0.01, 15.0, 0.1, 0.5
SHAPED = (
    "+entrace.shaping.method=[ppl,position]",
    "+entrace.shaping.position.start_step=1",
    "+entrace.shaping.ppl.alpha=0.3",
)


def manifest(folder):
    return json.loads((folder / "run.json").read_text())


# Config and registration


def test_verl_finds_the_modes_through_its_environment_variable():
    script = (
        "import verl; from verl.trainer.ppo.v1 import get_trainer_cls;"
        "print(*(get_trainer_cls(f'entrace_{mode}').__mro__[2].__name__"
        " for mode in ('sync', 'colocate_async', 'separate_async')))"
    )
    env = {**os.environ, "VERL_USE_EXTERNAL_MODULES": "entrace.verl"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=200)
    assert done.stdout.split() == ["PPOTrainerSync", "PPOTrainerColocateAsync", "PPOTrainerSeparateAsync"], done.stderr


def test_the_base_mode_is_that_of_the_trainer_that_is_extended():
    class Mine(TracedSync):
        pass

    modes = [base_mode(cls) for cls in (TracedSync, TracedColocateAsync, TracedSeparateAsync, Mine)]
    assert modes == ["sync", "colocate_async", "separate_async", "sync"]
    with pytest.raises(InputError, match="Traced: extends no trainer that verl registers"):
        base_mode(Traced)


def test_section_entrace_is_read_from_hydra_overrides(tmp_path):
    found = read_arguments(
        compose_config(
            tmp_path,
            "+entrace.shaping=[ppl,position]",
            "+entrace.correct=acc",
            "+entrace.after_update_every=0",
            "+entrace.arm=both",
        )
    )
    assert str(found.run_dir) == "run"
    assert (found.shaping.method, found.correct, found.after_update_every) == ("ppl+position", "acc", 0)
    assert (found.flush_every, found.after_update_responses, found.arm) == (10, None, "both")
    found = read_arguments(compose_config(tmp_path, *SHAPED, "+entrace.correct=1"))
    assert (found.shaping.ppl.alpha, found.shaping.position.start_step, found.correct) == (0.3, 1, 1.0)
    own = read_arguments(compose_config(tmp_path, "+entrace.shaping=['tests.trainer.verl_methods:halved']"))
    assert own.shaping.method == "tests.trainer.verl_methods:halved"


def test_the_command_of_the_guide_composes_with_the_config_of_verl():
    block = re.search(r"```text\n(.*?)```", (verl_runs.ROOT / "docs" / "verl.md").read_text(), re.DOTALL)
    export, command = block[1].replace("\\\n", " ").splitlines()
    assert export == "export VERL_USE_EXTERNAL_MODULES=entrace.verl"
    program, given = shlex.split(command)[:3], shlex.split(command)[3:]
    assert program == ["python", "-m", "verl.trainer.main_ppo"]
    with initialize_config_module("verl.trainer.config", version_base=None):
        trainer = TracedSync(config=compose("ppo_trainer", given))
    assert trainer._entrace.arguments.correct == "acc"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["+entrace.shape=ppl"], 'entrace: unknown key "shape"; did you mean "shaping"?'),
        (["+entrace.shaping=tail"], "tail"),
        (["+entrace.shaping.method=ppl", "+entrace.shaping.ppl.alhpa=1"], "alhpa"),
        (["+entrace.correct=true"], "entrace.correct: expected a key of the reward's extra info or a number"),
        (["+entrace.after_update_every=often"], "after_update_every: 'often' is not an integer of at least 0"),
        (["+entrace.flush_every=0"], "flush_every: 0 is not an integer of at least 1"),
        (["+entrace.arm=[a]"], "entrace.arm: expected a text"),
        (["entrace.trace=3"], "entrace.trace: expected a text, found 3"),
        (["~entrace.trace"], r"entrace.trace is missing; add \+entrace.trace=FOLDER"),
        (["~entrace"], "entrace.trace is missing"),
        (["~entrace", "+entrace=runs"], "entrace: expected a section with keys trace"),
        (
            ["+entrace.shaping=ppl", "algorithm.rollout_correction.bypass_mode=true"],
            "entrace.shaping: needs entropies, which verl does not compute",
        ),
    ],
)
def test_bad_keys_are_one_line_before_anything_starts(tmp_path, given, message):
    config = compose_config(tmp_path, *given)
    with pytest.raises(InputError, match=message) as raised:
        TracedSync(config=config)
    assert "\n" not in str(raised.value)


def test_the_trainer_sees_the_mode_that_it_has_in_verl(tmp_path):
    sync = TracedSync(config=compose_config(tmp_path))
    assert (sync.trainer_mode, type(sync.replay_buffer)) == ("sync", ReplayBuffer)
    overlapping = TracedColocateAsync(config=compose_config(tmp_path))
    assert (overlapping.trainer_mode, type(overlapping.replay_buffer)) == ("colocate_async", ReplayBufferAsync)
    separate = TracedSeparateAsync(
        config=compose_config(
            tmp_path,
            "trainer.v1.separate_async.parameter_sync_step=2",
            "actor_rollout_ref.rollout.nnodes=1",
            "actor_rollout_ref.rollout.n_gpus_per_node=1",
            "actor_rollout_ref.rollout.checkpoint_engine.backend=nccl",
        )
    )
    assert (separate.trainer_mode, separate.parameter_sync_step) == ("separate_async", 2)


def test_another_version_of_verl_warns_once(tmp_path, monkeypatch, caplog):
    arguments._warn_once.cache_clear()
    monkeypatch.setattr(verl_tracer, "version", lambda name: "0.11.0")
    with caplog.at_level(logging.WARNING, "entrace"):
        for _ in range(2):
            TracedSync(config=compose_config(tmp_path))
    assert caplog.text.count("verl 0.11.0 has not been tested with entrace") == 1
    arguments._warn_once.cache_clear()


# Advantages, with the real ``_compute_advantage`` over TransferQueue


@pytest.fixture(scope="module")
def queue(tmp_path_factory):
    """Start a local Ray and TransferQueue."""
    config = compose_config(tmp_path_factory.mktemp("queue"))
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    config.transfer_queue.enable = True
    tq.init(config.transfer_queue)
    yield
    tq.close()
    ray.shutdown()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(verl_runs.POLICY)


def make_trainer(folder, tokenizer, *more, kind=TracedSync):
    config = compose_config(folder, f"entrace.trace={folder}/run", "+entrace.after_update_every=0", *more)
    trainer = kind(config=config)
    trainer.tokenizer, trainer.total_training_steps, trainer.global_steps = tokenizer, 4, 0
    return trainer


def put_rows(tokenizer, seed, *, groups=3, size=4, absent=(), tools=True):
    """Put the responses of a step into TransferQueue.

    Agent loops and ``_compute_old_log_prob`` do so too.
    """
    rng = np.random.default_rng(seed)
    keys, rows, tags = [], [], []
    for group in range(groups):
        uid = f"{seed}x{group}"
        for session in range(size):
            count = int(rng.integers(3, 9))
            mask = torch.ones(count, dtype=torch.int64)
            if tools and session % 2:
                mask[1 : count // 2 + 1] = 0
            reward = float(rng.integers(0, 2)) - 0.5
            scores = torch.zeros(count)
            scores[-1] = reward
            prompt = torch.from_numpy(rng.integers(10, 200, 5 + group))
            response = torch.from_numpy(rng.integers(10, 200, count))
            response[-1] = tokenizer.eos_token_id
            row = {
                "uid": uid,
                "session_id": session,
                "prompts": prompt,
                "responses": response,
                "input_ids": torch.cat([prompt, response]),
                "position_ids": torch.arange(len(prompt) + count),
                "response_mask": mask,
                "loss_mask": mask,
                "rm_scores": scores,
                "num_turns": 2,
                "raw_prompt": [{"role": "user", "content": f"question {group} of {seed}"}],
                "reward_model": {"style": "rule", "ground_truth": str(group)},
                "data_source": "sums",
                "extra_fields": {"reward_extra_info": {"acc": reward > 0, "score": reward, "pred": "7"}},
                "rollout_log_probs": -torch.from_numpy(rng.random(count)).float(),
            }
            keys.append(f"{uid}_{session}_0")
            rows.append(row)
            tags.append({"seq_len": len(prompt) + count, "min_global_steps": 0, "max_global_steps": session % 2})
    fields = list_of_dict_to_tensordict([{k: v for k, v in row.items() if k not in absent} for row in rows])
    tq.kv_batch_put(keys=keys, partition_id="train", fields=fields, tags=tags)
    batch = tq.KVBatchMeta(keys=keys, tags=tags, partition_id="train")
    batch = upsample_batch_to_divisible_size(batch, 8, tokenizer.eos_token_id)
    batch.reorder(rng.permutation(len(batch)).tolist())
    measured = {}
    for key in batch.keys:
        width = len(rows[keys.index(key)]["responses"]) if key in keys else 1
        measured[key] = {
            "old_log_probs": -torch.from_numpy(rng.random(width)).float() * 2,
            "entropy": torch.from_numpy(rng.random(width)).float() * 3,
            "ref_log_prob": -torch.from_numpy(rng.random(width)).float(),
        }
    for name in ("old_log_probs", "entropy", "ref_log_prob"):
        if name not in absent:
            nested = torch.nested.as_nested_tensor([measured[key][name] for key in batch.keys], layout=torch.jagged)
            tq.kv_batch_put(keys=batch.keys, partition_id="train", fields=TensorDict({name: nested}, len(batch)))
    return batch, {key: row | measured[key] for key, row in zip(keys, rows, strict=True)}


def read(batch, name="advantages"):
    data = tq.kv_batch_get(keys=batch.keys, partition_id="train", select_fields=[name])
    return {key: row.clone() for key, row in zip(batch.keys, data[name].unbind(0), strict=True)}


def take_step(trainer, batch, metrics=None):
    trainer.global_steps += 1
    metrics = metrics or {}
    trainer._compute_advantage(batch, metrics)
    found = read(batch)
    trainer._entrace.count_update()
    trainer._entrace.end_step(batch, metrics, {"gen": 1.5, "update_actor": 0.5, "old_log_prob": 0.25})
    return found


def in_order(rows, name, tokens, dtype=float):
    """Return the values of all responses, in the order of the trace.

    ``rows`` have the same order.
    """
    return np.concatenate([np.asarray(rows[key][name], dtype)[: len(tokens[key])] for key in tokens])


@pytest.fixture
def recorded(queue, tokenizer, tmp_path):
    """Record two steps without shaping.

    Returns verl's advantages of the same rows, the rows, and the trace.
    """
    trainer = make_trainer(tmp_path, tokenizer, "actor_rollout_ref.actor.use_kl_loss=true")
    plain = make_trainer(tmp_path, tokenizer, kind=PPOTrainerSync)
    steps = []
    with trainer._entrace.recording():
        for seed in (1, 2):
            batch, rows = put_rows(tokenizer, seed)
            plain._compute_advantage(batch, {})
            expected = read(batch)
            metrics = {"actor/pg_loss": 0.25, "actor/grad_norm": 2.0, "actor/lr": 1e-3, "actor/kl_loss": 0.125}
            steps.append((rows, expected, take_step(trainer, batch, metrics), batch))
            tq.kv_clear(keys=batch.keys, partition_id="train")
    return steps, tmp_path / "run"


def test_without_shaping_advantages_stay_bit_for_bit(recorded):
    for _, expected, found, _ in recorded[0]:
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_values_of_tokens_are_those_of_the_queue_without_padding(recorded):
    steps, folder = recorded
    tokens, rollouts = table(folder, "tokens"), table(folder, "rollouts")
    names = {
        "logprob": "old_log_probs",
        "entropy": "entropy",
        "sampling_logprob": "rollout_log_probs",
        "reference_logprob": "ref_log_prob",
    }
    for step, (rows, expected, _, batch) in enumerate(steps, 1):
        assert any(tag.get("is_padding") for tag in batch.tags)
        responses = rollouts.filter(step=step)
        assert len(responses) == len(rows)
        for group in responses["group_id"].unique():
            members = responses.filter(group_id=group)
            assert members["sample_index"].to_list() == [0, 1, 2, 3]
            number = members["prompt_id"][0]
            text = table(folder, "prompts").filter(prompt_id=number)["prompt"].item()
            keys = [key for key, row in rows.items() if row["raw_prompt"][0]["content"] == text]
            for key, response in zip(keys, members.iter_rows(named=True), strict=True):
                row = rows[key]
                own = tokens.filter(rollout_id=response["rollout_id"]).sort("position")
                is_generated = row["response_mask"].bool().tolist()
                assert own["token_id"].to_list() == row["responses"].tolist()
                found = own["loss_mask"].fill_null(True).to_list()
                assert found == is_generated
                for name, source in names.items():
                    wanted = [v if g else None for v, g in zip(row[source].tolist(), is_generated, strict=True)]
                    assert own[name].to_list() == wanted
                wanted = [v if g else None for v, g in zip(expected[key].tolist(), is_generated, strict=True)]
                assert own["advantage"].to_list() == wanted
                assert own["shaped_advantage"].to_list() == wanted
                assert response["reward"] == row["rm_scores"].sum().item()
                assert response["is_correct"] == row["extra_fields"]["reward_extra_info"]["acc"]
                assert response["policy_step"] == 0
                assert set(own["policy_version"]) == ({0} if key.endswith("0_0") or key.endswith("2_0") else {None})
                assert response["is_truncated"] is False


def test_steps_hold_the_metrics_of_verl(recorded):
    steps = table(recorded[1], "steps").sort("step")
    assert steps["step"].to_list() == [1, 2]
    for name, value in {"loss": 0.25, "grad_norm": 2.0, "kl": 0.125, "rollout_s": 1.5, "update_s": 0.75}.items():
        assert steps[name].to_list() == [value] * 2
    assert steps["is_shaped"].to_list() == [False] * 2
    assert steps["reward_s"].null_count() == 2
    found = manifest(recorded[1])
    assert found["status"] == "complete"
    assert found["config"]["verl"]["trainer"]["v1"]["trainer_mode"] == "sync"
    assert "after_update_every is 0" in found["unknown"]["tokens.logprob_after"]
    assert "steps.kl" not in found["unknown"]
    assert entrace.open_runs(recorded[1]).sql("select count(*) as n from tokens").to_dict() is not None


def reference(rows, base, keys):
    """``ppl`` and then ``position`` over generated tokens, in float64, written out."""
    surprisal = {}
    for key in keys:
        mask = rows[key]["response_mask"].bool().numpy()
        surprisal[key] = -rows[key]["old_log_probs"].double().numpy()[mask].mean()
    shaped = {}
    for key in keys:
        group = np.array([surprisal[other] for other in keys if other.split("_")[0] == key.split("_")[0]])
        q1, q3 = np.quantile(group, [0.25, 0.75])
        inside = group[(group >= q1 - 1.5 * (q3 - q1)) & (group <= q3 + 1.5 * (q3 - q1))]
        z = (surprisal[key] - inside.mean()) / (inside.std() if inside.std() >= 1e-6 else 1.0)
        mask = rows[key]["response_mask"].bool().numpy()
        advantage = base[key].double().numpy().copy()
        own = advantage[mask] * np.clip(1 - 0.3 * z, 0.8, 1.2)
        place = np.arange(mask.sum()) / mask.sum()
        bonus = np.minimum(GAMMA / (1 + np.exp(-SLOPE * (place - 0.5))), CAP * np.abs(own))
        advantage[mask] = own + np.sign(own) * bonus
        shaped[key] = advantage
    return shaped


def test_shaped_advantages_reach_the_queue_and_the_trace(queue, tokenizer, tmp_path):
    trainer = make_trainer(tmp_path, tokenizer, *SHAPED)
    plain = make_trainer(tmp_path, tokenizer, kind=PPOTrainerSync)
    with trainer._entrace.recording():
        batch, rows = put_rows(tokenizer, 5)
        plain._compute_advantage(batch, {})
        base = read(batch)
        found = take_step(trainer, batch)
        tq.kv_clear(keys=batch.keys, partition_id="train")
    wanted = reference(rows, base, list(rows))
    changed = 0
    for key in rows:
        np.testing.assert_allclose(found[key].double().numpy(), wanted[key], rtol=1e-5, atol=1e-6)
        assert found[key].dtype == base[key].dtype
        changed += not torch.equal(found[key], base[key])
    assert changed > len(rows) / 2
    padding = set(batch.keys) - set(rows)
    assert padding
    assert all(torch.equal(found[key], base[key]) for key in padding)
    tokens = table(tmp_path / "run", "tokens").sort("rollout_id", "position")
    kept = tokens.filter(pl.col("advantage").is_not_null())
    assert len(kept) == sum(int(row["response_mask"].sum()) for row in rows.values())
    groups = list(dict.fromkeys(key.split("_")[0] for key in batch.keys if key in rows))
    ordered = sorted(rows, key=lambda key: (groups.index(key.split("_")[0]), key))
    masks = {key: rows[key]["response_mask"].bool() for key in ordered}
    assert kept["advantage"].to_list() == [v for key in ordered for v in base[key][masks[key]].tolist()]
    assert kept["shaped_advantage"].to_list() == [v for key in ordered for v in found[key][masks[key]].tolist()]
    assert table(tmp_path / "run", "steps")["is_shaped"].to_list() == [True]


def test_rejected_tokens_keep_the_advantage_of_verl_and_stay_in_the_trace(queue, tokenizer, tmp_path):
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        *SHAPED,
        "algorithm.rollout_correction.rollout_rs=token_k1",
        "algorithm.rollout_correction.rollout_rs_threshold='0.7_1.4'",
    )
    with trainer._entrace.recording():
        batch, rows = put_rows(tokenizer, 6, tools=False)
        found = take_step(trainer, batch)
        masks = read(batch, "response_mask")
        tq.kv_clear(keys=batch.keys, partition_id="train")
    rejected = {key: ~masks[key].bool() for key in rows}
    assert any(mask.any() for mask in rejected.values())
    assert all((found[key][rejected[key]] == 0).all() for key in rows)
    tokens = table(tmp_path / "run", "tokens")
    assert tokens["logprob"].null_count() == 0
    assert len(tokens) == sum(len(row["responses"]) for row in rows.values())
    kept = table(tmp_path / "run", "rollouts")["is_kept"].to_list()
    assert sorted(kept) == sorted(bool(masks[key].any()) for key in rows)


def test_bypass_mode_leaves_entropies_null_with_the_reason(queue, tokenizer, tmp_path):
    trainer = make_trainer(tmp_path, tokenizer, "algorithm.rollout_correction.bypass_mode=true")
    with trainer._entrace.recording():
        batch, _ = put_rows(tokenizer, 7, absent=("entropy", "old_log_probs", "ref_log_prob"))
        trainer._compute_old_log_prob(batch, {})
        take_step(trainer, batch)
        tq.kv_clear(keys=batch.keys, partition_id="train")
    tokens = table(tmp_path / "run", "tokens")
    assert tokens["entropy"].null_count() == len(tokens)
    assert tokens["logprob"].equals(tokens["sampling_logprob"])
    assert set(table(tmp_path / "run", "rollouts")["logprob_kind"]) == {"engine"}
    assert "bypass_mode" in manifest(tmp_path / "run")["unknown"]["tokens.entropy"]


def test_own_agent_loops_may_leave_out_messages_and_answers(queue, tokenizer, tmp_path):
    trainer = make_trainer(tmp_path, tokenizer, "+entrace.correct=0.5")
    with trainer._entrace.recording():
        absent = ("raw_prompt", "reward_model", "data_source", "extra_fields", "rollout_log_probs")
        batch, rows = put_rows(tokenizer, 8, absent=absent)
        take_step(trainer, batch)
        tq.kv_clear(keys=batch.keys, partition_id="train")
    rollouts = table(tmp_path / "run", "rollouts")
    assert rollouts["is_correct"].to_list() == [reward >= 0.5 for reward in rollouts["reward"]]
    texts = {tokenizer.decode(row["prompts"], skip_special_tokens=True) for row in rows.values()}
    assert set(table(tmp_path / "run", "prompts")["prompt"]) == texts


def test_values_that_are_not_finite_are_null(queue, tokenizer, tmp_path):
    trainer = make_trainer(tmp_path, tokenizer, "+entrace.shaping=ppl")
    with trainer._entrace.recording():
        batch, rows = put_rows(tokenizer, 10, tools=False)
        key = next(iter(rows))
        values = torch.nested.as_nested_tensor([rows[key]["old_log_probs"].clone()], layout=torch.jagged)
        values.values()[0] = -torch.inf
        tq.kv_batch_put(keys=[key], partition_id="train", fields=TensorDict({"rollout_log_probs": values}, 1))
        found = take_step(trainer, batch)
        tq.kv_clear(keys=batch.keys, partition_id="train")
    assert all(torch.isfinite(row).all() for row in found.values())
    assert table(tmp_path / "run", "tokens")["sampling_logprob"].null_count() == 1


@pytest.mark.parametrize(
    ("correct", "message"),
    [
        ("accuracy", 'no key "accuracy" in the reward\'s extra info; valid: acc, pred, score'),
        ("pred", "pred of the reward's extra info is '7', expected a number"),
    ],
)
def test_a_key_that_decides_nothing_stops_the_first_step(queue, tokenizer, tmp_path, correct, message):
    trainer = make_trainer(tmp_path, tokenizer, f"+entrace.correct={correct}")
    batch, _ = put_rows(tokenizer, 9)
    with pytest.raises(InputError, match=f"entrace.correct: {message}"), trainer._entrace.recording():
        take_step(trainer, batch)
    tq.kv_clear(keys=batch.keys, partition_id="train")
    assert manifest(tmp_path / "run")["status"] == "failed"


def test_a_trace_resumes_after_the_step_of_a_checkpoint(queue, tokenizer, tmp_path):
    def run(first, seeds):
        trainer = make_trainer(tmp_path, tokenizer)
        trainer.global_steps = first
        with trainer._entrace.recording():
            for seed in seeds:
                batch, _ = put_rows(tokenizer, seed)
                take_step(trainer, batch)
                tq.kv_clear(keys=batch.keys, partition_id="train")
                if trainer.global_steps == 2:
                    trainer._entrace.flush()

    run(0, (11, 12, 13))
    with pytest.raises(InputError, match="already holds files, and verl starts without a checkpoint"):
        run(0, ())
    run(2, (14, 15))
    steps = table(tmp_path / "run", "steps").sort("step")
    assert steps["step"].to_list() == [1, 2, 3, 4]
    rollouts = table(tmp_path / "run", "rollouts")
    assert len(rollouts) == rollouts["rollout_id"].n_unique() == 4 * 12
    prompts = table(tmp_path / "run", "prompts")["prompt"].to_list()
    assert not any(text.endswith("of 13") for text in prompts)
    with pytest.raises(InputError, match="cannot continue after step 9"):
        run(9, ())


# Whole runs of verl's command


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train two steps, and a third after a resume.

    Shaping, a reference policy, evaluation, checkpoints, and after-update capture are on.
    """
    folder = tmp_path_factory.mktemp("verl")
    settings = (
        "trainer.v1.trainer_mode=entrace_witness",
        "trainer.save_freq=2",
        "trainer.test_freq=1",
        "trainer.val_before_train=true",
        "actor_rollout_ref.actor.use_kl_loss=true",
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=4",
        "+entrace.after_update_every=1",
        "+entrace.after_update_responses=8",
        "+entrace.correct=acc",
        "+entrace.shaping=[ppl,entropy_advantage]",
    )
    first = verl_runs.train(folder, *settings)
    assert (folder / "witness-2.pt").exists(), first[-4000:]
    second = verl_runs.train(folder, *settings, "trainer.total_training_steps=3")
    assert (folder / "witness-3.pt").exists(), second[-4000:]
    return folder, [torch.load(folder / f"witness-{step}.pt", weights_only=False) for step in (1, 2, 3)]


def by_tokens(kept, name):
    """Return values of tokens by response ids.

    Several rows may hold the same response.
    """
    found = {}
    for row in kept.values():
        found.setdefault(tuple(row["responses"].tolist()), []).append(row[name].tolist())
    return found


def test_a_whole_run_is_recorded_without_duplicates_over_a_resume(trained):
    folder, kept = trained
    steps = table(folder / "run", "steps").sort("step")
    assert steps["step"].to_list() == [1, 2, 3]
    assert manifest(folder / "run")["status"] == "complete"
    rollouts, tokens = table(folder / "run", "rollouts"), table(folder / "run", "tokens")
    assert rollouts["rollout_id"].n_unique() == len(rollouts) == 48
    assert rollouts["is_correct"].n_unique() == 2
    assert rollouts["policy_step"].to_list() == [step - 1 for step in rollouts["step"]]
    columns = {
        "logprob": "old_log_probs",
        "entropy": "entropy",
        "sampling_logprob": "rollout_log_probs",
        "reference_logprob": "ref_log_prob",
    }
    for step, found in enumerate(kept, 1):
        rows = tokens.filter(step=step).group_by("rollout_id", maintain_order=True).agg(pl.all().exclude("step"))
        before = {name: by_tokens(found["verl"], source) for name, source in columns.items()}
        shaped = by_tokens(found["end"], "advantages")
        for row in rows.iter_rows(named=True):
            ids = tuple(row["token_id"])
            for name in columns:
                assert row[name] in before[name][ids]
            assert row["shaped_advantage"] in shaped[ids]
    assert steps["loss"].to_list() == pytest.approx([found["metrics"]["actor/pg_loss"] for found in kept])
    assert steps["kl"].to_list() == pytest.approx([found["metrics"]["actor/kl_loss"] for found in kept])
    assert steps["lr"].to_list() == pytest.approx([1e-3] * 3)


def test_shaping_changes_what_verl_trains_on(trained):
    changed = 0
    for found in trained[1]:
        assert found["verl"].keys() == found["end"].keys()
        for key, row in found["verl"].items():
            changed += not torch.equal(row["advantages"], found["end"][key]["advantages"])
    assert changed > 0


def test_the_capture_after_the_update_puts_the_fields_of_verl_back(trained):
    for found in trained[1]:
        assert found["updated"].keys() == found["end"].keys()
        for key, row in found["updated"].items():
            assert row.keys() == found["end"][key].keys()
            assert all(torch.equal(row[name], found["end"][key][name]) for name in row)


def test_values_after_the_update_are_those_of_the_checkpoint(trained, tokenizer):
    folder, _ = trained
    path = folder / "checkpoints/global_step_2/actor/model_world_size_1_rank_0.pt"
    state = torch.load(path, weights_only=False)
    state = {name: getattr(v, "full_tensor", lambda v=v: v)().float() for name, v in state.items()}
    model = AutoModelForCausalLM.from_pretrained(verl_runs.POLICY, dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("lm_head" in name for name in missing)
    tokens = table(folder / "run", "tokens").sort("rollout_id", "position")
    prompts = {
        number: tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for number, text in table(folder / "run", "prompts").select("prompt_id", "prompt").iter_rows()
    }

    def check(rows, logprob, entropy):
        for _, own in rows.group_by("rollout_id", maintain_order=True):
            ids = own["token_id"].to_list()
            sequence = torch.tensor([*prompts[own["prompt_id"][0]], *ids])
            with torch.no_grad():
                logp = model(sequence[None]).logits[0, -len(ids) - 1 : -1].double().log_softmax(-1)
            np.testing.assert_allclose(own[logprob], logp[range(len(ids)), ids], atol=TOLERANCE)
            np.testing.assert_allclose(own[entropy], -(logp.exp() * logp).sum(-1), atol=TOLERANCE)

    after = tokens.filter(step=2).filter(pl.col("logprob_after").is_not_null())
    assert after["rollout_id"].n_unique() == 8
    check(after, "logprob_after", "entropy_after")
    check(tokens.filter(step=3), "logprob", "entropy")


def test_evaluations_of_verl_are_recorded_once_per_step(trained):
    folder, _ = trained
    evals = table(folder / "run", "evals")
    assert evals.group_by("step").len().sort("step").rows() == [(0, 8), (1, 8), (2, 8), (3, 8)]
    assert set(evals["benchmark"]) == {"sums"}
    assert (evals["reward"] + 0.5).cast(bool).to_list() == evals["is_correct"].to_list()
    assert set(evals["temperature"]) == {0.0}
    prompts = table(folder / "run", "prompts")
    assert {f"{a} + {b}" for a in range(1, 5) for b in (3, 4)} <= {p.split(": ")[1][:5] for p in prompts["prompt"]}


def test_several_updates_per_step_in_bypass_mode_are_one_step(tmp_path):
    output = verl_runs.train(
        tmp_path,
        "trainer.v1.trainer_mode=entrace_witness",
        "+trainer.v1.sync.parameter_sync_step=2",
        "trainer.total_training_steps=1",
        "algorithm.rollout_correction.bypass_mode=true",
        "+entrace.after_update_every=1",
    )
    assert (tmp_path / "witness-1.pt").exists(), output[-4000:]
    kept = torch.load(tmp_path / "witness-1.pt", weights_only=False)
    rollouts, tokens = table(tmp_path / "run", "rollouts"), table(tmp_path / "run", "tokens")
    assert table(tmp_path / "run", "steps")["step"].to_list() == [1]
    assert len(rollouts) == 16 == len(kept["end"])
    assert tokens["entropy"].null_count() == len(tokens)
    assert tokens["logprob_after"].null_count() < len(tokens)
    assert all(torch.equal(kept["verl"][k]["advantages"], kept["end"][k]["advantages"]) for k in kept["end"])
