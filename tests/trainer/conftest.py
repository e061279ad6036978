import os
import re
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from entrace.trainer import cli
from entrace.trainer.algorithm.advantages import group_relative_advantage
from entrace.trainer.algorithm.method import RolloutView
from entrace.trainer.config import Config, PolicyConfig, load_config
from entrace.trainer.model.policy import Policy
from entrace.trainer.resources import CONFIGS
from entrace.trainer.rollouts import Batch
from entrace.trainer.tasks import Task, load_task

# Small enough for seconds, large enough that groups are mixed and responses end at different places.
SMALL = [
    "steps=4",
    "task.num_heldout=6",
    "rollout.prompts_per_step=6",
    "rollout.group_size=4",
    "eval.samples=2",
    "eval.every=2",
    "record.flush_every=1",
    "record.after_update_every=2",
    "record.checkpoint_every=2",
]

# For tests that need a run and not its responses: a third less time, since fewer tokens are decoded.
SHORT = [*SMALL, "rollout.max_response_tokens=40", "rollout.max_refills=0"]


SMALL_RECIPE = {
    "num_heldout": 4,
    "examples": 2000,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "questions": 500,
    "steps": 40,
    "batch_size": 16,
    "samples": 2,
}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    # Before any fixture, since an earlier test may have trained on more threads, which wait for each other actively.
    torch.set_num_threads(1)


@pytest.fixture
def policy() -> Policy:
    """Return a fresh copy of the embedded base policy."""
    return Policy.load(PolicyConfig(device="cpu"))


@pytest.fixture
def small_config() -> Config:
    return load_config("tiny", SMALL)


@pytest.fixture
def task(small_config) -> Task:
    return load_task(small_config.task, seed=0)


@pytest.fixture
def small_recipe(tmp_path) -> Path:
    """Write a recipe that is pretrained in seconds."""
    text = (CONFIGS / "base-policy.toml").read_text()
    for key, value in SMALL_RECIPE.items():
        text, found = re.subn(rf"^{key} = \S+", f"{key} = {value}", text, flags=re.MULTILINE)
        assert found == 1, key
    path = tmp_path / "small.toml"
    path.write_text(text)
    return path


@pytest.fixture
def call(capsys, monkeypatch):
    """Run the command line here; return exit status, stdout, and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["entrace", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        output = capsys.readouterr()
        return stopped.value.code, output.out, output.err

    return run


def token_advantages(config: Config, batch: Batch) -> torch.Tensor:
    """Return the advantages that the loop computes, one per token, (B, T)."""
    advantages = group_relative_advantage(
        batch.total_rewards, batch.group_ids, config.loss.normalize_std, batch.has_verdict
    )
    return advantages[:, None].expand(batch.rollouts.response_ids.shape)


def table(run, name):
    return pl.read_parquet(run / name / "*.parquet")


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_short(path):
    os.truncate(path, path.stat().st_size // 2)


def token_batch() -> tuple[torch.Tensor, RolloutView]:
    """Return advantages (8, 6) and tokens in float64.

    Responses include an empty one, one of a single token, padded ones, and a uniform group.
    """
    generator = torch.Generator().manual_seed(0)
    logprobs, entropy = -torch.rand(8, 6, generator=generator).double(), torch.rand(8, 6, generator=generator).double()
    mask = torch.arange(6) < torch.tensor([6, 1, 0, 3, 6, 2, 5, 4])[:, None]
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    advantages = torch.tensor([1.2, -0.7, 0.3, -0.1, 0, 0, 0, 0], dtype=torch.float64)[:, None].expand(8, 6)
    is_correct = torch.tensor([True, False, True, False, True, True, True, True])
    rewards = is_correct.double()
    return advantages, RolloutView(logprobs, entropy, is_correct, mask, groups, rewards, np.random.default_rng(1))
