"""The training loop: GRPO with verifiable rewards, every token recorded.

Follows the recipe of arXiv 2508.02260 (GRPO with DAPO's clip-higher, token-mean loss, dynamic sampling and overlong
penalty). Deviations from its released code:

1. Old log-probabilities are those recorded while sampling, of the distribution sampled from; no second pass.
2. A refill draws as many prompts as groups are missing, not a whole batch.
3. PPL shaping applies its factor in the low-perplexity branch too.
4. The position window may start at the plateau detected online instead of at a fixed step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from entrace.analysis.trace import TraceWriter
from entrace.trainer.algorithm.plateau import PlateauDetector
from entrace.trainer.algorithm.shaping import shape
from entrace.trainer.config import Config
from entrace.trainer.evaluate import evaluate
from entrace.trainer.faults import translate_errors
from entrace.trainer.learner import Learner, UpdateMetrics
from entrace.trainer.model.policy import Policy
from entrace.trainer.parallel.ranks import ALONE, Ranks
from entrace.trainer.remarks import Remarks
from entrace.trainer.rollouts import Batch, PromptSource, collect_batch, view_rollouts
from entrace.trainer.runs.checkpoint import (
    RunState,
    save_checkpoint,
)
from entrace.trainer.runs.record import record_batch, record_prompts
from entrace.trainer.runs.recording import finalize_on_exit, open_trace
from entrace.trainer.runs.run_folder import is_complete
from entrace.trainer.sampling.backend import backend_of
from entrace.trainer.seeding import Stream
from entrace.trainer.tasks import Task, load_task
from entrace.trainer.tasks.characters import warn_of_lost

log = logging.getLogger("entrace")


def train(
    config: Config,
    run_dir: Path,
    labels: Mapping[str, str],
    *,
    resume: bool = False,
    on_step: Callable[..., None] = lambda done, **figures: None,
    ranks: Ranks = ALONE,
) -> None:
    """Trains one policy and records the run in ``run_dir``.

    Args:
        config: The run.
        run_dir: Folder of the trace; its name is the run id.
        labels: ``study`` and ``arm``, for the manifest.
        resume: Go on with a run that was interrupted or failed; a complete one is left alone.
        on_step: Called after every step with the step and figures to show.
        ranks: The processes that train together; each calls this with the same arguments.

    Raises:
        InputError: bad configuration, or a folder that cannot be used.
        TrainingError: the run itself failed; it is marked so and what it recorded stays readable.
    """
    with ranks.together():
        if resume and ranks.broadcast(lambda: is_complete(config, run_dir)):
            return
        torch.manual_seed(config.seed)
        policy = Policy.load(config.policy)
        backend_of(policy)
        task = load_task(config.task, config.seed, policy.encode_prompt)
        warn_of_lost(policy.tokenizer, task, policy.name, policy.template)
        if ranks.is_sharded:
            policy.shard()
        learner = Learner(config, policy, ranks)
    with translate_errors(run_dir):
        with ranks.together(in_step=ranks.is_sharded):
            writer, state = open_trace(config, run_dir, {**labels, **task.describe()}, learner, resume)
        with finalize_on_exit(writer, ranks):
            if state.step == 0:
                rows = evaluate(config, learner.policy, task, step=0, ranks=ranks)
                if ranks.is_main:
                    record_prompts(writer, task.heldout)
                    writer.append("evals", rows)
                writer.flush(0)
            _run_steps(config, task, learner, writer, state, on_step)


def _run_steps(
    config: Config,
    task: Task,
    learner: Learner,
    writer: TraceWriter,
    state: RunState,
    on_step: Callable[..., None],
) -> None:
    ranks = learner.ranks
    source = PromptSource(task, state.prompt_position)
    timeouts_before = writer.manifest.get("verifier_timeouts", 0)
    num_unjudged = writer.manifest.get("responses_without_verdict", 0)
    remarks = Remarks(config)
    plateau = PlateauDetector(config.shaping.plateau, state.history)
    for step in range(state.step + 1, config.steps + 1):
        batch = collect_batch(config, learner.policy, source, step, ranks)
        samples = batch.rollouts
        advantages = batch.advantages[:, None].expand(samples.response_ids.shape)
        context = view_rollouts(batch, config.seed, Stream.SHAPING, step)
        shaped, is_shaped = shape(advantages, context, config.shaping, step, plateau.plateau_step)

        started = time.perf_counter()
        metrics = learner.update(batch, shaped, step)
        updated = time.perf_counter()
        after = learner.capture(batch, metrics, step) if config.record.captures(step) else None
        record_batch(
            writer,
            batch,
            shaped,
            after,
            step=step,
            first_rollout_id=state.next_rollout_id,
            temperature=config.rollout.temperature,
        )
        figures = _step_figures(batch, metrics, lr=learner.optimizer.param_groups[0]["lr"])
        is_last = step == config.steps
        is_evaluated = is_last or step % config.eval.every == 0
        seconds = {"update_s": updated - started, "record_s": time.perf_counter() - updated}
        rows = evaluate(config, learner.policy, task, step, ranks=ranks) if is_evaluated else None
        if ranks.is_main:
            writer.append("steps", {"step": step, "is_shaped": is_shaped, **figures, **seconds})
            if rows:
                writer.append("evals", rows)
        # A step has ended once it has for all processes.
        num_timeouts = sum(ranks.all_gather_object(task.num_timeouts))
        num_unjudged += int((~batch.has_verdict).sum())
        if ranks.is_main:
            remarks.after_step(step, batch)
        writer.end_step(step)

        plateau.update(figures["entropy_token_mean"], figures["accuracy"])
        writer.manifest["plateau_step"] = plateau.plateau_step
        state.step = step
        state.prompt_position = source.position
        state.next_rollout_id += len(batch.prompts)
        state.history = plateau.history
        if num_timeouts:
            writer.manifest["verifier_timeouts"] = timeouts_before + num_timeouts
        if num_unjudged:
            writer.manifest["responses_without_verdict"] = num_unjudged
        if is_last or step % config.record.flush_every == 0:
            writer.flush()
        if is_last or step % config.record.checkpoint_every == 0:
            save_checkpoint(writer.run_dir, learner, state)
        on_step(
            step,
            reward=figures["reward_mean"],
            accuracy=figures["accuracy"],
            entropy=figures["entropy_token_mean"],
            tokens_per_s=figures["tokens"] / (figures["rollout_s"] + figures["reward_s"] + sum(seconds.values())),
        )
    if ranks.is_main:
        remarks.at_end(plateau.plateau_step)


def _step_figures(batch: Batch, metrics: UpdateMetrics, lr: float) -> dict[str, Any]:
    mask = batch.rollouts.response_mask
    kept = int(batch.group_ids[batch.is_kept].unique().numel())
    return {
        "loss": metrics.loss,
        "reward_mean": float(batch.rewards[batch.has_verdict].mean()),
        "accuracy": sum(bool(score.is_correct) for score in batch.scores) / int(batch.has_verdict.sum()),
        "format_rate": sum(score.answer is not None for score in batch.scores) / len(batch.scores),
        "entropy_token_mean": float(batch.rollouts.stats.entropy[mask].mean()),
        "kl": metrics.kl,
        "clip_frac_low": metrics.clip_frac_low,
        "clip_frac_high": metrics.clip_frac_high,
        "clip_frac_dual": metrics.clip_frac_dual,
        "grad_norm": metrics.grad_norm,
        "lr": lr,
        "tokens": int(mask.sum()),
        "groups_kept": kept,
        "groups_dropped": int(batch.group_ids[-1]) + 1 - kept,
        "rollout_s": batch.rollout_s,
        "reward_s": batch.reward_s,
    }
