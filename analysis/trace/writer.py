"""Write a trace.

This module does not import torch, so any trainer can record with it.

Usage::

    writer = TraceWriter.create(run_dir, manifest={"run_id": "ppl-seed0", ...}, vocab=texts)
    writer.append("prompts", {...})
    for step in ...:
        writer.append("tokens", {"step": step, "prompt_id": ids, ...})   # arrays of equal length, or scalars
        writer.end_step(step)
    writer.flush()                                                       # makes all ended steps durable
    writer.finish()
"""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from entrace.analysis.trace import digests
from entrace.analysis.trace.arguments import checked
from entrace.analysis.trace.digests import DIGESTS, Digest
from entrace.analysis.trace.errors import InputError, faults_at, in_one_line, nearest
from entrace.analysis.trace.lexicon import OTHER, Lexicon
from entrace.analysis.trace.manifest import (
    check_kinds,
    check_run_id,
    durable_file,
    now,
    read_manifest,
    sync_folder,
    to_json,
    write_manifest,
)
from entrace.analysis.trace.mirror import Mirror, check_names
from entrace.analysis.trace.parts import (
    FILES,
    added_name,
    last_step,
    listed_files,
    move_listed,
    part_name,
    part_path,
    pending_path,
    read_part,
    remove_leftovers,
)
from entrace.analysis.trace.places import usable
from entrace.analysis.trace.plain import well_formed
from entrace.analysis.trace.ragged import is_flag
from entrace.analysis.trace.schema import EVALS, PROMPTS, SCHEMA_VERSION, TABLES, Column, Table
from entrace.analysis.trace.vocabulary import Vocabulary

# Tables whose rows may follow when their step is durable: the last policy can be evaluated after training.
ADDED_LATER = (EVALS.name, PROMPTS.name)
# These lossless encodings gave the smallest files. Mantissa bytes of measured floats are noise, which compresses best
# when split from the exponents; ids and lengths are constant or increase slowly within a response.
DELTA_COLUMNS = {"rollout_id", "position", "response_length"}
# Default: 20,000. Longer pages make files 5% smaller and take 10% less time to write.
ROWS_PER_PAGE = 1 << 18
# Row groups end where a step ends, so that readers skip steps by their statistics, such as those without after-update
# values. Smaller groups compress less.
MIN_ROW_GROUP, MAX_ROW_GROUP = 1 << 17, 1 << 20


class Written(NamedTuple):
    """A file of the trace that was written: its number of rows and its digest."""

    rows: int
    digest: Digest


# By table and file name.
WrittenFiles = dict[str, dict[str, Written]]
Gather = Callable[[WrittenFiles], list[WrittenFiles]]


