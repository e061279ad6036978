"""Define the exception for bad input, and turn other errors into one readable line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from entrace.analysis.trace.plain import plain

# Longest message, in characters, that is joined from several lines.
MAX_JOINED = 500
# Most valid names that an error lists after it suggested one.
MAX_LISTED = 20


class InputError(Exception):
    """Report bad input in one line: the fault, the expected value, and the nearest valid name.

    The command line prints the message and exits with code 2; a library caller can catch the exception.
    """

    def __init__(self, message: str) -> None:
        """Store ``message`` shortened and escaped, because it may quote arbitrary files and names."""
        super().__init__(plain(message))


def nearest(name: str, options: Iterable[str], others: str = "valid") -> str:
    """Return ``'; did you mean "x"?'`` for the closest of ``options``, or list all of them if none is close.

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
    """Return the hint of ``nearest`` followed by the valid names, ``MAX_LISTED`` at most."""
    options = sorted(options)
    listed = ", ".join(options[:MAX_LISTED]) or "none"
    more = f", and {len(options) - MAX_LISTED} more" if len(options) > MAX_LISTED else ""
    close = _closest(name, options)
    return f'; did you mean "{close}"? Valid: {listed}{more}' if close else f"; valid: {listed}{more}"


def _closest(name: str, options: list[str]) -> str | None:
    """Return the option of similar spelling in any case, or the only one that contains the name."""
    folded = {option.casefold(): option for option in options}
    if close := difflib.get_close_matches(name.casefold(), folded, n=1):
        return folded[close[0]]
    containing = [option for option in options if name and name in option]
    return containing[0] if len(containing) == 1 else None


def in_one_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or the name of its class if the message is empty.

    If the first line ends with a colon, the following lines are joined to it.
    """
    if isinstance(error, UnicodeDecodeError):
        return f"byte 0x{error.object[error.start]:02x} at offset {error.start} is not {error.encoding.upper()}"
    if isinstance(error, KeyError):
        return f"no key {error}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return plain(" ".join(lines), MAX_JOINED).removesuffix(":") if lines[0].endswith(":") else lines[0]


def reason_of(error: OSError) -> str:
    """Return the operating system's reason for an error, such as ``no such file or directory``."""
    return (error.strerror or in_one_line(error)).lower()


def with_kind(error: BaseException) -> str:
    """Return ``in_one_line`` preceded by the name of the exception's class."""
    kind, said = type(error).__name__, in_one_line(error)
    return kind if said == kind else f"{kind}: {said}"
