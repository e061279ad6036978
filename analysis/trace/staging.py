"""Write the files of a folder completely or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from entrace.analysis.trace.errors import TEMPORARY, faults_at
from entrace.analysis.trace.places import is_remote, reaching

# Folder, inside the target and hence on its disk, that marks an unfinished attempt.
PARTIAL = ".entrace-partial"


def is_interrupted(out: Path) -> bool:
    """Return whether a process was killed while it filled this folder.

    The command may then be repeated.
    """
    return (out / PARTIAL).exists()


@contextmanager
def staged(out: Path, *, last: str, replaces: Iterable[str] = ()) -> Iterator[Path]:
    """Yield a new folder whose files move to ``out`` when the block ends.

    If the block raises, ``out`` stays as it was. If the process is killed while files move, ``is_interrupted`` says so
    until another attempt is complete.

    Args:
        out: Target, which is created. The caller has checked that its files may be replaced.
        last: File that moves last, because its presence shows that the others are complete.
        replaces: Files of ``out`` to remove unless the block writes them.
    """
    if is_remote(out):
        with reaching(out), tempfile.TemporaryDirectory(prefix=TEMPORARY) as folder:
            yield Path(folder)
            _upload(Path(folder), out, last, replaces)
        return
    partial = out / PARTIAL
    is_new, was_interrupted = not out.exists(), is_interrupted(out)
    with faults_at(out):
        out.mkdir(parents=True, exist_ok=True)
        partial.mkdir(exist_ok=True)
        try:
            _empty(partial)
            yield partial
        except BaseException:
            with suppress(OSError):
                _empty(partial)
                if not was_interrupted:
                    partial.rmdir()
                if is_new:
                    out.rmdir()
            raise
        names = {path.name for path in partial.iterdir()}
        stale = set(replaces) - names
        try:
            _publish(partial, sorted(names - {last}), stale, last)
        except KeyboardInterrupt:
            # Moving takes milliseconds, and a half-moved folder would have to be written again.
            _publish(partial, sorted(names - {last}), stale, last)
            raise


def _publish(partial: Path, names: Iterable[str], stale: Iterable[str], last: str) -> None:
    out = partial.parent
    for name in stale:
        (out / name).unlink(missing_ok=True)
    for name in (*names, last):
        # After an interruption, a file may have moved already.
        with suppress(FileNotFoundError):
            (partial / name).replace(out / name)
    with suppress(FileNotFoundError):
        partial.rmdir()


def _upload(folder: Path, out: Path, last: str, replaces: Iterable[str]) -> None:
    """Write the files of a folder to a storage.

    A file in the storage marks an unfinished attempt.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / PARTIAL).write_bytes(b"")
    names = {path.name for path in folder.iterdir()}
    for name in set(replaces) - names:
        (out / name).unlink(missing_ok=True)
    for name in (*sorted(names - {last}), last):
        (out / name).write_bytes((folder / name).read_bytes())
    (out / PARTIAL).unlink()


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
