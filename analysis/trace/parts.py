"""Find the Parquet files of a run, and check them against ``run.json``.

``run.json`` lists every durable file of ``TraceWriter`` with its number of rows. A file that is named like those of
the writer but is not listed is ignored. Files with other names, such as those of ``entrace intervene``, belong to no
step and always count. Without a list in ``run.json``, every file counts.

A file of the writer is complete in the folder ``.pending`` of the run before ``run.json`` lists it, and moves to the
folder of its table afterwards. A pattern such as ``tokens/*.parquet`` therefore never finds a row that a resumed run
may remove. If the process is killed before a listed file moves, readers read it where it is, and the next writer moves
it. Hidden names in the folder of the table would not be enough: patterns of DuckDB and polars match them.
"""

from __future__ import annotations

import base64
import os
import re
import stat
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from entrace.analysis.trace import digests
from entrace.analysis.trace.digests import Digest, End, Recorded
from entrace.analysis.trace.errors import InputError, fault_of, in_one_line, reason_of
from entrace.analysis.trace.places import is_remote, source_of
from entrace.analysis.trace.schema import TABLES, VERSION_KEY, Table, check_version

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

PART = re.compile(r"part-(\d+)-(\d+)(?:\.rank-\d+)?(?:\.pruned-(\d+))?(?:\.more-\d+)?\.parquet")
# A footer ends with the schema as Arrow knows it, in base64 after its key and length, and the versions of the format.
ARROW_KEY = b"ARROW:schema"
ARROW_SCHEMA = re.compile(ARROW_KEY + rb"\x18[\x80-\xff]*[\x00-\x7f]([A-Za-z0-9+/]+=*)")
# Key of run.json.
FILES = "files"
# Folder in the run for complete files that run.json does not list yet.
PENDING = ".pending"
# A writer takes milliseconds to move the files that run.json lists.
MOVE_TIMEOUT_S, POLL_S = 0.5, 0.005
# Number of rows of each file of the writer, by table and file name; None if unknown.
Files = dict[str, dict[str, int | None]]


class Layout(NamedTuple):
    """Describe a file of a table.

    A layout holds the schema version, the columns that are absent, and whether some tokens are context.
    """

    version: int
    absent: tuple[str, ...]
    has_context: bool


def part_name(first: int, last: int, rank: int) -> str:
    """Return the name of one process's file for steps ``first`` to ``last``."""
    return f"part-{first:06d}-{last:06d}{f'.rank-{rank:03d}' if rank else ''}.parquet"


def added_name(name: str, files: Collection[str]) -> str:
    """Return a new name for rows added to the steps of file ``name``.

    None of ``files``, the files of its table, has this name.
    """
    stem = name.removesuffix(".parquet")
    return next(found for i in count(1) if (found := f"{stem}.more-{i}.parquet") not in files)


def pruned_name(name: str, files: Iterable[str]) -> str:
    """Return a new name for the remaining rows of file ``name``.

    None of ``files``, the files of its table, has this name.
    """
    latest = max((int(match[3] or 0) for match in map(PART.fullmatch, files) if match), default=0)
    stem = name.removesuffix(".parquet").partition(".pruned-")[0]
    return f"{stem}.pruned-{latest + 1}.parquet"


def pending_path(run_dir: Path, table: str, name: str) -> Path:
    """Return where file ``name`` of ``table`` is before ``run.json`` lists it."""
    return run_dir / PENDING / f"{table}.{name}"


def part_path(run_dir: Path, table: str, name: str) -> Path:
    """Return where a listed file is; in the folder of its table if it is nowhere."""
    pending, path = pending_path(run_dir, table, name), run_dir / table / name
    # In this order, a file that moves in between is found.
    return pending if pending.exists() and not path.exists() else path


def listed_name(path: Path) -> str:
    """Return the name by which ``run.json`` lists a file, wherever it is."""
    return path.name.partition(".")[2] if path.parent.name == PENDING else path.name


def last_step(name: str) -> int:
    """Return the last step in a file of the writer, from its name.

    Raises:
        InputError: the name is not one of the writer's.
    """
    if not (match := PART.fullmatch(name)):
        raise InputError(f'"{name}": not the name of a file of a trace, such as part-000001-000010.parquet')
    return int(match[2])


def listed_files(run_dir: Path, manifest: Mapping[str, Any]) -> Files:
    """Return the files that the manifest lists, with their numbers of rows.

    Without a list, return every file named like the writer's; its number of rows is None.
    """
    if manifest.get(FILES) is not None:
        return manifest[FILES]
    names = {table: _names_in(run_dir / table) or [] for table in TABLES}
    return {table: {name: None for name in found if PART.fullmatch(name)} for table, found in names.items()}


