"""Faults of the machine, told as what they mean for the run and what to do about them."""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from entrace.analysis.trace import MANIFEST, InputError, flatten, read_manifest
from entrace.trainer.parallel.ranks import LostProcessError
from entrace.trainer.settings import BaseConfig

REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make it writable"),
}
# What allocators of the CPU say in a plain RuntimeError.
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc", "out of memory")


class TrainingError(RuntimeError):
    """The run itself failed, in one line."""


def explain_fault(error: Exception, run_dir: Path) -> Exception:
    """What a run that ``error`` ended shall fail with: a ``TrainingError`` for a full or locked disk or a lost process.

    Asks the folder itself up to which step it holds the run, and writes nothing.

    Args:
        error: What ended the run.
        run_dir: Its folder, which need not exist.

    Returns:
        ``error`` itself where there is nothing to add.
    """
    code = next((code for code in REMEDIES if _is_fault(error, code)), None)
    named = getattr(error, "filename", None)
    recorded = f"recorded up to step {_last_durable_step(run_dir)}"
    if isinstance(error, LostProcessError):
        return TrainingError(f"{run_dir}: {error}; {recorded}: go on with --resume")
    if code is None or (named and not Path(os.fsdecode(named)).is_relative_to(run_dir)):
        return error
    return TrainingError(
        f"{run_dir}: {os.strerror(code).lower()}; {recorded}: {REMEDIES[code]} and go on with --resume"
    )


@contextmanager
def translate_errors(run_dir: Path) -> Iterator[None]:
    """What fails within fails with what ``explain_fault`` makes of it."""
    try:
        yield
    except Exception as error:
        if (failure := explain_fault(error, run_dir)) is error:
            raise
        raise failure from error


@contextmanager
def memory_advice(config: BaseConfig, activity: str, *keys: str) -> Iterator[None]:
    """Running out of memory within names the settings to lower, with their present values.

    Args:
        config: Settings of what is done, such as those of a run.
        activity: What is done within, as in ``updating at step 3``.
        keys: Dotted names of the settings that decide how much memory that takes.

    Raises:
        TrainingError: memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, TrainingError) or not _is_out_of_memory(error):
            raise
        # The traceback would hold what filled the memory until the run has been recorded as failed, which needs some.
        traceback.clear_frames(error.__traceback__)
        settings = flatten(config.model_dump(mode="json"))
        advice = " or ".join(f"{key} ({settings[key]} now)" for key in keys)
        raise TrainingError(f"out of memory while {activity}; lower {advice}") from error


def _is_fault(error: Exception, code: int) -> bool:
    # Writers in Rust and C++ raise errors of their own that carry the system's in their text alone.
    text = str(error)
    return getattr(error, "errno", None) == code or os.strerror(code) in text or f"(os error {code})" in text


def _is_out_of_memory(error: Exception) -> bool:
    is_known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return is_known or any(sign in str(error) for sign in OUT_OF_MEMORY)


def _last_durable_step(run_dir: Path) -> int:
    try:
        return read_manifest(run_dir)["last_durable_step"] if (run_dir / MANIFEST).exists() else 0
    except (InputError, OSError):
        return 0
