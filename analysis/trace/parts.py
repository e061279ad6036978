"""The Parquet files of a run: which of them count, and whether they are what ``run.json`` says.

``run.json`` lists every file that ``TraceWriter`` has made durable, with its rows. A file of the writer's naming that
is not on the list is the leftover of an interrupted flush. Files of other names belong to no step of the run, such as
those of ``entrace intervene``, and always count; so does everything in traces whose manifest has no list.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrace.analysis.trace.errors import InputError, in_one_line
from entrace.analysis.trace.schema import TABLES, VERSION_KEY, Table, check_version

if TYPE_CHECKING:
    import pyarrow as pa

PART = re.compile(r"part-(\d+)-(\d+)(?:\.rank-\d+)?\.parquet")
# Key of run.json.
FILES = "files"
# Rows of each file of the writer's naming, by table and file name; None where they are not known.
Files = dict[str, dict[str, int | None]]


def part_name(first: int, last: int, rank: int) -> str:
    """Name of the file that holds the rows of steps ``first`` to ``last`` of one process."""
    return f"part-{first:06d}-{last:06d}{f'.rank-{rank:03d}' if rank else ''}.parquet"


def last_step(name: str) -> int:
    """Last step that a file of the writer's naming holds.

    Raises:
        InputError: another name.
    """
    if not (match := PART.fullmatch(name)):
        raise InputError(f'"{name}": not the name of a file of a trace, such as part-000001-000010.parquet')
    return int(match[2])


def listed_files(run_dir: Path, manifest: Mapping[str, Any]) -> Files:
    """What the manifest lists; where it has no list, every file of the writer's naming that is there."""
    if manifest.get(FILES) is not None:
        return manifest[FILES]
    return {name: {path.name: None for path in _find(run_dir, name) if PART.fullmatch(path.name)} for name in TABLES}


def list_parts(run_dir: Path, manifest: Mapping[str, Any]) -> dict[str, dict[Path, int | None]]:
    """Files of each table that count, in order, with their rows where these are known.

    A table may be removed as a whole, to save room; it has no files then.

    Raises:
        InputError: one that the manifest lists is not there, though others of its table are.
    """
    listed = listed_files(run_dir, manifest)
    parts = {}
    for table in TABLES:
        is_there = (run_dir / table).exists()
        rows = {run_dir / table / name: rows for name, rows in listed.get(table, {}).items() if is_there}
        found = _find(run_dir, table)
        if lost := sorted(rows.keys() - set(found)):
            raise InputError(f"{lost[0]}: missing, though {run_dir.name}/run.json lists it; {_remedy(lost[0])}")
        parts[table] = {path: rows.get(path) for path in found if path in rows or not PART.fullmatch(path.name)}
    return parts


def last_whole_step(run_dir: Path, manifest: Mapping[str, Any]) -> tuple[int, str | None]:
    """Last durable step up to which every file of the trace is whole, and what is wrong with the next one."""
    durable, damage = int(manifest["last_durable_step"]), None
    for table, files in listed_files(run_dir, manifest).items():
        for name, rows in files.items():
            match = PART.fullmatch(name)
            if match and int(match[1]) <= durable:
                try:
                    check_part(run_dir / table / name, TABLES[table], rows)
                except InputError as error:
                    durable, damage = int(match[1]) - 1, str(error)
    return max(0, durable), damage


def remove_leftovers(run_dir: Path, manifest: Mapping[str, Any]) -> None:
    """Removes temporary files, and files of the writer's naming that the manifest does not list."""
    for name in TABLES:
        listed = manifest[FILES].get(name, {})
        for path in (run_dir / name).glob("*"):
            is_temporary = path.name.startswith(".") and path.name.endswith(".tmp")
            if is_temporary or (PART.fullmatch(path.name) and path.name not in listed):
                path.unlink()


def check_part(path: Path, table: Table, rows: int | None = None) -> int:
    """Return the schema version of a file that has the columns of ``table``, and ``rows`` rows if that is known.

    Raises:
        InputError: damaged, of an unreadable schema version, lacking a column or with one of another type, or a link.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.is_symlink() or path.parent.is_symlink() or not path.is_file():
        raise InputError(f"{path}: a link, or not a file; a trace holds regular files only")
    try:
        with pq.ParquetFile(path) as file:
            schema, found_rows = file.schema_arrow, file.metadata.num_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = in_one_line(error)
        raise InputError(f"{path}: damaged or truncated Parquet file ({reason}); {_remedy(path)}") from None
    version = _check_schema(path, schema, table)
    if rows is not None and found_rows != rows:
        raise InputError(f"{path}: holds {found_rows} rows, run.json says {rows}; {_remedy(path)}")
    return version


def _check_schema(path: Path, schema: pa.Schema, table: Table) -> int:
    stored = (schema.metadata or {}).get(VERSION_KEY)
    if stored is None:
        raise InputError(f"{path}: no schema version in its metadata ({VERSION_KEY.decode()}); {_remedy(path)}")
    version = check_version(f"{path}: schema version", stored.decode(errors="replace"))
    for column in table.columns:
        if column.since > version:
            continue
        if column.name not in schema.names:
            found = ", ".join(schema.names)
            raise InputError(f"{path}: column {column.name} ({column.type}) is missing; found {found}")
        if schema.names.count(column.name) > 1:
            raise InputError(f"{path}: column {column.name} is there more than once")
        stored = schema.field(column.name).type
        if _kind(stored) != _kind(column.type):
            raise InputError(f"{path}: column {column.name} is {stored}, expected {column.type}")
    return version


def _find(run_dir: Path, table: str) -> list[Path]:
    return sorted((run_dir / table).glob("*.parquet"))


def _remedy(path: Path) -> str:
    if not PART.fullmatch(path.name):
        return "remove it, and what it held is made again by the same command"
    return "restore it, or go back to the checkpoint before it with entrace train --resume"


def _kind(stored: pa.DataType) -> str:
    """Family of a type: another width of number or string reads as well."""
    import pyarrow as pa

    tests: dict[str, Callable[[pa.DataType], bool]] = {
        "integer": pa.types.is_integer,
        "float": pa.types.is_floating,
        "text": lambda t: pa.types.is_string(t) or pa.types.is_large_string(t) or pa.types.is_string_view(t),
        "list": lambda t: pa.types.is_list(t) or pa.types.is_large_list(t),
    }
    return next((name for name, is_kind in tests.items() if is_kind(stored)), str(stored))
