"""The one exception that a user of either package is meant to read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from entrace.analysis.trace.plain import plain

# Characters of a message of several lines.
ANNOUNCED = 500


class InputError(Exception):
    """Bad input, described in one line: what was wrong, what was expected, the nearest valid name.

    The command line prints the message and exits with 2; a library caller catches it.
    """

    def __init__(self, message: str) -> None:
        """What ``message`` quotes of files and names may be long, and hold anything."""
        super().__init__(plain(message))


def nearest(name: str, options: Iterable[str], others: str = "valid") -> str:
    """Return ``'; did you mean "x"?'`` for the closest of ``options``, or all of them if none is close.

    Close is what is spelled alike, or the only option that contains the name.

    Args:
        name: What was given.
        options: What it may have meant; the hint is empty if there are none.
        others: What to call ``options`` where all are listed.
    """
    options = list(options)
    containing = [option for option in options if name and name in option]
    close = difflib.get_close_matches(name, options, n=1) or (containing if len(containing) == 1 else [])
    if close:
        return f'; did you mean "{close[0]}"?'
    return f"; {others}: {', '.join(sorted(options))}" if options else ""


def in_one_line(error: BaseException) -> str:
    """Return the first line of a library's exception, its kind if it says nothing.

    A first line that ends with a colon announces what follows, which is then part of it.
    """
    if isinstance(error, UnicodeDecodeError):
        return f"byte 0x{error.object[error.start]:02x} at offset {error.start} is not {error.encoding.upper()}"
    if isinstance(error, KeyError):
        return f"no key {error}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return plain(" ".join(lines), ANNOUNCED).removesuffix(":") if lines[0].endswith(":") else lines[0]


def reason_of(error: OSError) -> str:
    """Return the reason that the system gives for an error, such as ``no such file or directory``."""
    return (error.strerror or in_one_line(error)).lower()


def with_kind(error: BaseException) -> str:
    """Return ``in_one_line`` after the kind of the exception."""
    kind, said = type(error).__name__, in_one_line(error)
    return kind if said == kind else f"{kind}: {said}"
