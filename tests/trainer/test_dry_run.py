"""Test that a plan predicts what a run needs, without loading the model."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from entrace.analysis.trace import InputError
from entrace.trainer.config import load_config
from entrace.trainer.dry_run import find_shape, make_plan
from entrace.trainer.model.policy import Policy
from tests.benchmarks.allocator import peak_bytes
from tests.slow import slow_after

PUBLISHED = {"Qwen/Qwen2.5-0.5B": 494_032_768, "Qwen/Qwen2.5-1.5B": 1_543_714_304, "Qwen/Qwen2.5-7B": 7_615_616_512}
FAST = ["rollout.max_response_tokens=64", "task.max_prompt_tokens=64", "optim.micro_batch_tokens=128"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_known_by_name_have_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(find_shape(name)[0])
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


@pytest.mark.slow
def test_the_recipe_of_the_study_fits_on_8_gpus_with_the_state_shared_out():
    plan = make_plan(load_config("paper-qwen2.5-7b"), devices=8)
    assert plan.parameters == plan.trained == PUBLISHED["Qwen/Qwen2.5-7B"]
    assert plan.state == 16 * plan.parameters
    assert (plan.responses_per_step, plan.tokens_per_step, plan.max_rounds) == (4096, 4096 * 8192, 10)
    assert plan.sequence_tokens == 9216
    assert plan.sharded_peak < 80e9 < plan.peak


@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("dtype", slow_after(1, ["float32", "bfloat16"]))
def test_the_memory_of_an_update_is_near_what_the_allocator_counts(tmp_path, policy, dtype, checkpointing):
    shape = LlamaConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4
    )
    AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    options = [f"policy.path={tmp_path}", f"policy.dtype={dtype}", f"policy.gradient_checkpointing={checkpointing}"]
    # Attention of transformers' own choice, as on a GPU.
    config = load_config("tiny", [*options, "policy.attention=sdpa", *FAST, "optim.micro_batch_tokens=2048"])
    plan = make_plan(config)
    loaded = Policy.load(config.policy)
    prompts, responses = [[5] * 64] * 16, [torch.full((64,), 7)] * 16

    def update():
        loaded.token_stats(prompts, responses, 1.0).logprob.sum().backward()

    update()
    assert plan.update == pytest.approx(peak_bytes(update), rel=0.1)


def test_a_long_template_lengthens_the_prompts():
    config = load_config("tiny", ["rollout.max_response_tokens=100", f"policy.template={'7 ' * 500}{{question}}"])
    assert make_plan(config).sequence_tokens == 404 + 100
    bounded = config.model_copy(update={"task": config.task.model_copy(update={"max_prompt_tokens": 50})})
    assert make_plan(bounded).sequence_tokens == 150
    assert make_plan(load_config("tiny")).sequence_tokens == 256 + load_config("tiny").rollout.max_response_tokens


def test_fewer_parameters_are_trained_with_an_adapter():
    plan = make_plan(load_config("tiny", ["policy.lora={r=4}", *FAST]))
    assert plan.trained < plan.parameters / 10
    assert plan.state == 4 * plan.parameters + 12 * plan.trained


def test_devices_share_the_state_and_a_reference_policy_adds_its_weights():
    one, four = (make_plan(load_config("tiny", FAST), devices) for devices in (1, 4))
    assert four.sharded_peak < one.sharded_peak
    assert four.peak <= one.peak
    with_reference = make_plan(load_config("tiny", [*FAST, "loss.kl_coef=0.1"]))
    assert with_reference.state == one.state + 4 * one.parameters


def test_the_command_prints_a_plan_and_makes_nothing(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, text, _ = call("train", "tiny", "--dry-run", "--devices", "2", *FAST)
    assert status == 0
    assert "FSDP over 2" in text
    found = json.loads(call("train", "tiny", "--dry-run", "--json", *FAST)[1])
    assert found["tokens_per_step"] == 32 * 8 * 64
    assert found["peak"] == found["state"] + max(found["sampling"], found["update"])
    assert not list(tmp_path.iterdir())


def test_without_a_folder_nothing_is_trained(call):
    status, _, error = call("train", "tiny")
    assert (status, error) == (2, "entrace: --out: missing; name the folder of the run\n")


def test_an_unknown_shape_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"the shape of .* is unknown") as refused:
        find_shape(str(tmp_path))
    assert "\n" not in str(refused.value)
