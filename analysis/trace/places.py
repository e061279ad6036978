"""Name files and folders by local paths, and by URLs of remote storages.

fsspec must know the storage, as for ``s3://bucket/run``.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from entrace.analysis.trace.connection import SCHEME, guard, reason_of_storage
from entrace.analysis.trace.errors import InputError, StorageError, in_one_line, quoted_input_error, reason_of

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

MEMORY = "memory://"
# Errors about the disk, not about a path.
OF_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOMEM)


def to_place(path: str | Path) -> Path:
    """Return a local path as ``Path``, and a URL as ``upath.UPath``.

    Both have the same methods.

    Raises:
        InputError: the package that opens such URLs is not installed, or no package does.
    """
    if is_remote(path):
        return cast("Path", path)
    text = str(path)
    if SCHEME not in text:
        return Path(path)
    protocol = text.partition(SCHEME)[0]
    try:
        import fsspec
        from upath import UPath

        fsspec.get_filesystem_class(protocol)
        place = UPath(text)
        guard(place.fs)
        return cast("Path", place)
    except ImportError as error:
        raise InputError(f"{text}: {in_one_line(error)}; pip install 'entrace[remote]'") from None
    except ValueError:
        raise InputError(f'{text}: no storage is called "{protocol}"; a local path has no {SCHEME}') from None


def is_remote(path: str | Path) -> bool:
    """Return whether a path that ``to_place`` returned is a URL."""
    return not isinstance(path, str | Path)


def check_folder(path: Path) -> None:
    """Refuse a folder to write to if it is a file, or lies below one.

    Raises:
        InputError: the path, or a part of it, is a file.
    """
    parents = [] if is_remote(path) else path.parents
    found = next((place for place in (path, *parents) if place.exists()), None)
    if found and not found.is_dir():
        raise InputError(f"{found}: is a file; name a folder")


@contextmanager
def usable(run_dir: Path) -> Iterator[None]:
    """Turn errors about the path of a run into one line.

    Errors about space and the disk remain.

    Raises:
        InputError: the path cannot be a folder that is written.
    """
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in OF_DISK:
            raise
        # Others are a link that leads to itself, and a null character.
        reason = reason_of(error) if isinstance(error, OSError) else in_one_line(error)
        raise InputError(f"{run_dir}: cannot be the folder of a run ({reason})") from None


def check_local(run_dir: Path) -> None:
    """Refuse a URL as the folder of a run that is recorded or changed.

    A URL is recognized even if ``Path`` has turned its ``//`` into ``/``.

    Raises:
        InputError: the folder is a URL.
    """
    if found := re.match(r"([a-z][a-z0-9+.-]+):/+", str(run_dir)):
        url = str(run_dir).replace(found[0], f"{found[1]}{SCHEME}", 1)
        raise InputError(f"{url}: a run is recorded and changed on a local disk only; copy it there or from there")


def source_of(path: Path) -> Any:
    """Return what pyarrow can read a file from."""
    return path.open("rb") if is_remote(path) else path


def forms_of(path: str) -> Iterator[str]:
    """Yield the names that DuckDB may use for a file.

    These are the given name and, for a URL, the form that its storage uses.
    """
    yield path
    if SCHEME in path:
        place = cast("Any", to_place(path))
        yield place.fs.unstrip_protocol(place.path)


def storages_of(paths: Iterable[str]) -> dict[str, AbstractFileSystem]:
    """Return the file systems of the URLs among paths, by protocol."""
    urls = {path.partition(SCHEME)[0]: path for path in paths if SCHEME in path}
    return {protocol: cast("Any", to_place(path)).fs for protocol, path in urls.items()}


def find(pattern: str) -> list[Path]:
    """Return the folders that a URL with wildcards matches, in order."""
    place = cast("Any", to_place(pattern))
    return sorted(to_place(place.fs.unstrip_protocol(found)) for found in place.fs.glob(place.path))


def copies_of(paths: Iterable[str]) -> dict[str, bytes]:
    """Return the content of files in ``memory://``, which another process cannot see."""
    return {path: to_place(path).read_bytes() for path in paths if path.startswith(MEMORY)}


def store(copies: dict[str, bytes]) -> None:
    """Store what ``copies_of`` returned."""
    for path, content in copies.items():
        to_place(path).write_bytes(content)


@contextmanager
def reaching(path: str | Path) -> Iterator[None]:
    """Turn any error of a remote storage into one line.

    Errors about local files pass unchanged.

    Raises:
        InputError: the storage cannot be reached, or refuses.
    """
    try:
        yield
    except StorageError as error:
        # Creating a folder asks for those above it up to the root, whose name would not tell what was wanted.
        protocol, _, name = str(path).partition(SCHEME)
        root, _, reason = str(error).partition(": ")
        raise StorageError(f"{root}{name.lstrip('/')}: {reason}" if root == protocol + SCHEME else str(error)) from None
    except InputError:
        raise
    except Exception as error:
        if SCHEME not in str(path):
            raise
        raise InputError(quoted_input_error(error) or f"{path}: {reason_of_storage(error)}") from None
