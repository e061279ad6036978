"""Translate faults of the machine into their meaning for the run and a remedy."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from entrace.analysis.trace import MANIFEST, InputError, flatten, read_manifest
from entrace.analysis.trace.errors import REMEDIES, fault_of
from entrace.trainer.parallel.ranks import LostProcessError
from entrace.trainer.settings import BaseConfig

# Messages of CPU allocators, which raise a plain RuntimeError.
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc", "out of memory")


class TrainingError(RuntimeError):
    """A failure of the run itself, in one line."""


def explain_fault(error: Exception, run_dir: Path) -> Exception:
    """Return a ``TrainingError`` for a disk fault or a lost process, else ``error``.

    Only faults of the disk that holds the run count. The message gives the last recorded step, which is read from the
    folder. Nothing is written.

    Args:
        error: The error that ended the run.
        run_dir: Folder of the run, which need not exist.
    """
    recorded = f"recorded up to step {_last_durable_step(run_dir)}"
    if isinstance(error, LostProcessError):
        return TrainingError(f"{run_dir}: {error}; {recorded}: resume with --resume")
    fault = fault_of(error)
    if fault is None or fault.errno not in REMEDIES:
        return error
    if fault.filename and not Path(os.fsdecode(fault.filename)).is_relative_to(run_dir):
        return error
    reason = os.strerror(fault.errno).lower()
    return TrainingError(f"{run_dir}: {reason}; {recorded}: {REMEDIES[fault.errno]} and resume with --resume")


@contextmanager
def translate_errors(run_dir: Path) -> Iterator[None]:
    """Re-raise errors from the block, translated by ``explain_fault``."""
    try:
        yield
    except Exception as error:
        if (failure := explain_fault(error, run_dir)) is error:
            raise
        raise failure from error


@contextmanager
def memory_advice(config: BaseConfig, activity: str, *keys: str) -> Iterator[None]:
    """Name the settings to lower, with their values, if the block runs out of memory.

    Args:
        config: Settings that the block uses, such as those of a run.
        activity: Description of the block, such as ``updating at step 3``.
        keys: Dotted names of the settings that bound its memory.

    Raises:
        TrainingError: memory ran out in the block.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, TrainingError) or not _is_out_of_memory(error):
            raise
        # The traceback would keep the memory occupied while the run is recorded as failed, which needs some.
        traceback.clear_frames(error.__traceback__)
        settings = flatten(config.model_dump(mode="json"))
        advice = " or ".join(f"{key} ({settings[key]} now)" for key in keys)
        raise TrainingError(f"out of memory while {activity}; lower {advice}") from error


def _is_out_of_memory(error: Exception) -> bool:
    is_known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return is_known or any(sign in str(error) for sign in OUT_OF_MEMORY)


def _last_durable_step(run_dir: Path) -> int:
    try:
        return read_manifest(run_dir)["last_durable_step"] if (run_dir / MANIFEST).exists() else 0
    except (InputError, OSError):
        return 0