class TraceWriter:
    """Buffer rows in memory and write one Parquet file per table at every ``flush``.

    A file covers whole steps, is complete before it can be found, and is never rewritten. It counts as soon as
    ``run.json``, which is replaced atomically, lists it. All tables therefore advance to a step together. Only then
    does the file move to the folder of its table; see ``parts``.

    If several processes record one run, each has a writer with its own ``rank``, and all flush together. ``gather``
    waits until every process has called it and returns the values of all, or raises if a process has failed. Rank 0
    writes ``run.json``.
    """

    def __init__(
        self, run_dir: Path, manifest: dict[str, Any], categories: np.ndarray, rank: int, gather: Gather
    ) -> None:
        """Store the state that ``create`` and ``resume`` prepare.

        ``categories`` has shape ``(V,)``, one per vocabulary entry.
        """
        self.run_dir = run_dir
        self.manifest = manifest
        self.rank = rank
        self._gather = gather
        self._categories = pa.array(categories, pa.string())
        self._buffers: dict[str, list[pa.Table]] = {name: [] for name in TABLES}
        self._ended_step = manifest["last_durable_step"]
        self._num_ended = dict.fromkeys(TABLES, 0)
        self._mirror = Mirror((), run_dir, manifest)

    @classmethod
    @checked
    def create(
        cls,
        run_dir: Path,
        manifest: Mapping[str, Any],
        vocab: Vocabulary | Sequence[str],
        lexicon: Lexicon | None = None,
        *,
        replace: bool = False,
        rank: int = 0,
        gather: Gather = lambda files: [files],
        log: Sequence[str] = (),
    ) -> TraceWriter:
        """Start a new trace in ``run_dir``.

        Args:
            run_dir: Folder to create; an existing folder must be empty.
            manifest: Description of the run for ``run.json``; ``run_id`` is required.
            vocab: The tokenizer's vocabulary, as from ``Vocabulary.of``, or the text of every entry, by token id.
            lexicon: Words and rules of the token categories (default: the shipped lexicon).
            replace: Allow a folder that holds a trace, and remove its rows.
            rank: Rank of this process among those that record the run.
            gather: Exchange between processes; see the class.
            log: Dashboards that show steps and evaluations as soon as they are durable; names from ``mirror``.

        Raises:
            InputError: ``run_dir`` is not empty or cannot be a folder, ``run_id`` is missing or empty, JSON cannot hold
                a value of ``manifest``, or a dashboard is unknown or not installed.
        """
        run_dir = Path(run_dir)
        if manifest.get("run_id") is None:
            state = "is null" if "run_id" in manifest else "is missing"
            raise InputError(f"manifest: run_id {state}; name the run")
        check_run_id("manifest", manifest["run_id"])
        check_kinds("manifest", manifest)
        to_json("manifest", dict(manifest))
        if rank == 0 and holds_files(run_dir) and not replace:
            raise InputError(f"{run_dir}: already holds files; choose another folder, or continue with --resume")
        check_names(log)
        entries = vocab if isinstance(vocab, Vocabulary) else Vocabulary(list(vocab))
        categories = (lexicon or Lexicon.load()).categorize(entries.texts, entries.is_special)
        if entries.has_text is not None:
            categories[~np.array(entries.has_text, dtype=bool)] = OTHER
        state = {"status": "running", "started_at": now(), "last_durable_step": 0, FILES: {}}
        writer = cls(run_dir, {**manifest, "schema_version": SCHEMA_VERSION, **state}, categories, rank, gather)
        if rank == 0:
            with usable(run_dir):
                run_dir.mkdir(parents=True, exist_ok=True)
            # Of the trace to replace.
            (run_dir / DIGESTS).unlink(missing_ok=True)
            write_manifest(run_dir, writer.manifest)
            remove_leftovers(run_dir, writer.manifest)
            columns = {"text": entries.texts, "category": categories, "is_special": entries.is_special}
            writer.append("vocab", {"token_id": np.arange(len(entries.texts)), **columns})
            writer._mirror = Mirror(log, run_dir, writer.manifest)
        return writer

    @classmethod
    @checked
    def resume(
        cls,
        run_dir: Path,
        step: int,
        rank: int = 0,
        gather: Gather = lambda files: [files],
        log: Sequence[str] = (),
    ) -> TraceWriter:
        """Resume the trace in ``run_dir`` after ``step``; remove rows of later steps.

        Raises:
            InputError: no part of the trace is durable up to ``step``, a file is missing or damaged, or a dashboard of
                ``log`` is unknown or not installed.
        """
        run_dir = Path(run_dir)
        check_names(log)
        manifest = read_manifest(run_dir)
        listed = listed_files(run_dir, manifest)
        kept = {
            table: {name: rows for name, rows in files.items() if last_step(name) <= step}
            for table, files in listed.items()
        }
        parts = [read_part(part_path(run_dir, "vocab", name), ["category"]) for name in kept.get("vocab", ())]
        if not parts:
            raise InputError(f"{run_dir}: no durable step to resume from; remove the folder and start again")
        manifest.pop("error", None)
        # Files of an earlier schema version are kept unchanged; new files have the current version.
        state = {"schema_version": SCHEMA_VERSION, "status": "running", "last_durable_step": step, FILES: kept}
        categories = pa.concat_tables(parts)["category"].to_numpy(zero_copy_only=False)
        writer = cls(run_dir, {**manifest, **state}, categories, rank, gather)
        if rank == 0:
            # Readers follow the manifest, so it must stop listing files before they are removed.
            write_manifest(run_dir, writer.manifest)
            remove_leftovers(run_dir, writer.manifest)
            writer._mirror = Mirror(log, run_dir, writer.manifest)
        return writer

    @checked
    def append(self, table: str, columns: Mapping[str, Any]) -> None:
        """Buffer rows of ``table``.

        Args:
            table: Name from ``trace.TABLES``.
            columns: Arrays of equal length, or scalars that apply to all rows. ``run_id`` and the ``category`` of
                tokens are filled in; nullable columns may be omitted. Lone surrogates in text become U+FFFD, because no
                file can store them.

        Raises:
            InputError: a table or column is unknown, a column is missing, lengths differ, a value has the wrong type,
                or a float is NaN or infinite.
        """
        if table not in TABLES:
            raise InputError(f'unknown table "{table}"{nearest(table, TABLES)}')
        columns = {"run_id": self.manifest["run_id"], **columns}
        if table == "tokens" and "token_id" in columns:
            columns["category"] = self._categorize(columns["token_id"])
        self._buffers[table].append(_as_arrow(TABLES[table], columns))

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Drop the rows that the block appended if it raises."""
        before = {name: len(parts) for name, parts in self._buffers.items()}
        try:
            yield
        except BaseException:
            for name, parts in self._buffers.items():
                del parts[before[name] :]
            raise

    def _categorize(self, token_ids: Any) -> Any:
        try:
            found = self._categories.take(_to_array(token_ids, pa.int64(), rows=1))
            return found if _is_array(token_ids) else found[0].as_py()
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            size = len(self._categories)
            reason = in_one_line(error)
            raise InputError(f"table tokens: token_id is not in the vocabulary, 0 to {size - 1} ({reason})") from None

    @checked
    def end_step(self, step: int) -> None:
        """Declare that the rows appended so far complete ``step``.

        ``flush`` writes rows of ended steps only.
        """
        self._ended_step = step
        self._num_ended = {name: len(parts) for name, parts in self._buffers.items()}

    @checked
    def flush(self, step: int | None = None) -> None:
        """Make the rows of all ended steps durable, after ending ``step`` if it is given.

        If an error is raised, readers see all of these steps or none, the rows are still buffered, and another call
        completes the work.

        Evaluations can be added to the last step, and prompts with them.

        Raises:
            InputError: rows of another table were appended to a step that is already durable.
        """
        if step is not None:
            self.end_step(step)
        first = min(self.manifest["last_durable_step"] + 1, self._ended_step)
        name = part_name(first, self._ended_step, self.rank)
        own: WrittenFiles = {}
        for table, parts in self._buffers.items():
            if ended := parts[: self._num_ended[table]]:
                own_name, listed = name, self.manifest[FILES].get(table, {})
                if name in listed:
                    if table not in ADDED_LATER:
                        raise InputError(f"table {table}: step {self._ended_step} is durable; no row can be added")
                    own_name = added_name(name, listed)
                # Without its folder, a table counts as removed.
                (self.run_dir / table).mkdir(exist_ok=True)
                path = pending_path(self.run_dir, table, own_name)
                own[table] = {own_name: _write_part(path, TABLES[table], ended)}
        files = {table: dict(listed) for table, listed in self.manifest[FILES].items()}
        new_files = {}
        for written in self._gather(own):
            for table, parts in written.items():
                files.setdefault(table, {}).update({name: part.rows for name, part in parts.items()})
                new_files |= {f"{table}/{name}": part.digest for name, part in parts.items()}
        manifest = {**self.manifest, "last_durable_step": self._ended_step, FILES: files}
        if self.rank == 0:
            write_manifest(self.run_dir, manifest, new_files)
            with faults_at(self.run_dir):
                move_listed(self.run_dir, manifest)
        # No process drops its rows before rank 0 has listed the files.
        self._gather({})
        self.manifest = manifest
        self._buffers = {table: parts[self._num_ended[table] :] for table, parts in self._buffers.items()}
        self._num_ended = dict.fromkeys(TABLES, 0)
        self._mirror.send(self.run_dir / name for name in new_files)

    def close_dashboards(self) -> None:
        """End the run on its dashboards; the trace stays as it is."""
        self._mirror.close()

    @checked
    def finish(self, error: str | None = None) -> None:
        """Mark the run ``complete``, or ``failed`` with its error.

        Rows that were not flushed are dropped.
        """
        self.manifest["status"] = "failed" if error else "complete"
        self.manifest["finished_at"] = now()
        if error:
            self.manifest["error"] = error
        self.close_dashboards()
        if self.rank == 0:
            # A loss of power between listing and moving is repaired by a resume, which a finished run does not need.
            for table in self.manifest[FILES]:
                if (self.run_dir / table).exists():
                    sync_folder(self.run_dir / table)
            write_manifest(self.run_dir, self.manifest)


def holds_files(run_dir: Path) -> bool:
    """Return whether a folder exists and is not empty.

    Raises:
        InputError: the path is a file, or cannot be read.
    """
    with usable(run_dir):
        return run_dir.exists() and any(run_dir.iterdir())


def write_part(path: Path, table: str, columns: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Write one durable file of ``table`` with rows of a run that have no step.

    Args:
        path: The file, in the folder of the table; its name must differ from those that ``TraceWriter`` uses.
        table: Name from ``trace.TABLES``.
        columns: As in ``TraceWriter.append``, except that no column is filled in.
        metadata: Entries to add to the metadata of the file's schema.

    Raises:
        InputError: as in ``TraceWriter.append``.
    """
    rows = _as_arrow(TABLES[table], columns)
    written = _write_part(path, TABLES[table], [rows.replace_schema_metadata({**rows.schema.metadata, **metadata})])
    digests.append(path.parents[1], {f"{path.parent.name}/{path.name}": written.digest})


