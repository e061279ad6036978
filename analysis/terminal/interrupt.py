"""Let Ctrl-C stop long queries."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import duckdb

Result = TypeVar("Result")
POLL_INTERVAL_S = 0.1


def interruptible(con: duckdb.DuckDBPyConnection, query: Callable[[], Result]) -> Result:
    """Run ``query`` on ``con`` and return its result; Ctrl-C stops it at once.

    DuckDB checks for signals only occasionally, and never while it returns rows. The query therefore runs in a thread
    of its own while this thread waits. The wait polls, because a signal that another thread receives does not end it.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; the query has ended.
        BaseException: the error that ``query`` raised.
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

    thread = threading.Thread(target=work)
    try:
        # The signal may arrive while the thread starts.
        thread.start()
        while not is_done.wait(POLL_INTERVAL_S):
            pass
    except KeyboardInterrupt:
        # An interrupt between two batches of rows has no effect, hence the repetition.
        con.interrupt()
        while not is_done.wait(POLL_INTERVAL_S) and thread.ident is not None:
            con.interrupt()
        raise
    if errors:
        raise errors[0]
    return results[0]
