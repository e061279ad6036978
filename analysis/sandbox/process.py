"""Start and end the process that answers queries, and receive its rows.

Rows are received as they arrive. The process is ended when a limit is reached.
"""

from __future__ import annotations

import math
import os
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrace.analysis.sandbox.connection import spill_folder
from entrace.analysis.sandbox.worker import DONE, FAILED, OUT_OF_MEMORY, PROGRESS, ROWS, Query, Setup
from entrace.analysis.trace.errors import InputError
from entrace.analysis.trace.parts import Layout
from entrace.analysis.trace.places import copies_of

if TYPE_CHECKING:
    import pyarrow as pa

PREFIXES = {prefix: power for power, prefix in enumerate("KMGT", start=1)}
UNITS = {
    "": 1,
    **{prefix: 1000**power for prefix, power in PREFIXES.items()},
    **{f"{prefix}i": 1024**power for prefix, power in PREFIXES.items()},
}
SIZE = re.compile(rf"(\d+(?:\.\d+)?)\s*({'|'.join(sorted(UNITS, key=len, reverse=True))})B?", re.IGNORECASE)
SMALLEST = 64 << 20
# Seconds after which a process that waits for rows notices Ctrl-C, however it was delivered.
HEARD_S = 0.25
# The child finds modules where this process does, whatever its working directory holds.
BOOT = (
    "import sys; from multiprocessing.connection import Connection; pipe = Connection(int(sys.argv[1])); "
    "sys.path[:] = pipe.recv(); from entrace.analysis.sandbox.worker import serve; serve(pipe)"
)


class ReadError(InputError):
    """Report that a query failed while it read files or computed.

    The text of the query is not the cause.
    """


class LimitError(InputError):
    """Report that a query reached a limit.

    Attributes:
        fact: Which limit; the message adds how to raise it on the command line and in Python.
    """

    def __init__(self, fact: str, remedy: str) -> None:
        """Store what happened, and what to do about it outside the viewer."""
        super().__init__(f"sql: {fact}; {remedy}")
        self.fact = fact


@dataclass(frozen=True)
class Limits:
    """Bounds of one query.

    Attributes:
        memory: Bytes for the query, and in Python for its result.
        timeout: Seconds of computing; 0 for no limit. Time in which the reader of the rows is busy does not count.
    """

    memory: int = 2 << 30
    timeout: float = 600.0

    @classmethod
    def parse(cls, memory: str | float | None, timeout: float | None) -> Limits:
        """Return limits from what a user gave; None stands for the default.

        Raises:
            InputError: the memory is not a size of at least 64 MiB, or the timeout is negative.
        """
        limits = cls(
            cls.memory if memory is None else _bytes_in(memory), cls.timeout if timeout is None else float(timeout)
        )
        if not limits.memory >= SMALLEST:
            raise InputError(f"memory: {memory} is too little for a query; expected at least {SMALLEST >> 20}MiB")
        if not limits.timeout >= 0:
            raise InputError(f"timeout: {timeout} is not a number of seconds; expected 0 (no limit) or more")
        return limits

    @property
    def memory_text(self) -> str:
        """Memory in the largest binary unit that keeps it short."""
        return f"{self.memory / 2**30:.3g}GiB" if self.memory >= 1 << 30 else f"{self.memory / 2**20:.4g}MiB"


