"""Rows of JSONL and Parquet files, and what is wrong with the malformed ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrace.analysis.trace import InputError, nearest, reason_of
from entrace.trainer.tasks.math_verifier import EXPECTED
from entrace.trainer.tasks.prompt import Question

if TYPE_CHECKING:
    import pyarrow as pa


class BadRowError(ValueError):
    """A fault of one row, in words.

    Attributes:
        advice: Said once, after the faults of all rows.
    """

    advice = ""


class MissingFieldError(BadRowError):
    """A field that the row does not have, as opposed to one that is null."""


class NoAnswerError(BadRowError):
    """An answer that is missing, null, or blank."""

    advice = "only a function of your own (task.verifiers) can judge rows without an answer"


class UnreadableAnswerError(BadRowError):
    """An answer that its verifier cannot read, so that no response to the prompt would be right."""

    advice = f"math and math_text read {EXPECTED}"


# Faults that are spelled out where there are more.
NUM_NAMED = 5


def name_some(faults: Sequence[str], count: int) -> str:
    """Return the first of ``count`` faults in one line, which shows whether there are more."""
    return "; ".join(faults[:NUM_NAMED]) + ("; ..." if count > NUM_NAMED else "")


@dataclass(frozen=True)
class Place:
    """Position of a row in its file, from 1."""

    unit: str
    number: int

    def __str__(self) -> str:
        return f"{self.unit} {self.number}"


def read_rows(path: Path) -> Iterator[tuple[Place, dict[str, Any] | BadRowError]]:
    """Yield rows of a JSONL or Parquet file with their places; in place of a malformed row, its fault.

    Raises:
        InputError: no such file, or a damaged one.
    """
    is_parquet = path.suffix.lower() == ".parquet"
    unit, rows = ("row", _read_parquet(path)) if is_parquet else ("line", _read_jsonl(path))
    try:
        for number, row in rows:
            yield Place(unit, number), row
    except OSError as error:
        raise InputError(f"{path}: {reason_of(error)}") from None


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadRowError]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _parse_line(line)


def _parse_line(line: bytes) -> dict[str, Any] | BadRowError:
    try:
        row = json.loads(line.decode("utf-8-sig").rstrip())
    except json.JSONDecodeError as error:
        return BadRowError(f"not JSON, {error.msg.lower()} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return BadRowError(f"not JSON, {error}")
    return row if isinstance(row, dict) else BadRowError(f"{kind_of(row)}, expected an object")


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # A file that cannot be opened is Python's error, which says why in fewer words than pyarrow's.
        with open(path, "rb") as opened, pq.ParquetFile(opened) as file:
            batches = file.iter_batches(batch_size=1024)
            yield from enumerate((row for batch in batches for row in _as_dicts(batch)), start=1)
    except pa.ArrowException as error:
        raise InputError(f"{path}: damaged, or not a Parquet file ({str(error).splitlines()[0]})") from None


def _as_dicts(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Return rows; a value that Python cannot hold, such as text that is not UTF-8, becomes its error."""
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
    """Return text, or the turns of a chat that ends before the assistant's next one.

    Raises:
        BadRowError: anything else.
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
    """Return text that is not blank; ``name`` begins the message about anything else.

    Raises:
        BadRowError: anything else.
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
    """Return the type of a value, in the words of JSON."""
    if isinstance(value, Exception):
        return f"unreadable ({value})"
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text"}
    return {**names, list: "a list", dict: "an object"}.get(type(value), type(value).__name__)
