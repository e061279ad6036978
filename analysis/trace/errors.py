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


def nearest(name: str, options: Iterable[str]) -> str:
    """Returns ``'; did you mean "x"?'`` for the closest of ``options``, or all of them if none is close."""
    options = list(options)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if close:
        return f'; did you mean "{close[0]}"?'
    return f"; valid: {', '.join(sorted(options))}"


def in_one_line(error: Exception) -> str:
    """First line of what a library's exception says; its kind if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
