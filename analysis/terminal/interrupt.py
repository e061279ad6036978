"""Ctrl-C for long queries."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import duckdb

Result = TypeVar("Result")
AWAKE_EVERY_S = 0.1


def interruptible(con: duckdb.DuckDBPyConnection, query: Callable[[], Result]) -> Result:
    """Returns what ``query``, which runs on ``con``, returns, or raises what it raises; Ctrl-C ends it at once.

    DuckDB looks for signals only now and then, and while it hands over rows not at all. So it works in a thread of its
    own while this one waits, awake now and then, for a signal that another thread received wakes nobody.
    """
    results: list[Result] = []
    errors: list[BaseException] = []
    is_done = threading.Event()

    def work() -> None:
        try:
            results.append(query())
        except BaseException as error:
            errors.append(error)
        is_done.set()

    threading.Thread(target=work).start()
    try:
        while not is_done.wait(AWAKE_EVERY_S):
            pass
    except KeyboardInterrupt:
        # An interrupt that meets no query at work, between two portions of rows, is lost; so it is repeated.
        con.interrupt()
        while not is_done.wait(AWAKE_EVERY_S):
            con.interrupt()
        raise
    if errors:
        raise errors[0]
    return results[0]
