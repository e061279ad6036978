"""Turn signals into exceptions that end a command, and say how to continue.

Exit codes are those by which shells know the signal: 130 after Ctrl-C, 143 after SIGTERM.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

# Wait before a signal is sent again, in seconds.
REPEAT_S = 0.01


class Stopped(KeyboardInterrupt):
    """A signal that ends a command: Ctrl-C, SIGTERM, or the end of the terminal."""

    def __init__(self, number: int) -> None:
        """Store the exit code by which shells know the signal."""
        super().__init__()
        self.exit_code = 128 + number


@contextmanager
def hear_signals() -> Iterator[None]:
    """Raise ``Stopped`` on Ctrl-C, SIGTERM, and when the terminal closes.

    A signal that already has a handler keeps it.
    """
    _heard.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    before = {number: signal.getsignal(number) for name in names if (number := getattr(signal, name, None))}
    unhandled = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: handler for number, handler in before.items() if handler in unhandled}
    repeats: list[threading.Timer] = []
    report = sys.unraisablehook

    def repeat_if_ignored(ignored: sys.UnraisableHookArgs) -> None:
        """Send a signal again if Python ignored its exception in a finalizer."""
        if isinstance(ignored.exc_value, Stopped):
            # A signal that another thread receives does not interrupt what the main thread waits for.
            target = threading.main_thread().ident, ignored.exc_value.exit_code - 128
            repeats.append(threading.Timer(REPEAT_S, signal.pthread_kill, target))
            repeats[-1].daemon = True
            repeats[-1].start()
        else:
            report(ignored)

    for number in before:
        signal.signal(number, _stop)
    sys.unraisablehook = repeat_if_ignored
    try:
        yield
    finally:
        for timer in repeats:
            timer.cancel()
        sys.unraisablehook = report
        for number, handler in before.items():
            signal.signal(number, handler)


# Signals that this command received.
_heard: list[int] = []


def _stop(number: int, _: Any) -> NoReturn:
    _heard.append(number)
    raise Stopped(number)


@contextmanager
def restore_stops() -> Iterator[None]:
    """Raise the stop that DuckDB turned into an error.

    DuckDB does so if the signal arrives within one of its calls.
    """
    try:
        yield
    except RuntimeError as error:
        if not _heard or str(error) != "Query interrupted":
            raise
        raise Stopped(_heard[-1]) from None


@contextmanager
def stoppable(how: str) -> Iterator[None]:
    """Say how to continue after Ctrl-C or SIGTERM; the outermost block wins.

    Args:
        how: Action of the same command when it is called again.
    """
    try:
        with restore_stops():
            yield
    except KeyboardInterrupt as stop:
        stop.add_note(f"the same command {how}")
        raise