def _as_arrow(table: Table, columns: Mapping[str, Any]) -> pa.Table:
    known = {column.name for column in table.columns}
    for name in columns:
        if name not in known:
            raise InputError(f'table {table.name}: unknown column "{name}"{nearest(name, known)}')
    lengths = {len(value) for value in columns.values() if _is_array(value)}
    if len(lengths) > 1:
        raise InputError(f"table {table.name}: columns of different lengths {sorted(lengths)}")
    rows = lengths.pop() if lengths else 1
    arrays = []
    present = [column for column in table.columns if not column.is_optional or columns.get(column.name) is not None]
    for column in present:
        if column.name not in columns and not column.nullable:
            raise InputError(f'table {table.name}: column "{column.name}" is missing')
        value = columns.get(column.name)
        try:
            array = _to_array(value, column.type, rows)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            place, reason = f"table {table.name}: column {column.name}", in_one_line(error)
            raise InputError(f"{place} is not {column.type} ({reason})") from None
        if array.null_count and not column.nullable:
            nulls = f"holds {array.null_count} nulls in {len(array)} rows; every row needs a value"
            raise InputError(f"table {table.name}: column {column.name} {nulls}")
        if column in table.float_columns:
            _check_finite(array, table, column)
        arrays.append(array)
    return pa.Table.from_arrays(arrays, schema=table.schema_of([column.name for column in present]))


