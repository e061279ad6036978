import pytest
import torch

from trainer.config import Config, PolicyConfig, load_config
from trainer.policy import Policy
from trainer.tasks import ReasoningGymTask

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


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def policy() -> Policy:
    """A fresh copy of the embedded base policy."""
    return Policy.load(PolicyConfig(device="cpu"))


@pytest.fixture
def small_config() -> Config:
    return load_config("tiny", SMALL)


@pytest.fixture
def task(small_config) -> ReasoningGymTask:
    return ReasoningGymTask("chain_sum", small_config.task.params, seed=0, num_heldout=6)
