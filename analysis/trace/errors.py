"""The one exception that a user of either package is meant to read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from analysis.trace.plain import plain


class InputError(Exception):
    """Bad input, described in one line: what was wrong, what was expected, the nearest valid name.

    The command line prints the message and exits with 2; a library caller catches it.
    """

    def __init__(self, message: str) -> None:
        """What ``message`` quotes of files and names may be long, and hold anything."""
        super().__init__(plain(message))


def nearest(name: str, options: Iterable[str], others: str = "valid") -> str:
    """Return ``'; did you mean "x"?'`` for the closest of ``options``, or all of them if none is close.

    Args:
        name: What was given.
        options: What it may have meant; the hint is empty if there are none.
        others: What to call ``options`` where all are listed.
    """
    options = list(options)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if close:
        return f'; did you mean "{close[0]}"?'
    return f"; {others}: {', '.join(sorted(options))}" if options else ""


def in_one_line(error: Exception) -> str:
    """Return what a library's exception says first, in one line; its kind if it says nothing.

    A line that ends with a colon announces the next one, which is then part of it.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = ""
    for line in lines:
        said = f"{said} {line}".lstrip()
        if not line.endswith(":"):
            break
    return said.removesuffix(":") or type(error).__name__