def list_parts(run_dir: Path, manifest: Mapping[str, Any]) -> dict[str, dict[Path, int | None]]:
    """Return the files of each table that belong to the run, in order.

    Each file has its number of rows, or None if it is unknown. A table without a folder has no files: users may delete
    whole tables to save space.

    Raises:
        InputError: a listed file is missing, although the folder of its table exists.
    """
    listed = listed_files(run_dir, manifest)
    waiting = wait_for_moves(run_dir, listed)
    parts: dict[str, dict[Path, int | None]] = {table: {} for table in TABLES}
    for table in TABLES:
        if (names := _names_in(run_dir / table)) is None:
            continue
        rows = listed.get(table, {})
        found = {name: run_dir / table / name for name in names if name in rows or not PART.fullmatch(name)}
        found |= {name: part_path(run_dir, table, name) for of, name in waiting if of == table}
        if lost := min((name for name in rows if name not in found), default=None):
            path = run_dir / table / lost
            raise InputError(f"{path}: missing, although {run_dir.name}/run.json lists it; {remedy(path)}")
        parts[table] = {found[name]: rows.get(name) for name in sorted(found)}
    return parts


def wait_for_moves(run_dir: Path, listed: Files) -> set[tuple[str, str]]:
    """Wait until the writer has moved every listed file.

    Stop after ``MOVE_TIMEOUT_S``, because the writer seems to have been killed.

    Returns:
        Table and name of each listed file that did not move.
    """
    deadline = time.monotonic() + MOVE_TIMEOUT_S
    while (waiting := _list_waiting(run_dir, listed)) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return waiting


def _list_waiting(run_dir: Path, listed: Files) -> set[tuple[str, str]]:
    """Return table and name of each listed file that is only pending.

    A file that is in the folder of its table as well does not count.
    """
    pending = {(path.name.partition(".")[0], listed_name(path)) for path in (run_dir / PENDING).glob("*")}
    return {(t, name) for t, name in pending if name in listed.get(t, {}) and not (run_dir / t / name).exists()}


def check_parts(run_dir: Path, manifest: Mapping[str, Any], recorded: Recorded) -> dict[str, dict[Path, Layout]]:
    """Return the files of each table of the run, in order, with their layouts.

    Raises:
        InputError: a file is missing, or ``check_part`` rejects it.
    """
    return {
        table: {
            path: _read_layout(path, TABLES[table], rows, recorded.of(f"{table}/{listed_name(path)}"))
            for path, rows in parts.items()
        }
        for table, parts in list_parts(run_dir, manifest).items()
    }


def read_steps(path: Path, rows: int | None, known: Sequence[Digest]) -> Sequence[int]:
    """Return the steps in a file of table steps, in any order.

    Args:
        path: A file that ``check_parts`` accepted.
        rows: Its number of rows, if ``run.json`` lists it.
        known: Its digests. A file that its writer wrote, and nobody edited, has each step once. If it has as many rows
            as steps in its name, it is not read.

    Raises:
        InputError: the file is damaged.
    """
    match = PART.fullmatch(listed_name(path))
    if match and len(known) == 1 and rows == int(match[2]) - int(match[1]) + 1:
        return range(int(match[1]), int(match[2]) + 1)
    return read_part(path, ["step"])["step"].drop_null().to_pylist()


def last_whole_step(run_dir: Path, manifest: Mapping[str, Any]) -> tuple[int, str | None]:
    """Return the last intact step, and the fault of the first damaged file.

    All files are intact up to that step. Without damage, the fault is None. Every file is read completely.
    """
    durable, damage = int(manifest["last_durable_step"]), None
    recorded = digests.read(run_dir)
    for table, files in listed_files(run_dir, manifest).items():
        for name, rows in files.items():
            match = PART.fullmatch(name)
            if match and int(match[1]) <= durable:
                try:
                    check_whole(part_path(run_dir, table, name), TABLES[table], rows, recorded.of(f"{table}/{name}"))
                except InputError as error:
                    durable, damage = int(match[1]) - 1, str(error)
    return max(0, durable), damage


def remove_leftovers(run_dir: Path, manifest: Mapping[str, Any]) -> None:
    """Complete the work of an interrupted writer.

    Remove files that do not count, then move those that do. Temporary files do not count, nor do files named like the
    writer's that the manifest does not list.
    """
    for table in TABLES:
        listed = manifest[FILES].get(table, {})
        for path in (run_dir / table).glob("*"):
            if _is_temporary(path) or (PART.fullmatch(path.name) and path.name not in listed):
                path.unlink()
    move_listed(run_dir, manifest)
    for path in (run_dir / PENDING).glob("*"):
        path.unlink()
    _remove_if_empty(run_dir / PENDING)


