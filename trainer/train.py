"""The training loop: GRPO with verifiable rewards, every token recorded.

It follows arXiv 2508.02260: GRPO with DAPO's clip-higher, token-mean loss, dynamic sampling, and overlong penalty. Each
step samples G responses per prompt, scores them to rewards r, and minimizes, with rho_t = p_t / p_t,old::

    A_i = (r_i - mean r) / std r                        algorithm.advantages
    A'  = shape(A)                                      algorithm.shaping
    L_t = max(-rho_t A', -clip(rho_t) A')               algorithm.losses
    loss = sum_t c_t w_t L_t                            algorithm.mini_batch

``learner`` computes rho, one mini-batch at a time, and takes the optimizer's steps.

Deviations from the released code of the paper:

1. Old log-probabilities are recorded during sampling, from the distribution sampled from; there is no second pass.
2. A refill draws as many prompts as groups are missing, not a whole batch.
3. PPL shaping also applies its factor in the low-perplexity branch.
4. The window of position shaping may start at the plateau detected during training, not only at a fixed step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from entrace.analysis.trace import TraceWriter
from entrace.analysis.trace.arguments import checked
from entrace.analysis.trace.places import check_folder
from entrace.analysis.trace.sampling import TokenSampling
from entrace.trainer.algorithm.advantages import group_relative_advantage
from entrace.trainer.algorithm.plateau import PlateauDetector
from entrace.trainer.algorithm.shaping import shape
from entrace.trainer.config import Config
from entrace.trainer.evaluate import evaluate, load_policy_and_task
from entrace.trainer.faults import translate_errors
from entrace.trainer.learner import Learner, make_objectives
from entrace.trainer.parallel.ranks import ALONE, Ranks
from entrace.trainer.remarks import Remarks
from entrace.trainer.rollouts import PromptSource, collect_batch, view_rollouts
from entrace.trainer.runs.checkpoint import RunState, save_checkpoint
from entrace.trainer.runs.record import StepRecorder, progress_metrics, record_batch, record_prompts, sample_tokens
from entrace.trainer.runs.recording import finalize_on_exit, open_trace
from entrace.trainer.runs.run_folder import is_complete
from entrace.trainer.sampling.engine import sampler_of
from entrace.trainer.seeding import Stream
from entrace.trainer.tasks import Task


@checked
def train(
    config: Config,
    run_dir: str | Path,
    labels: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
    on_step: Callable[..., None] = lambda done, **metrics: None,
    ranks: Ranks = ALONE,
) -> None:
    """Train one policy and record the run in ``run_dir``.

    Args:
        config: The run.
        run_dir: Folder of the trace; its name is the run id.
        labels: ``study`` and ``arm``, for the manifest; None for the folder above ``run_dir`` and the shaping method.
        resume: Continue a run that was interrupted or failed; a complete run stays as it is.
        on_step: Called after every step with the step and the metrics to show.
        ranks: The processes that train together; each calls this function with the same arguments.

    Raises:
        InputError: invalid configuration, or a folder that cannot be used.
        TrainingError: the run failed; it is marked as failed, and its recorded steps stay readable.
    """
    run_dir = Path(run_dir)
    if labels is None:
        labels = {"study": run_dir.resolve().parent.name, "arm": config.shaping.method}
    with ranks.together():
        check_folder(run_dir)
        if resume and ranks.broadcast(lambda: is_complete(config, run_dir)):
            return
        torch.manual_seed(config.seed)
        policy, task = load_policy_and_task(config)
        if ranks.is_sharded:
            policy.shard()
        # Before the run folder is created, so that an engine that cannot start leaves none behind.
        sampler_of(policy, config.rollout)
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
    """Train from the step after ``state`` to the last step.

    A step samples, scores, shapes, updates, records, and evaluates.
    """
    ranks = learner.ranks
    source = PromptSource(task, state.prompt_position)
    plateau = PlateauDetector(config.shaping.plateau, state.history)
    recorder = StepRecorder(task, writer, ranks)
    remarks = Remarks(config)
    # Not that of the configuration: a pruned run continues as it was pruned.
    sampling = TokenSampling.of(writer.manifest)
    for step in range(state.step + 1, config.steps + 1):
        batch = collect_batch(config, learner.policy, source, step, ranks)
        advantages = group_relative_advantage(
            batch.total_rewards, batch.group_ids, config.loss.normalize_std, batch.has_verdict
        )
        rollouts = view_rollouts(batch, config.seed, Stream.SHAPING, step)
        per_token = advantages[:, None].expand_as(rollouts.response_mask)
        shaped, is_shaped = shape(per_token, rollouts, config.shaping, step, plateau.plateau_step)
        objectives = make_objectives(config, batch, shaped, step, [entropy for entropy, _ in plateau.history])
        started = time.perf_counter()
        tokens = sample_tokens(config, sampling, batch, step, state.next_rollout_id)
        measured = learner.measure(batch, tokens.is_stored)
        measure_s = time.perf_counter() - started
        metrics = learner.update(batch, objectives, step)
        update_s = time.perf_counter() - started - measure_s
        after = learner.capture(batch, metrics, tokens.captured) if config.record.captures(step) else None

        record_batch(
            writer,
            batch,
            advantages,
            shaped,
            after,
            step=step,
            first_rollout_id=state.next_rollout_id,
            temperature=config.rollout.temperature,
            is_stored=tokens.is_stored,
            measured=measured,
        )
        record_s = time.perf_counter() - started - update_s
        is_last = step == config.steps
        if is_last or step % config.eval.every == 0:
            recorder.record_evaluation(evaluate(config, learner.policy, task, step, ranks=ranks))
        seconds = {"update_s": update_s, "record_s": record_s}
        summary = recorder.record_step(step, batch, metrics, is_shaped=is_shaped, lr=learner.lr, **seconds)
        if ranks.is_main:
            remarks.after_step(step, batch)

        plateau.update(summary["entropy_token_mean"], summary["accuracy"])
        writer.manifest["plateau_step"] = plateau.plateau_step
        state.advance(step, source.position, len(batch.prompts), plateau.history)
        if is_last or step % config.record.flush_every == 0:
            writer.flush()
        if is_last or step % config.record.checkpoint_every == 0:
            save_checkpoint(writer.run_dir, learner, state)
        on_step(step, **progress_metrics(summary))
    if ranks.is_main:
        remarks.at_end(plateau.plateau_step)
