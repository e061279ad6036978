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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from analysis.trace import Lexicon, TraceWriter, read_manifest
from analysis.trace.parts import last_whole_step
from trainer.batch import Batch, PromptSource, collect_batch
from trainer.characters import warn_of_lost
from trainer.checkpoint import (
    RunState,
    find_intact,
    load_checkpoint,
    remove_superseded,
    remove_unfinished,
    save_checkpoint,
)
from trainer.config import Config
from trainer.distributed import ALONE, World
from trainer.evaluate import evaluate
from trainer.faults import explain_fault, explained
from trainer.method import TokenBatch
from trainer.plateau import PlateauDetector
from trainer.policy import Policy
from trainer.record import record_batch, record_prompts
from trainer.remarks import Remarks
from trainer.rollout import check_engine
from trainer.run_folder import check_prompts, describe_run, has_begun, is_complete
from trainer.seeding import Stream
from trainer.shaping import shape
from trainer.tasks import Task, load_task
from trainer.update import Learner, UpdateMetrics

log = logging.getLogger("entrace")


def train(
    config: Config,
    run_dir: Path,
    labels: Mapping[str, str],
    *,
    resume: bool = False,
    on_step: Callable[..., None] = lambda done, **figures: None,
    world: World = ALONE,
) -> None:
    """Trains one policy and records the run in ``run_dir``.

    Args:
        config: The run.
        run_dir: Folder of the trace; its name is the run id.
        labels: ``study`` and ``arm``, for the manifest.
        resume: Go on with a run that was interrupted or failed; a complete one is left alone.
        on_step: Called after every step with the step and figures to show.
        world: The processes that train together; each calls this with the same arguments.

    Raises:
        InputError: bad configuration, or a folder that cannot be used.
        TrainingError: the run itself failed; it is marked so and what it recorded stays readable.
    """
    with world.together():
        if resume and world.from_main(lambda: is_complete(config, run_dir)):
            return
        torch.manual_seed(config.seed)
        policy = Policy.load(config.policy)
        check_engine(policy, config.rollout)
        task = load_task(config.task, config.seed, policy.encode_prompt)
        warn_of_lost(policy.tokenizer, task, policy.name, policy.template)
        if world.is_sharded:
            policy.shard()
        learner = Learner(config, policy, world)
    with explained(run_dir):
        with world.together(in_step=world.is_sharded):
            writer, state = _open_trace(config, run_dir, {**labels, **task.describe()}, learner, resume)
        with durable(writer, world):
            if state.step == 0:
                rows = evaluate(config, learner.policy, task, step=0, world=world)
                if world.is_main:
                    record_prompts(writer, task.heldout)
                    writer.append("evals", rows)
                writer.flush(0)
            _run_steps(config, task, learner, writer, state, on_step)


@contextmanager
def durable(writer: TraceWriter, world: World = ALONE) -> Iterator[None]:
    """However training ends, the steps that it finished are made durable, and ``run.json`` says how it ended."""
    try:
        with world.together(in_step=world.is_sharded):
            yield
    except BaseException as error:
        # What ended the run, such as a full disk, may forbid writing too; what is durable already stays so.
        with suppress(Exception), world.together():
            writer.flush()
        if isinstance(error, Exception):
            failure = explain_fault(error, writer.run_dir)
            with suppress(Exception):
                writer.finish(error=f"{type(failure).__name__}: {failure}")
        raise
    writer.finish()


def _run_steps(
    config: Config,
    task: Task,
    learner: Learner,
    writer: TraceWriter,
    state: RunState,
    on_step: Callable[..., None],
) -> None:
    world = learner.world
    source = PromptSource(task, state.prompt_position)
    timeouts_before = writer.manifest.get("verifier_timeouts", 0)
    num_unjudged = writer.manifest.get("responses_without_verdict", 0)
    remarks = Remarks(config)
    plateau = PlateauDetector(config.shaping.plateau, state.history)
    for step in range(state.step + 1, config.steps + 1):
        batch = collect_batch(config, learner.policy, source, step, world)
        samples = batch.samples
        advantages = batch.advantages[:, None].expand(samples.tokens.shape)
        context = TokenBatch.of(batch, config.seed, Stream.SHAPING, step)
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
        rows = evaluate(config, learner.policy, task, step, world=world) if is_evaluated else None
        if world.is_main:
            writer.append("steps", {"step": step, "is_shaped": is_shaped, **figures, **seconds})
            if rows:
                writer.append("evals", rows)
        # A step has ended once it has for all processes.
        num_timeouts = sum(world.gather(task.num_timeouts))
        num_unjudged += int((~batch.has_verdict).sum())
        if world.is_main:
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
    if world.is_main:
        remarks.at_end(plateau.plateau_step)


def _step_figures(batch: Batch, metrics: UpdateMetrics, lr: float) -> dict[str, Any]:
    mask = batch.samples.response_mask
    kept = int(batch.group_ids[batch.is_kept].unique().numel())
    return {
        "loss": metrics.loss,
        "reward_mean": float(batch.rewards[batch.has_verdict].mean()),
        "accuracy": sum(bool(score.is_correct) for score in batch.scores) / int(batch.has_verdict.sum()),
        "format_rate": sum(score.answer is not None for score in batch.scores) / len(batch.scores),
        "entropy_token_mean": float(batch.samples.stats.entropy[mask].mean()),
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


def _open_trace(
    config: Config, run_dir: Path, labels: Mapping[str, str], learner: Learner, resume: bool
) -> tuple[TraceWriter, RunState]:
    """A new trace, or the one to go on with and where it stands."""
    world = learner.world
    if checkpoint := world.from_main(lambda: _find_beginning(config, run_dir) if resume else None):
        state = load_checkpoint(checkpoint, learner)
        with world.main_first():
            if world.is_main:
                remove_superseded(run_dir, state.step)
            writer = TraceWriter.resume(run_dir, state.step, world.rank, world.gather)
        writer.manifest |= {
            "config": config.model_dump(mode="json"),
            "total_steps": config.steps,
            "num_processes": world.size,
        }
        return writer, state
    manifest = world.from_main(lambda: _describe(config, run_dir, labels, learner))
    lexicon = Lexicon.load(Path(config.record.lexicon) if config.record.lexicon else None)
    # Without a checkpoint nothing is lost but time by starting again: equal seeds give equal runs.
    with world.main_first():
        writer = TraceWriter.create(
            run_dir,
            manifest,
            learner.policy.vocab(),
            lexicon,
            replace=resume,
            rank=world.rank,
            gather=world.gather,
            mantissa_bits=config.record.mantissa_bits,
        )
    return writer, RunState()


def _find_beginning(config: Config, run_dir: Path) -> Path | None:
    """The checkpoint to go on from; None where none was written, and the run starts again."""
    if not has_begun(run_dir):
        return None
    whole, damage = last_whole_step(run_dir, read_manifest(run_dir))
    if damage:
        log.warning("%s", damage)
    checkpoint = find_intact(run_dir, at_most=whole)
    remove_unfinished(run_dir)
    if checkpoint:
        check_prompts(config, run_dir)
    return checkpoint


def _describe(config: Config, run_dir: Path, labels: Mapping[str, str], learner: Learner) -> dict[str, Any]:
    manifest = describe_run(config, run_dir, labels)
    if learner.policy.device.type == "cuda":
        manifest["hardware"]["gpu"] = torch.cuda.get_device_name(learner.policy.device)
    return {**manifest, "num_processes": learner.world.size, "num_threads": torch.get_num_threads()}