def _check_finite(array: pa.Array, table: Table, column: Column) -> None:
    if bad := np.count_nonzero(~np.isfinite(np.asarray(array.drop_null()))):
        remedy = "leave it null where unknown" if column.nullable else "it must be a finite number in every row"
        raise InputError(
            f"table {table.name}: column {column.name} is NaN or infinite in {bad} of {len(array)} rows; {remedy}"
        )


def _to_array(value: Any, kind: pa.DataType, rows: int) -> pa.Array:
    # Arrow would otherwise share the caller's memory, which may change before the rows are written.
    value = value.copy() if isinstance(value, np.ndarray) else value
    if pa.types.is_boolean(kind):
        _check_flags(value)
    try:
        return pa.array(value, kind) if _is_array(value) else pa.repeat(pa.scalar(value, kind), rows)
    except UnicodeEncodeError:
        return _to_array(_without_surrogates(value), kind, rows)


def _check_flags(value: Any) -> None:
    """Refuse numbers and texts that Arrow would take as Booleans by their truth.

    Raises:
        ValueError: a value is neither a Boolean nor 0 or 1.
    """
    if isinstance(value, np.ndarray):
        found = value[(value != 0) & (value != 1)].tolist() if value.dtype.kind in "iuf" else []
    elif isinstance(value, pa.Array | pa.ChunkedArray) and not pa.types.is_boolean(value.type):
        found = [entry for entry in value.to_pylist() if entry is not None and not is_flag(entry)]
    else:
        return
    if found:
        raise ValueError(f"found {reprlib.repr(found[0])}, expected true or false")


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return well_formed(value)
    return [_without_surrogates(entry) for entry in value] if _is_array(value) else value


