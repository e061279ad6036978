"""Lock a run's folder against other processes, if the file system has locks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from entrace.analysis.trace.errors import InputError
from entrace.analysis.trace.places import check_local, usable

# Folder of the lock files, beside the runs.
LOCKS = ".locks"


def lock_path(run_dir: Path) -> Path:
    """Return the lock file of a run, which exists once a process has locked the run."""
    run_dir = Path(run_dir).resolve()
    return run_dir.parent / LOCKS / run_dir.name


def acquire_lock(run_dir: Path, *, waits: bool) -> int | None:
    """Lock a run, and return a file descriptor that holds the lock until closed.

    None if the file system has no locks.

    Args:
        run_dir: The run, begun or not.
        waits: Wait for another process to release the lock instead of raising.

    Raises:
        InputError: another process holds the lock, the run would be recorded in a remote storage, or no folder can have
            this path.
    """
    check_local(run_dir)
    with usable(run_dir):
        path = lock_path(run_dir)
    # Windows and some shared file systems have no such locks; launchers then start each run only once. An unwritable
    # folder is reported by the writer.
    with suppress(ImportError, OSError):
        import fcntl

        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except OSError as error:
            os.close(file)
            if isinstance(error, BlockingIOError):
                raise InputError(
                    f"{run_dir}: another process is already recording this run; stop it or wait for it"
                ) from None
            raise
        return file
    return None


@contextmanager
def locked(run_dir: Path, *, waits: bool) -> Iterator[bool]:
    """Hold the lock of a run inside the block, and yield whether there is one.

    See ``acquire_lock``.
    """
    file = acquire_lock(run_dir, waits=waits)
    try:
        yield file is not None
    finally:
        if file is not None:
            os.close(file)