def move_listed(run_dir: Path, manifest: Mapping[str, Any]) -> None:
    """Move the pending files that the manifest lists to the folders of their tables.

    Files of a table whose folder was removed do not move.
    """
    for path in sorted((run_dir / PENDING).glob("*")):
        table = path.name.partition(".")[0]
        if listed_name(path) in manifest[FILES].get(table, {}) and (run_dir / table).exists():
            path.replace(run_dir / table / listed_name(path))
    _remove_if_empty(run_dir / PENDING)


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".tmp")


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def check_part(path: Path, table: Table, rows: int | None = None, known: Sequence[Digest] = ()) -> Layout:
    """Check a file's columns, size, footer, and number of rows; return its layout.

    A small file is checked completely.

    Args:
        path: A Parquet file of ``table``.
        table: The table.
        rows: Number of rows that the file must have (default: any).
        known: Digests of which the file must have one (default: any).

    Raises:
        InputError: the file is damaged or a link, has an unreadable schema version, lacks a column, has a column of
            another type, or has another number of rows.
    """
    return _check_end(path, _read_end(path), table, rows, known)


def _read_layout(path: Path, table: Table, rows: int | None, known: Sequence[Digest]) -> Layout:
    """Return the result of ``check_part``, if possible without the footer.

    The footer of a file that equals the only digest it ever had is not parsed: its writer counted the rows, and parsing
    footers would take most of the time needed to open a study.
    """
    end = _read_end(path)
    if len(known) == 1 and known[0].agrees_with(end):
        match = ARROW_SCHEMA.match(end.data, max(0, end.data.rfind(ARROW_KEY)))
        if match and (layout := _layout_of(table.name, match[1])):
            return layout
    return _check_end(path, end, table, rows, known)


@lru_cache(maxsize=64)
def _layout_of(table: str, schema: bytes) -> Layout | None:
    """Return the layout of a table's files with a schema.

    The result is None if the rest of a footer is needed.

    Args:
        table: Name of the table.
        schema: Arrow's schema in base64.
    """
    import pyarrow as pa

    try:
        found = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(schema)))
        version = _check_schema(Path(), found, TABLES[table])
    except (pa.ArrowException, ValueError, InputError):
        return None
    return None if "loss_mask" in found.names else Layout(version, _absent(found, TABLES[table]), has_context=False)


def _read_end(path: Path) -> End:
    if path.parent.is_symlink() or not _is_regular(path):
        raise InputError(f"{path}: a link, or not a regular file; a trace holds regular files only")
    with _translate_errors(path):
        return End.of(path)


