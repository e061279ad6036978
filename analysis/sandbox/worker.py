"""Answer queries in a process of their own, on behalf of ``sandbox.process``.

Each message is a pair of a kind and its content: ``ROWS`` with a table in Arrow's IPC format (the first one of an
answer has no rows), ``PROGRESS`` with a percentage, ``DONE``, or one line: ``REJECTED`` before any file was read,
``FAILED`` while files were read, or ``OUT_OF_MEMORY``.
"""

from __future__ import annotations

import errno
import os
import queue
import resource
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrace.analysis.sandbox.connection import connect, fill
from entrace.analysis.sandbox.statements import one_line
from entrace.analysis.trace.errors import InputError, fault_of
from entrace.analysis.trace.parts import Layout
from entrace.analysis.trace.places import store

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

ROWS, PROGRESS, DONE = "rows", "progress", "done"
REJECTED, FAILED, OUT_OF_MEMORY = "rejected", "failed", "out of memory"
PROGRESS_EVERY_S = 0.5
# Share of the memory limit for DuckDB's buffers, whose excess spills to disk; text, lists, and batches of rows need
# memory in addition.
BUFFER_SHARE = 0.75
# DuckDB computes vectors of this many rows. They are joined to messages of about this many bytes.
VECTOR_ROWS, MESSAGE_BYTES = 2048, 1 << 23


@dataclass(frozen=True)
class Setup:
    """Hold the input of a worker.

    Attributes:
        manifests: Content of each ``run.json``, by run_id.
        files: Layout of each Parquet file, by table and path.
        memory: Bytes that queries may use in addition to the memory of the idle process.
        spill: Folder for spilled data; removed by the parent.
        copies: Content of files that only the parent has.
    """

    manifests: dict[str, dict[str, Any]]
    files: dict[str, dict[str, Layout]]
    memory: int
    spill: Path
    copies: dict[str, bytes]


@dataclass(frozen=True)
class Query:
    """One query with its parameters and computed tables.

    ``computed`` holds the rows of those members of ``queries.COMPUTED`` that the query reads.
    """

    text: str
    params: dict[str, Any]
    computed: dict[str, list[tuple[Any, ...]]]


def serve(pipe: Connection) -> None:
    """Answer one query after another until the parent closes the pipe."""
    # Ctrl-C reaches the whole process group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    setup: Setup = pipe.recv()
    store(setup.copies)
    try:
        con = connect(setup.manifests, setup.files, int(setup.memory * BUFFER_SHARE), setup.spill)
    except InputError as error:
        pipe.send((FAILED, str(error)))
        return
    _limit_memory(setup.memory)
    line = _Line(pipe)
    waiting: queue.SimpleQueue[Query] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(line, con, waiting), daemon=True).start()
    while True:
        _answer(line, con, waiting.get())


class _Line:
    """The pipe to the parent, on which two threads send."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self._lock = threading.Lock()

    def send(self, kind: str, content: Any = None) -> None:
        with self._lock:
            self.pipe.send((kind, content))


def _listen(line: _Line, con: duckdb.DuckDBPyConnection, waiting: queue.SimpleQueue[Query]) -> None:
    """Receive queries and report progress; end the process when the parent is gone.

    The process ends even in the middle of a query.
    """
    try:
        while True:
            if line.pipe.poll(PROGRESS_EVERY_S):
                waiting.put(line.pipe.recv())
            elif (percent := con.query_progress()) >= 0:
                line.send(PROGRESS, percent)
    except (EOFError, OSError):
        os._exit(0)


def _answer(line: _Line, con: duckdb.DuckDBPyConnection, query: Query) -> None:
    import duckdb
    import pyarrow as pa

    try:
        for name, rows in query.computed.items():
            fill(con, name, rows)
        # A CTE can hold an INSERT, which only the read-only transaction rejects.
        con.execute("begin transaction read only")
        try:
            # A result that is still open would block the rollback.
            with con.sql(query.text, params=query.params).to_arrow_reader(VECTOR_ROWS) as reader:
                for field in reader.schema:
                    _check_type(field.name, field.type)
                names = _distinct(reader.schema.names)
                line.send(ROWS, _serialize(pa.Table.from_batches([], reader.schema), names))
                for table in _joined(reader):
                    line.send(ROWS, _serialize(table, names))
        finally:
            con.execute("rollback")
    except BrokenPipeError:
        # The parent is gone.
        os._exit(0)
    except (duckdb.ParserException, duckdb.BinderException, duckdb.CatalogException) as error:
        line.send(REJECTED, one_line(error))
    except (MemoryError, duckdb.Error, pa.ArrowException, OSError) as error:
        # Arrow turns errors that DuckDB raises after the first rows into its own, or into an OSError.
        line.send(OUT_OF_MEMORY if _lacks_memory(error) else FAILED, one_line(error))
    except InputError as error:
        line.send(REJECTED, str(error))
    else:
        line.send(DONE)


def _lacks_memory(error: Exception) -> bool:
    """Return whether memory ran out, rather than disk space for spilled data."""
    import duckdb
    import pyarrow as pa

    if (fault := fault_of(error)) and fault.errno == errno.ENOSPC:
        return False
    is_declared = isinstance(error, MemoryError | duckdb.OutOfMemoryException | pa.ArrowMemoryError)
    return is_declared or "Out of Memory" in str(error) or "bad_alloc" in str(error)


def _check_type(column: str, kind: pa.DataType) -> None:
    """Reject types that polars cannot read, also inside lists and structs."""
    import pyarrow as pa

    if pa.types.is_interval(kind) or pa.types.is_union(kind):
        raise InputError(f'sql: column "{column}" has type {kind}, which is not supported; cast it, as in x::varchar')
    for i in range(kind.num_fields):
        _check_type(column, kind.field(i).type)


def _joined(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Yield batches joined to tables of at least ``MESSAGE_BYTES``.

    The last table may be smaller.
    """
    import pyarrow as pa

    held: list[pa.RecordBatch] = []
    size = 0
    for batch in batches:
        held.append(batch)
        size += batch.nbytes
        if size >= MESSAGE_BYTES:
            yield pa.Table.from_batches(held)
            held, size = [], 0
    if held:
        yield pa.Table.from_batches(held)


def _distinct(names: Iterable[str]) -> list[str]:
    """Return names that differ, as DuckDB makes them: a second ``a`` becomes ``a_1``."""
    counts: dict[str, int] = {}
    distinct = []
    for name in names:
        while (key := name.lower()) in counts:
            counts[key] += 1
            name = f"{name}_{counts[key] - 1}"
        counts[key] = 1
        distinct.append(name)
    return distinct


def _serialize(table: pa.Table, names: list[str]) -> bytes:
    import pyarrow as pa

    table = table.rename_columns(names)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return sink.getvalue().to_pybytes()


def _limit_memory(memory: int) -> None:
    """Let this process use ``memory`` bytes more than now, whoever allocates them.

    Only Linux counts every private writable mapping against RLIMIT_DATA; elsewhere DuckDB's own limit remains.
    """
    if sys.platform != "linux":
        return
    status = Path("/proc/self/status").read_text()
    used = next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmData:"))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = used + memory
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
