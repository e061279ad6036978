"""Find the Parquet files that belong to a run, and check them against ``run.json``.

``run.json`` lists every durable file of ``TraceWriter`` with its number of rows. A file that is named like those of
the writer but is not listed is left over from an interrupted flush, and is ignored. Files with other names, such as
those of ``entrace intervene``, belong to no step and always count. Without a list in ``run.json``, every file counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from entrace.analysis.trace import digests
from entrace.analysis.trace.digests import Digest, End, Recorded
from entrace.analysis.trace.errors import InputError, fault_of, in_one_line, reason_of
from entrace.analysis.trace.schema import TABLES, VERSION_KEY, Table, check_version

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

PART = re.compile(r"part-(\d+)-(\d+)(?:\.rank-\d+)?(?:\.pruned-(\d+))?\.parquet")
# Key of run.json.
FILES = "files"
# Number of rows of each file of the writer, by table and file name; None if unknown.
Files = dict[str, dict[str, int | None]]


class Layout(NamedTuple):
    """Describe a file of a table: schema version, columns that are absent, and whether some tokens are context."""

    version: int
    absent: tuple[str, ...]
    has_context: bool


def part_name(first: int, last: int, rank: int) -> str:
    """Return the name of the file with the rows of steps ``first`` to ``last`` from one process."""
    return f"part-{first:06d}-{last:06d}{f'.rank-{rank:03d}' if rank else ''}.parquet"


def pruned_name(name: str, files: Iterable[str]) -> str:
    """Return a name for the remaining rows of file ``name`` that none of ``files`` of its table has."""
    latest = max((int(match[3] or 0) for match in map(PART.fullmatch, files) if match), default=0)
    stem = name.removesuffix(".parquet").partition(".pruned-")[0]
    return f"{stem}.pruned-{latest + 1}.parquet"


def last_step(name: str) -> int:
    """Return the last step in a file of the writer, from its name.

    Raises:
        InputError: the name is not one of the writer's.
    """
    if not (match := PART.fullmatch(name)):
        raise InputError(f'"{name}": not the name of a file of a trace, such as part-000001-000010.parquet')
    return int(match[2])


def listed_files(run_dir: Path, manifest: Mapping[str, Any]) -> Files:
    """Return the files that the manifest lists, or every file named like the writer's if it has no list."""
    if manifest.get(FILES) is not None:
        return manifest[FILES]
    return {name: {path.name: None for path in _find(run_dir, name) if PART.fullmatch(path.name)} for name in TABLES}


def list_parts(run_dir: Path, manifest: Mapping[str, Any]) -> dict[str, dict[Path, int | None]]:
    """Return the files of each table that belong to the run, in order, with their number of rows if known.

    A table without a folder has no files: users may delete whole tables to save space.

    Raises:
        InputError: a listed file is missing, although the folder of its table exists.
    """
    listed = listed_files(run_dir, manifest)
    parts = {}
    for table in TABLES:
        is_there = (run_dir / table).exists()
        rows = {run_dir / table / name: rows for name, rows in listed.get(table, {}).items() if is_there}
        found = _find(run_dir, table)
        if lost := sorted(rows.keys() - set(found)):
            raise InputError(f"{lost[0]}: missing, although {run_dir.name}/run.json lists it; {remedy(lost[0])}")
        parts[table] = {path: rows.get(path) for path in found if path in rows or not PART.fullmatch(path.name)}
    return parts


def check_parts(run_dir: Path, manifest: Mapping[str, Any], recorded: Recorded) -> dict[str, dict[Path, Layout]]:
    """Return the files of each table that belong to the run, in order, with their layouts.

    Raises:
        InputError: a file is missing, or ``check_part`` rejects it.
    """
    return {
        table: {
            path: check_part(path, TABLES[table], rows, recorded.of(f"{table}/{path.name}"))
            for path, rows in parts.items()
        }
        for table, parts in list_parts(run_dir, manifest).items()
    }


def last_whole_step(run_dir: Path, manifest: Mapping[str, Any]) -> tuple[int, str | None]:
    """Return the last step up to which every file is intact, and the fault of the first damaged file.

    Every file is read completely.
    """
    durable, damage = int(manifest["last_durable_step"]), None
    recorded = digests.read(run_dir)
    for table, files in listed_files(run_dir, manifest).items():
        for name, rows in files.items():
            match = PART.fullmatch(name)
            if match and int(match[1]) <= durable:
                try:
                    check_whole(run_dir / table / name, TABLES[table], rows, recorded.of(f"{table}/{name}"))
                except InputError as error:
                    durable, damage = int(match[1]) - 1, str(error)
    return max(0, durable), damage


def remove_leftovers(run_dir: Path, manifest: Mapping[str, Any]) -> None:
    """Remove temporary files, and files named like the writer's that the manifest does not list."""
    for name in TABLES:
        listed = manifest[FILES].get(name, {})
        for path in (run_dir / name).glob("*"):
            is_temporary = path.name.startswith(".") and path.name.endswith(".tmp")
            if is_temporary or (PART.fullmatch(path.name) and path.name not in listed):
                path.unlink()


def check_part(path: Path, table: Table, rows: int | None = None, known: Sequence[Digest] = ()) -> Layout:
    """Return the layout of a file, after checking its columns, size, footer, and number of rows.

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
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.is_symlink() or path.parent.is_symlink() or not path.is_file():
        raise InputError(f"{path}: a link, or not a regular file; a trace holds regular files only")
    with _translate_errors(path):
        end = End.of(path)
        # Arrow reads the footer from the end of what it is given.
        with pq.ParquetFile(pa.BufferReader(end.data)) as file:
            schema, footer = file.schema_arrow, file.metadata
    try:
        version = _check_schema(path, schema, table)
    except InputError as error:
        raise InputError(f"{error}; {remedy(path)}") from None
    if rows is not None and footer.num_rows != rows:
        raise _damage(path, f"holds {footer.num_rows} rows, run.json says {rows}")
    if known and not any(digest.agrees_with(end) for digest in known):
        raise _damage(path, digests.DIFFERS)
    absent = tuple(column.name for column in table.columns if column.name not in schema.names)
    return Layout(version, absent, _has_context(footer))


def columns_with_values(path: Path) -> set[str]:
    """Return the columns of a file that have a value in some row, as far as its footer tells."""
    import pyarrow.parquet as pq

    with _translate_errors(path):
        footer = pq.read_metadata(path)
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    chunks = [group.column(i) for group in groups for i in range(group.num_columns) if group.num_rows]
    # A list or map is named by the path to its values.
    return {chunk.path_in_schema.split(".")[0] for chunk in chunks if not _is_null(chunk.statistics)}


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
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
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
        return pq.read_table(path, columns=columns, filters=filters, page_checksum_verification=True)


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
    """Return whether a file holds tokens outside ``loss_mask``, as far as its footer tells."""
    names = [footer.schema.column(i).path for i in range(footer.num_columns)]
    if "loss_mask" not in names:
        return False
    chunks = (footer.row_group(i).column(names.index("loss_mask")) for i in range(footer.num_row_groups))
    found = [chunk.statistics for chunk in chunks]
    return any(stats is None or not stats.has_min_max or not stats.min for stats in found if not _is_null(stats))


def _is_null(stats: pq.Statistics | None) -> bool:
    """Return whether a column chunk holds no value."""
    return stats is not None and stats.has_null_count and not stats.num_values


def _find(run_dir: Path, table: str) -> list[Path]:
    return sorted((run_dir / table).glob("*.parquet"))


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
    if not PART.fullmatch(path.name):
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