def _is_regular(path: Path) -> bool:
    if is_remote(path):
        return path.is_file()
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _check_end(path: Path, end: End, table: Table, rows: int | None, known: Sequence[Digest]) -> Layout:
    """Return what ``check_part`` returns, from the end of the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Arrow reads the footer from the end of what it is given.
    with _translate_errors(path), pq.ParquetFile(pa.BufferReader(end.data)) as file:
        schema, footer = file.schema_arrow, file.metadata
    try:
        version = _check_schema(path, schema, table)
    except InputError as error:
        raise InputError(f"{error}; {remedy(path)}") from None
    if rows is not None and footer.num_rows != rows:
        raise _damage(path, f"holds {footer.num_rows} rows, run.json says {rows}")
    if known and not any(digest.agrees_with(end) for digest in known):
        raise _damage(path, digests.DIFFERS)
    return Layout(version, _absent(schema, table), _has_context(footer))


def _absent(schema: pa.Schema, table: Table) -> tuple[str, ...]:
    # Each access to schema.names builds a list.
    names = set(schema.names)
    return tuple(column.name for column in table.columns if column.name not in names)


def columns_with_values(path: Path) -> set[str]:
    """Return the columns of a file with a value in some row, from its footer.

    Columns without statistics count. A boolean column that is true in some row has a second entry; see ``true_in``.
    """
    import pyarrow.parquet as pq

    with _translate_errors(path):
        footer = pq.read_metadata(source_of(path))
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    chunks = [group.column(i) for group in groups for i in range(group.num_columns) if group.num_rows]
    known = [chunk for chunk in chunks if not _is_null(chunk.statistics)]
    is_true = [chunk for chunk in known if chunk.physical_type == "BOOLEAN" and _may_be_true(chunk.statistics)]
    # A list or map is named by the path to its values.
    found = {chunk.path_in_schema.split(".")[0] for chunk in known}
    return found | {true_in(chunk.path_in_schema) for chunk in is_true}


def true_in(column: str) -> str:
    """Return the second entry of a boolean column that is true in some row.

    See ``columns_with_values``.
    """
    return f"{column} is true"


def _may_be_true(statistics: Any) -> bool:
    return statistics is None or not statistics.has_min_max or bool(statistics.max)


def check_whole(path: Path, table: Table, rows: int | None = None, known: Sequence[Digest] = ()) -> None:
    """Check a file as ``check_part`` does, and then every byte of it.

    A file without a digest is decoded, with its page checksums. Files of older traces have none.

    Raises:
        InputError: as in ``check_part``.
    """
    import pyarrow.parquet as pq

    check_part(path, table, rows, known)
    with _translate_errors(path):
        if not known:
            with pq.ParquetFile(source_of(path), page_checksum_verification=True) as file:
                for _ in file.iter_batches():
                    pass
        elif digests.digest_of(path) not in known:
            raise _damage(path, digests.DIFFERS)


def read_part(path: Path, columns: list[str] | None = None, filters: Any = None) -> pa.Table:
    """Read a file whose page checksums must be right, if it has any.

    Args:
        path: A Parquet file of a trace.
        columns: Columns to read (default: all).
        filters: Rows to read, as in ``pyarrow.parquet.read_table`` (default: all).

    Raises:
        InputError: the file is damaged.
    """
    import pyarrow.parquet as pq

    with _translate_errors(path):
        if filters is not None:
            return pq.read_table(source_of(path), columns=columns, filters=filters, page_checksum_verification=True)
        # ``read_table`` imports pandas, which takes a quarter of a second.
        with pq.ParquetFile(source_of(path), page_checksum_verification=True) as file:
            # Threads take longer to start than one column to read.
            return file.read(columns, use_threads=columns is None)


def _check_schema(path: Path, schema: pa.Schema, table: Table) -> int:
    stored = (schema.metadata or {}).get(VERSION_KEY)
    if stored is None:
        raise InputError(f"{path}: no schema version in its metadata ({VERSION_KEY.decode()})")
    version = check_version(f"{path}: schema version", stored.decode(errors="replace"))
    names = schema.names
    for column in table.columns:
        if column.name not in names:
            if column.may_be_absent_from(version):
                continue
            found = ", ".join(names)
            raise InputError(f"{path}: column {column.name} ({column.type}) is missing; found {found}")
        if names.count(column.name) > 1:
            raise InputError(f"{path}: column {column.name} appears more than once")
        stored = schema.field(column.name).type
        if _kind(stored) != _kind(column.type):
            raise InputError(f"{path}: column {column.name} is {stored}, expected {column.type}")
    return version


def _has_context(footer: pq.FileMetaData) -> bool:
    """Return whether a file may hold tokens outside ``loss_mask``, by its footer."""
    names = [footer.schema.column(i).path for i in range(footer.num_columns)]
    if "loss_mask" not in names:
        return False
    chunks = (footer.row_group(i).column(names.index("loss_mask")) for i in range(footer.num_row_groups))
    found = [chunk.statistics for chunk in chunks]
    return any(stats is None or not stats.has_min_max or not stats.min for stats in found if not _is_null(stats))


def _is_null(stats: pq.Statistics | None) -> bool:
    """Return whether a column chunk holds no value."""
    return stats is not None and stats.has_null_count and not stats.num_values


def _names_in(folder: Path) -> list[str] | None:
    """Return the sorted names of the Parquet files of a table.

    The result is None if the table has no folder.
    """
    try:
        names = [path.name for path in folder.iterdir()] if is_remote(folder) else os.listdir(folder)
    except FileNotFoundError:
        return None
    except (NotADirectoryError, PermissionError):
        return []
    return sorted(name for name in names if name.endswith(".parquet"))


@contextmanager
def _translate_errors(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        if fault := fault_of(error):
            raise InputError(f"{path}: {reason_of(fault)}") from None
        raise _damage(path, f"damaged or truncated Parquet file ({in_one_line(error)})") from None


def _damage(path: Path, reason: str) -> InputError:
    return InputError(f"{path}: {reason}; {remedy(path)}")


def remedy(path: Path) -> str:
    """Return what to do about a damaged or missing file of a table."""
    if not PART.fullmatch(listed_name(path)):
        return "remove it, and repeat the command that made it"
    return "restore it, or go back to the checkpoint before it with entrace train --resume"


@cache
def _kind(stored: pa.DataType) -> str:
    """Return the family of a type: numbers and strings of any width are readable."""
    import pyarrow as pa

    tests: dict[str, Callable[[pa.DataType], bool]] = {
        "integer": pa.types.is_integer,
        "float": pa.types.is_floating,
        "text": lambda t: pa.types.is_string(t) or pa.types.is_large_string(t) or pa.types.is_string_view(t),
        "list": lambda t: pa.types.is_list(t) or pa.types.is_large_list(t),
        "map": pa.types.is_map,
    }
    return next((name for name, is_kind in tests.items() if is_kind(stored)), str(stored))
