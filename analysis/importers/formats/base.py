"""Define the interface of a format.

A format says which files and rows it has, and how its rows map to trace columns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from entrace.analysis.importers.columns import NEEDED, UNIFORM
from entrace.analysis.importers.prompts import PromptText
from entrace.analysis.importers.row_files import BadRowError, kind_of

Row = dict[str, Any]
# Yields the rollouts that a row of a file holds, with the fields of ``columns.ALIASES``.
Convert = Callable[[Row, Path], Iterable[Row]]

STEP = re.compile(r"step[_-]?(\d+)", re.IGNORECASE)


@dataclass
class Session:
    """State of one reading of a dump.

    Attributes:
        files: Files of the dump, in order.
        folder: Temporary folder.
        remarks: Filled by the reader with what the user should know; printed after reading.
        fields: Fields for which the user names keys.
    """

    files: Sequence[Path]
    folder: Path
    remarks: list[str] = field(default_factory=list)
    fields: Collection[str] = ()


@dataclass(frozen=True)
class Format:
    """A format of dumps.

    Attributes:
        name: Value of ``--from``.
        title: What it is, for messages.
        files: Patterns of its files below a folder.
        is_row: Return whether a row, the first of the file at a path, is of this format.
        open: Start reading and return the function that converts rows.
        prompts: What a prompt of text is; see ``prompts.PromptText``.
        needed: Fields that every row must have, and what is expected of them.
        uniform: Fields that all rows must have, or none.
        run_of: Name of the run that a file belongs to; None if names do not say.
        whole: Return the files of a folder that are complete, and remarks about the others.
    """

    name: str
    title: str
    files: tuple[str, ...]
    is_row: Callable[[Mapping[str, Any], Path], bool]
    open: Callable[[Session], Convert]
    prompts: PromptText = "question"
    needed: Mapping[str, str] = field(default_factory=lambda: NEEDED)
    uniform: tuple[str, ...] = UNIFORM
    run_of: Callable[[Path], str | None] = lambda path: None
    whole: Callable[[list[Path]], tuple[list[Path], list[str]]] = lambda files: (files, [])


def unchanged(session: Session) -> Convert:
    """Return rows as they are."""
    del session
    return lambda row, path: (row,)


def stateless(convert: Convert) -> Callable[[Session], Convert]:
    """Return the start of a reading whose rows are converted one by one."""
    return lambda session: convert


def folder_of(path: Path) -> str:
    """Return the folder of a file.

    The folder identifies the run in formats with one file per step.
    """
    return str(path.parent)


def has_keys(*names: str) -> Callable[[Mapping[str, Any], Path], bool]:
    """Return a test whether a row has all keys."""
    return lambda row, path: row.keys() >= set(names)


def find_step(path: Path) -> int | None:
    """Return the step in the name of a file or of a folder above it, or None."""
    return next((int(found[1]) for part in reversed(path.parts) if (found := STEP.search(part))), None)


def step_in(path: Path) -> int:
    """Return the step in the name of a file or in that of a folder above it.

    Raises:
        BadRowError: the path holds none.
    """
    if (step := find_step(path)) is not None:
        return step
    raise BadRowError(f"{path.name}: no step in the file name, expected a name such as train_data_step12.jsonl")


def listed(row: Mapping[str, Any], key: str, length: int | None = None) -> list[Any]:
    """Return a list of a row.

    Raises:
        BadRowError: the value is not a list, or its length is not ``length``.
    """
    value = row.get(key)
    if not isinstance(value, list):
        raise BadRowError(f'"{key}" is {kind_of(value)}, expected a list')
    if length is not None and len(value) != length:
        raise BadRowError(f'"{key}" has {len(value)} entries, the row has {length} tokens')
    return value


def split_at_response(mask: Sequence[Any], key: str) -> int:
    """Return the index of the first generated token of a sequence.

    Raises:
        BadRowError: no token was generated, or the first token was.
    """
    start = next((n for n, mark in enumerate(mask) if mark), None)
    if start is None:
        raise BadRowError(f'"{key}" excludes every token')
    if start == 0:
        raise BadRowError(f'"{key}" marks the first token as generated, which leaves no prompt')
    return start
