"""Define the error for bad input, and turn other errors into one readable line.

An error of the operating system, such as a full disk, gets a remedy. Libraries in Rust and C++ raise errors of their
own, which only quote that of the system; ``fault_of`` finds it.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from entrace.analysis.trace.plain import plain

# Longest message, in characters, that is joined from several lines.
MAX_JOINED = 500
# Most valid names that an error lists after it suggested one.
MAX_LISTED = 20
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space"),
    errno.EROFS: "make it writable",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "change its permissions"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "allow more open files (ulimit -n)"),
    errno.EFBIG: "allow larger files (ulimit -f)",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "name a path whose parents are folders",
    errno.EISDIR: "name a file",
    errno.EEXIST: "choose another name",
    errno.ELOOP: "remove the link that leads to itself",
    errno.EIO: "check the disk",
    errno.ENOMEM: "free some memory",
}
# Prefix of the temporary folders that entrace creates.
TEMPORARY = "entrace-"
# Part of DuckDB's message that no space is left for intermediate results.
SPILL_LIMIT = "max_temp_directory_size"
TRACEBACK = "Traceback (most recent call last)"
NO_TEMPORARY = "No usable temporary directory"
TMPDIR = "set TMPDIR to a writable folder with free space"


class InputError(Exception):
    """Report bad input in one line.

    The line names the fault, the expected value, and the nearest valid name. The command line prints the message and
    exits with code 2; a library caller can catch the exception.
    """

    def __init__(self, message: str) -> None:
        """Store ``message``, shortened and escaped: it may quote any file or name."""
        super().__init__(plain(message))


class StorageError(InputError):
    """Report that a remote storage could not be asked; its files may exist."""


def nearest(name: str, options: Iterable[str], others: str = "valid") -> str:
    """Return ``'; did you mean "x"?'`` for the closest of ``options``.

    If none is close, the hint lists all options.

    Args:
        name: The name that was given.
        options: The valid names; the hint is empty if there are none.
        others: The word that introduces the list of all options.
    """
    options = list(options)
    if close := _closest(name, options):
        return f'; did you mean "{close}"?'
    return f"; {others}: {', '.join(sorted(options))}" if options else ""


def choices(name: str, options: Iterable[str]) -> str:
    """Return the hint of ``nearest``, and at most ``MAX_LISTED`` valid names."""
    options = sorted(options)
    listed = ", ".join(options[:MAX_LISTED]) or "none"
    more = f", and {len(options) - MAX_LISTED} more" if len(options) > MAX_LISTED else ""
    close = _closest(name, options)
    return f'; did you mean "{close}"? Valid: {listed}{more}' if close else f"; valid: {listed}{more}"


def _closest(name: str, options: list[str]) -> str | None:
    """Return the option of similar spelling, or the only one that contains the name.

    Similarity ignores case. None if no option fits.
    """
    folded = {option.casefold(): option for option in options}
    if close := difflib.get_close_matches(name.casefold(), folded, n=1):
        return folded[close[0]]
    containing = [option for option in options if name and name in option]
    return containing[0] if len(containing) == 1 else None


def in_one_line(error: BaseException) -> str:
    """Return the first line of an exception's message.

    If the message is empty, the name of the class is returned. If the first line ends with a colon, the following lines
    are joined to it.
    """
    if isinstance(error, UnicodeDecodeError):
        return f"byte 0x{error.object[error.start]:02x} at offset {error.start} is not {error.encoding.upper()}"
    if isinstance(error, KeyError):
        return f"no key {error}"
    if quoted := quoted_input_error(error):
        return quoted
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return plain(" ".join(lines), MAX_JOINED).removesuffix(":") if lines[0].endswith(":") else lines[0]


def quoted_input_error(error: BaseException) -> str | None:
    """Return the message of an ``InputError`` whose traceback ``error`` quotes.

    None if there is none. DuckDB turns an error of a file system in Python into the text of its traceback.
    """
    text = str(error)
    if TRACEBACK not in text:
        return None
    found = re.findall(r"^(?:\S+\.)?(?:Input|Storage)Error: (.+)$", text, re.MULTILINE)
    return found[-1] if found else None


def with_kind(error: BaseException) -> str:
    """Return ``in_one_line`` preceded by the name of the exception's class."""
    kind, said = type(error).__name__, in_one_line(error)
    return kind if said == kind else f"{kind}: {said}"


@contextmanager
def explained(what: str, passes: type[Exception] | tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn an error of a user's code into one line that begins with ``what``.

    A call of ``sys.exit`` is such an error: it must not end the command that runs the code.

    Args:
        what: Which code failed.
        passes: Errors that stay as they are.

    Raises:
        InputError: the block raised another error.
    """
    try:
        yield
    except passes:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"{what} ({with_kind(error)})") from error


def fault_of(error: BaseException) -> OSError | None:
    """Return the operating system's error that an error is or quotes, or None."""
    if isinstance(error, InputError):
        return None
    if isinstance(error, OSError) and error.errno in errno.errorcode:
        return error
    text = str(error)
    if SPILL_LIMIT in text:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    quoted = (code for code in REMEDIES if os.strerror(code) in text or f"(os error {code})" in text)
    return next((OSError(code, os.strerror(code)) for code in quoted), None)


def reason_of(error: OSError) -> str:
    """Return the operating system's reason for an error, and its remedy if known.

    Examples: ``no such file or directory``; ``no space left on device; free some space``.
    """
    if NO_TEMPORARY in str(error):
        return f"no usable temporary folder; {TMPDIR}"
    code = error.errno or 0
    reason = os.strerror(code).lower() if code in errno.errorcode else in_one_line(error).lower()
    remedy = REMEDIES.get(code)
    if remedy and _is_temporary(error.filename):
        remedy = f"{remedy}, or {TMPDIR}"
    return f"{reason}; {remedy}" if remedy else reason


def describe_fault(error: BaseException) -> str | None:
    """Describe an error of the operating system in one line; None for other errors.

    The line holds the file, the reason, and the remedy.
    """
    if (fault := fault_of(error)) is None:
        return None
    # The target of a rename says more than its temporary source.
    named = fault.filename2 or fault.filename
    return f"{os.fsdecode(named)}: {reason_of(fault)}" if isinstance(named, str | bytes) else reason_of(fault)


@contextmanager
def faults_at(path: str | Path) -> Iterator[None]:
    """Name ``path`` in errors of the operating system that name no visible file.

    An error that names a hidden file gets ``path`` as well, and so does one that another error only quotes.
    """
    try:
        yield
    except Exception as error:
        fault = fault_of(error)
        if fault is None or NO_TEMPORARY in str(fault):
            raise
        if fault.filename is not None and not Path(os.fsdecode(fault.filename)).name.startswith("."):
            raise
        raise OSError(fault.errno, os.strerror(fault.errno or 0), str(path)) from error


def _is_temporary(name: object) -> bool:
    return isinstance(name, str) and name.startswith(os.path.join(tempfile.tempdir or "", TEMPORARY))
