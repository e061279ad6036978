"""Read rows of JSONL and Parquet files, and describe malformed ones.

A JSONL file may be compressed with zstd (``.jsonl.zst``), in any number of frames.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrace.analysis.importers.chat import Question
from entrace.analysis.trace.errors import InputError, in_one_line, nearest, reason_of

if TYPE_CHECKING:
    import pyarrow as pa


class BadRowError(ValueError):
    """Description of the fault of one row.

    Attributes:
        advice: Printed once, after the faults of all rows.
    """

    advice = ""


class MissingFieldError(BadRowError):
    """A missing field, as opposed to a null one."""


# Faults to name if there are more.
NUM_NAMED = 5


def name_some(faults: Sequence[str], count: int) -> str:
    """Return the first of ``count`` faults in one line, with ``...`` for more."""
    return "; ".join(faults[:NUM_NAMED]) + ("; ..." if count > NUM_NAMED else "")


@dataclass(frozen=True)
class Place:
    """Position of a row in its file, from 1."""

    unit: str
    number: int

    def __str__(self) -> str:
        return f"{self.unit} {self.number}"


class Reading:
    """Say which share of a file has been read."""

    def __init__(self) -> None:
        """Start at the beginning of a file."""
        self._done: Callable[[], float] = lambda: 0.0
        self._total = 0

    def watch(self, done: Callable[[], float], total: int) -> None:
        """Take what tells how much was read, and how much there is, in any unit."""
        self._done, self._total = done, total

    @property
    def share(self) -> float:
        """Return the share that was read, in [0, 1]; 0 if unknown, as of a pipe."""
        return min(self._done() / self._total, 1.0) if self._total > 0 else 0.0


def size_of(path: Path) -> int:
    """Return the size of a file in bytes; 0 if unknown, as of a pipe."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0


def read_rows(path: Path, reading: Reading | None = None) -> Iterator[tuple[Place, dict[str, Any] | BadRowError]]:
    """Yield the rows of a JSONL or Parquet file with their positions.

    A malformed row is replaced by its fault.

    Args:
        path: The file.
        reading: Learns which share has been read, until the next row is taken.

    Raises:
        InputError: the file does not exist or is damaged.
    """
    reading = reading or Reading()
    is_parquet = path.suffix.lower() == ".parquet"
    unit, rows = ("row", _read_parquet(path, reading)) if is_parquet else ("line", _read_jsonl(path, reading))
    try:
        for number, row in rows:
            yield Place(unit, number), row
    except OSError as error:
        raise InputError(f"{path}: {reason_of(error)}") from None


def _read_jsonl(path: Path, reading: Reading) -> Iterator[tuple[int, dict[str, Any] | BadRowError]]:
    with open_lines(path, reading) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, parse_line(line)


@contextmanager
def open_lines(path: Path, reading: Reading | None = None) -> Iterator[Iterable[bytes]]:
    """Yield the lines of a file, decompressed if its name ends with ``.zst``.

    Raises:
        InputError: the file is not zstd, or is cut short.
    """
    with path.open("rb") as file:
        if reading and (size := size_of(path)):
            reading.watch(file.tell, size)
        if path.suffix.lower() != ".zst":
            yield file
            return
        import pyarrow as pa

        try:
            with pa.CompressedInputStream(file, "zstd") as stream, io.BufferedReader(_Raw(stream), 1 << 20) as lines:
                yield lines
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path}: damaged, or not zstd ({in_one_line(error)})") from None


class _Raw(io.RawIOBase):
    """Present a stream of pyarrow as one of Python, which splits it into lines."""

    def __init__(self, stream: pa.NativeFile) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def parse_line(line: bytes) -> dict[str, Any] | BadRowError:
    """Return the object that a line of JSON holds, or its fault."""
    try:
        row = json.loads(line.decode("utf-8-sig").rstrip())
    except json.JSONDecodeError as error:
        return BadRowError(f"not JSON, {error.msg.lower()} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return BadRowError(f"not JSON, {error}")
    return row if isinstance(row, dict) else BadRowError(f"{kind_of(row)}, expected an object")


def _read_parquet(path: Path, reading: Reading) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Opening the file here gives Python's short error message instead of pyarrow's.
        with path.open("rb") as opened, pq.ParquetFile(opened) as file:
            batches = file.iter_batches(batch_size=1024)
            for number, row in enumerate((row for batch in batches for row in _as_dicts(batch)), start=1):
                reading.watch(lambda number=number: number, file.metadata.num_rows)
                yield number, row
    except pa.ArrowException as error:
        raise InputError(f"{path}: damaged, or not a Parquet file ({str(error).splitlines()[0]})") from None


def _as_dicts(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Return rows; a value that Python cannot represent becomes its error.

    An example is text that is not UTF-8.
    """
    try:
        return batch.to_pylist()
    except ValueError:
        return [{name: _as_py(batch[name][i]) for name in batch.schema.names} for i in range(len(batch))]


def _as_py(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except ValueError as error:
        return error


def field_at(row: Mapping[str, Any], key: str) -> Any:
    """Return the value at a dotted key.

    Raises:
        MissingFieldError: the row has no such key.
    """
    value: Any = row
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise MissingFieldError(f'no "{key}"{nearest(part, value) if isinstance(value, Mapping) else ""}')
        value = value[part]
    return value


def question_of(value: Any, key: str) -> Question:
    """Return text, or the turns of a chat whose last turn is not the assistant's.

    Raises:
        BadRowError: the value is neither.
    """
    if isinstance(value, str):
        return text_of(value, f'"{key}"')
    if not isinstance(value, list):
        raise BadRowError(f'"{key}" is {kind_of(value)}, expected text or a list of turns')
    turns = []
    for turn in value:
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise BadRowError(f'"{key}" has a turn that is not {{"role", "content"}}')
        turns.append({name: text_of(turn[name], f'"{key}", {name}') for name in ("role", "content")})
    if not turns or turns[-1]["role"] == "assistant":
        raise BadRowError(f'"{key}" {"ends with a turn of the assistant" if turns else "is empty"}')
    return turns


def text_of(value: Any, name: str) -> str:
    """Return text that is not blank; ``name`` begins the error message.

    Raises:
        BadRowError: the value is not text, is blank, or holds a lone surrogate.
    """
    if not isinstance(value, str):
        raise BadRowError(f"{name} is {kind_of(value)}, expected text")
    if not value.strip():
        raise BadRowError(f"{name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRowError(f"{name} holds half a character (a lone surrogate)") from None
    return value


def kind_of(value: Any) -> str:
    """Return the JSON type of a value, in words."""
    if isinstance(value, Exception):
        return f"unreadable ({value})"
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text"}
    return {**names, list: "a list", dict: "an object"}.get(type(value), type(value).__name__)