class QueryProcess:
    """A process with its own connection to traces; it answers one query at a time."""

    def __init__(
        self, manifests: dict[str, dict[str, Any]], files: dict[str, dict[str, Layout]], limits: Limits
    ) -> None:
        """Start the process.

        Args:
            manifests: As for ``connection.connect``.
            files: As for ``connection.connect``.
            limits: Its ``memory`` holds for all queries of this process.
        """
        self.memory = limits.memory
        spill = spill_folder()
        self._pipe, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", BOOT, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            # Standard output belongs to the rows.
            stdout=subprocess.DEVNULL,
        )
        theirs.close()
        self.close = weakref.finalize(self, _end, self._process, self._pipe, spill)
        self._pipe.send(sys.path)
        copies = copies_of(path for found in files.values() for path in found)
        self._pipe.send(Setup(manifests, files, limits.memory, spill, copies))

    def ask(
        self,
        query: Query,
        limits: Limits,
        on_progress: Callable[[float], None] | None = None,
        reader: int | None = None,
    ) -> Iterator[pa.RecordBatchReader]:
        """Yield the rows of a query in parts, as they arrive.

        The first part has the columns and no rows. The process is ended unless the answer was read to its end.

        Args:
            query: The query.
            limits: Its ``timeout`` holds for this query.
            on_progress: Called with the percentage that DuckDB estimates, about twice a second.
            reader: Descriptor to which the rows are written; if it is a pipe whose other end is closed, the query ends.

        Raises:
            InputError: DuckDB rejects the query, or a limit is reached.
            ReadError: the query failed while it read files.
            BrokenPipeError: the other end of ``reader`` is closed.
        """
        import pyarrow as pa

        is_reusable = False
        try:
            self._exchange(lambda pipe: pipe.send(query), limits)
            left = limits.timeout or None
            while True:
                started = time.monotonic()
                self._wait(left, limits, reader)
                kind, content = self._exchange(lambda pipe: pipe.recv(), limits)
                left = left and max(left - (time.monotonic() - started), 0.0)
                if kind == ROWS:
                    yield pa.ipc.open_stream(content)
                elif kind == PROGRESS:
                    if on_progress:
                        on_progress(content)
                elif kind == OUT_OF_MEMORY:
                    raise _out_of_memory(limits)
                else:
                    is_reusable = True
                    if kind == DONE:
                        return
                    raise ReadError(content) if kind == FAILED else InputError(content)
        finally:
            if not is_reusable:
                self.close()

    @property
    def is_alive(self) -> bool:
        """Return True if the process can answer another query."""
        return self.close.alive and self._process.poll() is None

    def _wait(self, timeout: float | None, limits: Limits, reader: int | None) -> None:
        """Wait for a message, at most ``timeout`` s."""
        poll = select.poll()
        poll.register(self._pipe.fileno(), select.POLLIN)
        if reader is not None and stat.S_ISFIFO(os.fstat(reader).st_mode):
            # Without a mask, poll reports only that the other end was closed.
            poll.register(reader, 0)
        deadline = time.monotonic() + (math.inf if timeout is None else timeout)
        # A signal that another thread received does not interrupt poll; between two polls, Python raises it here.
        while not (ready := dict(poll.poll(max(min(HEARD_S, deadline - time.monotonic()), 0.0) * 1000))):
            if time.monotonic() >= deadline:
                break
        if reader in ready:
            raise BrokenPipeError
        if not ready:
            raise out_of_time(limits)

    def _exchange(self, action: Callable[[Connection], Any], limits: Limits) -> Any:
        try:
            return action(self._pipe)
        except (EOFError, ConnectionError):
            raise self._death(limits) from None

    def _death(self, limits: Limits) -> InputError:
        status = self._process.wait()
        if status >= 0:
            return InputError(f"sql: the process of the query ended with exit code {status}; see the lines above")
        if -status in (signal.SIGABRT, signal.SIGKILL, signal.SIGSEGV):
            return _out_of_memory(limits)
        return InputError(f"sql: the process of the query was ended by {signal.Signals(-status).name}")


def out_of_time(limits: Limits, note: str = "") -> LimitError:
    """Return the error of a query that was stopped at its ``timeout``.

    ``note`` says how the query was stopped.
    """
    return LimitError(
        f"stopped after {limits.timeout:g} s{note}", "narrow the query, or raise --timeout (timeout= in Python)"
    )


def _out_of_memory(limits: Limits) -> LimitError:
    return LimitError(
        f"the query needs more than {limits.memory_text} of memory",
        "aggregate or filter earlier, or raise --memory (memory= in Python)",
    )


def _bytes_in(memory: str | float) -> int:
    if isinstance(memory, str):
        if not (match := SIZE.fullmatch(memory.strip())):
            raise InputError(f'memory: "{memory}" is not a size; expected a number with a unit, such as 500MB or 2GiB')
        unit = next(name for name in UNITS if name.lower() == match[2].lower())
        return int(float(match[1]) * UNITS[unit])
    if not math.isfinite(memory):
        raise InputError(f"memory: {memory} is not a size; expected bytes, or a number with a unit, such as 500MB")
    return int(memory)


def _end(process: subprocess.Popen[bytes], pipe: Connection, spill: Path) -> None:
    pipe.close()
    process.kill()
    process.wait()
    shutil.rmtree(spill, ignore_errors=True)
