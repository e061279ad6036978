"""Report a broken connection to a storage as such, not as a missing file.

fsspec answers that a file does not exist if it cannot ask. A storage that ``guard`` has changed raises
``StorageError`` instead, which names the URL, and which no handler for missing files catches.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any

from entrace.analysis.trace.errors import InputError, StorageError, in_one_line

# Methods of a file system and of its files that ask the storage.
METHODS = (
    *("info", "ls", "find", "glob", "cat_file", "pipe_file", "put_file", "get_file", "rm", "rm_file", "mv", "cp_file"),
    *("makedirs", "mkdir"),
)
FILE_METHODS = ("read", "readinto", "write", "flush", "close", "_fetch_range", "_initiate_upload", "_upload_chunk")
# Errors about a file rather than about the connection.
ABOUT_FILES = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
# Packages of storages, whose errors need not be those of the operating system.
PACKAGES = {
    *("aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "google", "httpx", "huggingface_hub", "requests"),
    *("s3fs", "urllib3"),
}
# Errors of a storage whose messages do not say what to do.
REMEDIES = {
    "NoCredentialsError": "no credentials; set those of the storage, such as AWS_ACCESS_KEY_ID",
    "FileNotFoundError": "no such bucket or file",
    "PermissionError": "permission denied; check the credentials",
}
SCHEME = "://"
MARK = "_entrace_guarded"


def reason_of_storage(error: Exception) -> str:
    """Return why a storage failed, in one line."""
    return REMEDIES.get(type(error).__name__) or in_one_line(error)


def guard(storage: Any) -> None:
    """Make a file system of fsspec raise ``StorageError`` if its connection fails.

    The error names the URL.
    """
    if getattr(storage, MARK, False):
        return
    setattr(storage, MARK, True)

    def name(path: Any) -> str:
        if not isinstance(path, str):
            return str(storage.protocol)
        return path if SCHEME in path else storage.unstrip_protocol(path)

    for method in METHODS:
        if found := getattr(storage, method, None):
            setattr(storage, method, _naming(found, name))
    opened = _naming(storage.open, name)

    @wraps(storage.open)
    def open_guarded(path: Any, *args: Any, **options: Any) -> Any:
        file = opened(path, *args, **options)
        for method in FILE_METHODS:
            # A file of another library may take no attributes.
            with suppress(AttributeError):
                setattr(file, method, _naming(getattr(file, method), lambda *_: name(path)))
        return file

    def kind(path: Any) -> str | None:
        try:
            return storage.info(path)["type"]
        except ABOUT_FILES:
            return None

    storage.open = open_guarded
    storage.exists = lambda path, **options: kind(path) is not None
    storage.isdir = lambda path: kind(path) == "directory"
    storage.isfile = lambda path: kind(path) == "file"


def _naming(method: Callable[..., Any], name: Callable[[Any], str]) -> Callable[..., Any]:
    @wraps(method)
    def call(*args: Any, **options: Any) -> Any:
        try:
            return method(*args, **options)
        except ABOUT_FILES:
            raise
        except Exception as error:
            package = type(error).__module__.partition(".")[0]
            if isinstance(error, InputError) or not (isinstance(error, OSError) or package in PACKAGES):
                raise
            raise StorageError(f"{name(args[0] if args else None)}: {reason_of_storage(error)}") from error

    return call
