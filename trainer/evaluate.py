"""Evaluate a policy: k samples per held-out prompt, with fixed random numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from entrace.trainer.config import Config, sampling_memory
from entrace.trainer.faults import memory_advice
from entrace.trainer.kernels.token_stats import Truncation
from entrace.trainer.model.policy import Policy
from entrace.trainer.parallel.ranks import ALONE, Ranks
from entrace.trainer.runs.checkpoint import find_checkpoint
from entrace.trainer.runs.run_folder import has_begun, load_sampling_config
from entrace.trainer.sampling.backend import backend_of
from entrace.trainer.sampling.engine import sampler_of
from entrace.trainer.sampling.samples import SamplingParams
from entrace.trainer.seeding import Stream, generator
from entrace.trainer.tasks import Task, answer_classes, load_task
from entrace.trainer.tasks.characters import warn_of_lost


def evaluate(
    config: Config,
    policy: Policy,
    task: Task,
    step: int,
    on_step: Callable[..., None] | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Sample ``eval.samples`` responses per held-out prompt and score them.

    The prompts are distributed over the ranks. Random numbers depend only on seed, prompt, and sample index.
    Evaluations of one run at different steps, and of different runs with one seed, are therefore paired.

    Args:
        config: Sampling limits, temperature, top-p, seed.
        policy: The model.
        task: Prompts and verifiers.
        step: Updates that the policy has received.
        on_step: Called with the number of finished prompts and the accuracy over responses with a verdict.
        ranks: The ranks, which all receive all rows.

    Returns:
        Columns of the ``evals`` table, one row per response.
    """
    truncation = Truncation(config.eval.top_p)
    params = replace(SamplingParams.of(config.rollout), temperature=config.eval.temperature, truncation=truncation)
    samples_per_prompt, size = config.eval.samples, config.rollout.prompts_per_step
    rows: dict[str, list[Any]] = defaultdict(list)
    for start in range(0, len(task.heldout), size):
        prompts = task.heldout[start : start + size]
        own = ranks.shard(len(prompts))
        rng = generator(config.seed, Stream.EVAL, start)
        with memory_advice(config, "evaluating", sampling_memory(config.rollout)):
            encoded = [policy.encode_prompt(prompt.question) for prompt in prompts]
            rollouts = sampler_of(policy, config.rollout).sample(encoded, samples_per_prompt, params, rng, own)
        completions = policy.decode([response.tolist() for response in rollouts.responses()])
        answered = [prompt for prompt in prompts[own] for _ in range(samples_per_prompt)]
        scores = [task.score(text, prompt) for text, prompt in zip(completions, answered, strict=True)]
        groups = [scores[i : i + samples_per_prompt] for i in range(0, len(scores), samples_per_prompt)]
        part = {
            "benchmark": [prompt.task for prompt in answered],
            "prompt_id": [prompt.prompt_id for prompt in answered],
            "sample_index": list(range(samples_per_prompt)) * len(prompts[own]),
            "answer": [score.answer for score in scores],
            "answer_class": [
                answer_class
                for prompt, group in zip(prompts[own], groups, strict=True)
                for answer_class in answer_classes(prompt, group)
            ],
            "is_correct": [score.is_correct for score in scores],
            "reward": [score.reward(config.task.reward_values) for score in scores],
            "response_length": rollouts.lengths.tolist(),
            "entropy_mean": rollouts.entropy_mean.tolist(),
        }
        for name, values in (
            (name, values) for found in ranks.all_gather_object(part) for name, values in found.items()
        ):
            rows[name] += values
        if on_step:
            judged = [verdict for verdict in rows["is_correct"] if verdict is not None]
            on_step(start + len(prompts), accuracy=float(np.mean(judged)) if judged else float("nan"))
    return {"step": step, "temperature": config.eval.temperature, **rows}


def find_policy(folder: Path, given: Config) -> Config:
    """Return the configuration that evaluates a folder.

    For a run, it is the run's own configuration with the latest checkpoint. For a model, it is ``given`` with that
    model.

    Raises:
        InputError: the run has no checkpoint.
    """
    if not has_begun(folder):
        return given.model_copy(update={"policy": given.policy.model_copy(update={"path": str(folder)})})
    checkpoint = find_checkpoint(folder)
    config = load_sampling_config(folder)
    return config.model_copy(update={"policy": config.policy.model_copy(update={"path": str(checkpoint / "policy")})})


def load_policy_and_task(config: Config) -> tuple[Policy, Task]:
    """Load policy and task, and warn of characters that the tokenizer cannot encode."""
    policy = Policy.load(config.policy)
    backend_of(policy)
    task = load_task(config.task, config.seed, policy.encode_prompt)
    warn_of_lost(policy.tokenizer, task, policy.name, policy.template)
    return policy, task
