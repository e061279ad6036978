"""Open the trace of a run, new or resumed, and finalize it however training ends."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from entrace.analysis.trace import Lexicon, TraceWriter, read_manifest
from entrace.analysis.trace.manifest import count_cores
from entrace.analysis.trace.parts import last_whole_step
from entrace.trainer.config import Config
from entrace.trainer.faults import explain_fault
from entrace.trainer.learner import Learner
from entrace.trainer.parallel.ranks import ALONE, Ranks
from entrace.trainer.runs.checkpoint import RunState, find_intact, load_checkpoint, remove_superseded, remove_unfinished
from entrace.trainer.runs.run_folder import check_prompts, describe_run, has_begun
from entrace.trainer.sampling.backend import backend_of

log = logging.getLogger("entrace")


def open_trace(
    config: Config, run_dir: Path, labels: Mapping[str, Any], learner: Learner, resume: bool
) -> tuple[TraceWriter, RunState]:
    """Return a new or resumed trace, and the state of its run."""
    ranks = learner.ranks
    if checkpoint := ranks.broadcast(lambda: _find_resumable(config, run_dir) if resume else None):
        state = load_checkpoint(checkpoint, learner)
        with ranks.main_first():
            if ranks.is_main:
                remove_superseded(run_dir, state.step)
            writer = TraceWriter.resume(run_dir, state.step, ranks.rank, ranks.all_gather_object, config.record.log)
        # The order in which floats are added depends on the number of threads.
        torch.set_num_threads(min(writer.manifest.get("num_threads") or torch.get_num_threads(), count_cores()))
        writer.manifest |= {
            "config": config.model_dump(mode="json"),
            "total_steps": config.steps,
            "num_processes": ranks.size,
        }
        return writer, state
    manifest = ranks.broadcast(lambda: _describe(config, run_dir, labels, learner))
    lexicon = Lexicon.load(Path(config.record.lexicon) if config.record.lexicon else None)
    # Without a checkpoint the run starts again; equal seeds give equal runs.
    with ranks.main_first():
        writer = TraceWriter.create(
            run_dir,
            manifest,
            learner.policy.vocab(),
            lexicon,
            replace=resume,
            rank=ranks.rank,
            gather=ranks.all_gather_object,
            log=config.record.log,
        )
    return writer, RunState()


def _find_resumable(config: Config, run_dir: Path) -> Path | None:
    """Return the checkpoint to resume from, or None.

    Without a checkpoint, the run starts again.
    """
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


def _describe(config: Config, run_dir: Path, labels: Mapping[str, Any], learner: Learner) -> dict[str, Any]:
    manifest = describe_run(config, run_dir, labels)
    if learner.policy.device.type == "cuda":
        manifest["hardware"]["gpu"] = torch.cuda.get_device_name(learner.policy.device)
    return {
        **manifest,
        "num_processes": learner.ranks.size,
        "num_threads": torch.get_num_threads(),
        "fast_paths": backend_of(learner.policy).fast_paths,
    }


@contextmanager
def finalize_on_exit(writer: TraceWriter, ranks: Ranks = ALONE) -> Iterator[None]:
    """Flush finished steps, and record in ``run.json`` how training ended.

    Both also happen if training raised.
    """
    try:
        with ranks.together(in_step=ranks.is_sharded):
            yield
    except BaseException as error:
        # The cause, such as a full disk, may prevent this write too; durable rows remain.
        with suppress(Exception), ranks.together():
            writer.flush()
        if isinstance(error, Exception):
            failure = explain_fault(error, writer.run_dir)
            with suppress(Exception):
                writer.finish(error=f"{type(failure).__name__}: {failure}")
        raise
    writer.finish()