def _is_array(value: Any) -> bool:
    return isinstance(value, (list, tuple, np.ndarray, pa.Array, pa.ChunkedArray))


def _is_sorted(rows: pa.Table, names: tuple[str, ...]) -> bool:
    """Return whether rows are sorted by these columns.

    Rows usually are, and checking is faster than sorting.
    """
    is_tied = np.array(True)
    for name in names:
        values = rows[name].to_numpy()
        before, after = values[:-1], values[1:]
        if (is_tied & (before > after)).any():
            return False
        is_tied = is_tied & (before == after)
    return True


def _with_equal_columns(table: Table, parts: list[pa.Table]) -> list[pa.Table]:
    """Return the parts with equal columns; missing optional columns are null."""
    if all(part.schema.equals(parts[0].schema) for part in parts):
        return parts
    held = {name for part in parts for name in part.column_names}
    schema = table.schema_of([column.name for column in table.columns if column.name in held])
    columns = [
        [part[name] if name in part.column_names else pa.nulls(len(part), schema.field(name).type) for part in parts]
        for name in schema.names
    ]
    return [pa.Table.from_arrays(list(arrays), schema=schema) for arrays in zip(*columns, strict=True)]


def _write_part(path: Path, table: Table, parts: list[pa.Table]) -> Written:
    """Write one sorted file."""
    path.parent.mkdir(exist_ok=True)
    rows = pa.concat_tables(_with_equal_columns(table, parts))
    if not _is_sorted(rows, table.sort_by):
        rows = rows.sort_by([(name, "ascending") for name in table.sort_by])
    # In memory, where it takes least time to compute the digest.
    stream = pa.BufferOutputStream()
    with pq.ParquetWriter(stream, rows.schema, **parquet_options(table, rows.column_names)) as writer:
        for start, end in itertools.pairwise(_group_bounds(rows)):
            writer.write_table(rows.slice(start, end - start), MAX_ROW_GROUP)
    data = memoryview(stream.getvalue())
    # Computed while the disk writes, the digest takes no time.
    with ThreadPoolExecutor(1) as pool:
        digest = pool.submit(Digest.of, data)
        with durable_file(path) as file:
            file.write(data)
    return Written(len(rows), digest.result())


def _group_bounds(rows: pa.Table) -> list[int]:
    """Return the first row of each row group, and the number of rows."""
    steps = rows["step"].to_numpy() if "step" in rows.column_names else np.zeros(len(rows))
    bounds = [0]
    for end in (np.flatnonzero(np.diff(steps)) + 1).tolist():
        if end - bounds[-1] >= MIN_ROW_GROUP:
            bounds.append(end)
    return [*bounds, len(rows)]


def parquet_options(table: Table, names: Sequence[str]) -> dict[str, Any]:
    """Return compression and encodings for a file with the columns ``names``."""
    encodings = {column.name: "BYTE_STREAM_SPLIT" for column in table.columns if column.is_measured}
    encodings |= dict.fromkeys(DELTA_COLUMNS, "DELTA_BINARY_PACKED")
    return {
        "compression": "zstd",
        "write_page_checksum": True,
        "max_rows_per_page": ROWS_PER_PAGE,
        "use_dictionary": [name for name in names if name not in encodings],
        "column_encoding": {name: encodings[name] for name in names if name in encodings},
    }
