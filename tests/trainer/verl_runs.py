"""Provide configs, data, and rewards for runs of verl on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import polars as pl
from hydra import compose, initialize_config_module

ROOT = Path(__file__).parents[2]
POLICY = ROOT / "data" / "base-policy"
QUESTION = "State the final answer to the following arithmetic problem: {} + {} ="


def is_finished(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    """Reward any answer; the reward differs from ``acc``.

    The reward is one half less than ``acc``.
    """
    finished = "</answer>" in solution_str
    return {"score": finished - 0.5, "acc": finished}


def write_rows(folder: Path, count: int = 8) -> Path:
    rows = [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": QUESTION.format(a, b)}],
            "reward_model": {"style": "rule", "ground_truth": str(a + b)},
            "extra_info": {"index": a * 2 + b},
        }
        for a in range(1, 5)
        for b in (3, 4)
    ][:count]
    path = folder / "rows.parquet"
    pl.DataFrame(rows).write_parquet(path)
    return path


def overrides(folder: Path, rows: Path, *more: str) -> list[str]:
    """Return Hydra overrides of a run that two CPUs finish in a minute."""
    given = [
        "trainer.v1.trainer_mode=entrace_sync",
        "trainer.device=cpu",
        "trainer.nnodes=1",
        "trainer.n_gpus_per_node=1",
        "trainer.logger=[console]",
        "trainer.val_before_train=false",
        "trainer.test_freq=-1",
        "trainer.total_epochs=100",
        "trainer.total_training_steps=2",
        f"trainer.default_local_dir={folder}/checkpoints",
        "algorithm.adv_estimator=grpo",
        f"data.train_files={rows}",
        f"data.val_files={rows}",
        "data.train_batch_size=4",
        "data.max_prompt_length=64",
        "data.max_response_length=30",
        "data.dataloader_num_workers=0",
        "+data.seed=3",
        f"actor_rollout_ref.model.path={POLICY}",
        "actor_rollout_ref.model.use_remove_padding=false",
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        "actor_rollout_ref.actor.strategy=fsdp2",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
        "actor_rollout_ref.actor.fsdp_config.model_dtype=fp32",
        "+actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp32",
        "+actor_rollout_ref.ref.fsdp_config.mixed_precision.param_dtype=fp32",
        "actor_rollout_ref.actor.fsdp_config.use_torch_compile=false",
        "actor_rollout_ref.actor.use_torch_compile=false",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        "actor_rollout_ref.rollout.name=entrace_cpu",
        "actor_rollout_ref.rollout.n=4",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4",
        "actor_rollout_ref.rollout.calculate_log_probs=true",
        "actor_rollout_ref.rollout.agent.num_workers=1",
        "reward.num_workers=1",
        f"reward.custom_reward_function.path={Path(__file__)}",
        "reward.custom_reward_function.name=is_finished",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        # A GPU in name: verl's resource pools count GPUs, on a CPU as well.
        # Not a cluster that happens to run on this machine.
        "+ray_kwargs.ray_init.address=local",
        "ray_kwargs.ray_init.num_cpus=8",
        "+ray_kwargs.ray_init.num_gpus=1",
        "+ray_kwargs.ray_init.include_dashboard=false",
        "+entrace.trace=run",
    ]
    return [*given, *more]


def environment() -> dict[str, str]:
    """Return the environment of a run.

    Variables set plug-ins, one thread, and this folder on the path of the workers.
    """
    return {
        **os.environ,
        "VERL_USE_EXTERNAL_MODULES": "entrace.verl,tests.trainer.verl_engine",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_DEDUP_LOGS": "0",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
    }


def train(folder: Path, *more: str) -> str:
    """Run verl's command in ``folder``, and return its output."""
    rows = folder / "rows.parquet"
    if not rows.exists():
        write_rows(folder)
    done = subprocess.run(
        [sys.executable, "-m", "verl.trainer.main_ppo", *overrides(folder, rows, *more)],
        env=environment(),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    (folder / "log.txt").write_text(done.stdout)
    return done.stdout


def compose_config(folder: Path, *more: str):
    """Return verl's config as its command composes it."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides(folder, folder / "rows.parquet", *more))


def table(folder: Path, name: str) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(path) for path in sorted((folder / name).glob("*.parquet"))])
