"""Writes a trace. Free of torch, so that any trainer can record with it.

Usage::

    writer = TraceWriter.create(run_dir, manifest={"run_id": "ppl-seed0", ...}, vocab=texts)
    writer.append("prompts", {...})
    for step in ...:
        writer.append("tokens", {"step": step, "prompt_id": ids, ...})   # arrays of one length, or scalars
        writer.end_step(step)
    writer.flush()                                                       # durable up to the last step that ended
    writer.finish()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from entrace.analysis.trace.errors import InputError, in_one_line, nearest
from entrace.analysis.trace.lexicon import Lexicon
from entrace.analysis.trace.manifest import durable_file, now, read_manifest, write_manifest
from entrace.analysis.trace.parts import FILES, Files, last_step, listed_files, part_name, remove_leftovers
from entrace.analysis.trace.plain import well_formed
from entrace.analysis.trace.schema import SCHEMA_VERSION, TABLES, Column, Table
from entrace.analysis.trace.vocabulary import Vocabulary

# Smallest exact encodings found for each kind of column: mantissa bytes of measured floats are noise and cost least
# when split from the exponents; ids, lengths and constants within a response are runs.
DELTA_COLUMNS = {"rollout_id", "position", "response_length"}

Gather = Callable[[Files], list[Files]]


class TraceWriter:
    """Buffers rows in memory and writes one Parquet file a table at every ``flush``.

    A file covers whole steps, appears under its final name only when complete, and is never rewritten. It counts from
    the moment at which ``run.json``, replaced as a whole, lists it: all tables move on to a step together.

    Where several processes record one run, each has a writer with its own ``rank``, and all flush together: ``gather``
    returns what every process passes to it, once all have called it, or raises if one of them has failed. Rank 0 keeps
    ``run.json``.
    """

    def __init__(
        self, run_dir: Path, manifest: dict[str, Any], categories: np.ndarray, rank: int, gather: Gather
    ) -> None:
        """Use ``create`` or ``resume``; ``categories`` holds the category of each vocabulary entry, shape ``(V,)``."""
        self.run_dir = run_dir
        self.manifest = manifest
        self.rank = rank
        self._gather = gather
        self._categories = pa.array(categories, pa.string())
        self._buffers: dict[str, list[pa.Table]] = {name: [] for name in TABLES}
        self._ended_step = manifest["last_durable_step"]
        self._num_ended = dict.fromkeys(TABLES, 0)

    @classmethod
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
    ) -> TraceWriter:
        """Starts a new trace in ``run_dir``.

        Args:
            run_dir: Folder to create; it must not hold anything yet.
            manifest: What ``run.json`` shall say of the run; ``run_id`` is required.
            vocab: The tokenizer's vocabulary, as from ``Vocabulary.of``, or the text of every entry, by token id.
            lexicon: Words and rules of the token categories; the shipped ones if not given.
            replace: The folder may hold a trace, whose rows are removed.
            rank: Of this process among those that record the run.
            gather: See the class.

        Raises:
            InputError: ``run_dir`` is not empty, or ``run_id`` is missing.
        """
        run_dir = Path(run_dir)
        if manifest.get("run_id") is None:
            state = "is null" if "run_id" in manifest else "is missing"
            raise InputError(f"manifest: run_id {state}; name the run")
        if rank == 0 and not replace and run_dir.exists() and any(run_dir.iterdir()):
            raise InputError(f"{run_dir}: already holds files; choose another folder, or continue with --resume")
        entries = vocab if isinstance(vocab, Vocabulary) else Vocabulary(list(vocab))
        categories = (lexicon or Lexicon.load()).categorize(entries.texts, entries.is_special)
        state = {"status": "running", "started_at": now(), "last_durable_step": 0, FILES: {}}
        writer = cls(run_dir, {**manifest, "schema_version": SCHEMA_VERSION, **state}, categories, rank, gather)
        if rank == 0:
            run_dir.mkdir(parents=True, exist_ok=True)
            write_manifest(run_dir, writer.manifest)
            remove_leftovers(run_dir, writer.manifest)
            columns = {"text": entries.texts, "category": categories, "is_special": entries.is_special}
            writer.append("vocab", {"token_id": np.arange(len(entries.texts)), **columns})
        return writer

    @classmethod
    def resume(cls, run_dir: Path, step: int, rank: int = 0, gather: Gather = lambda files: [files]) -> TraceWriter:
        """Goes on with the trace in ``run_dir`` after ``step``, removing whatever was written beyond it.

        Raises:
            InputError: nothing of the trace is durable up to ``step``, or one of its files is missing.
        """
        run_dir = Path(run_dir)
        manifest = read_manifest(run_dir)
        listed = listed_files(run_dir, manifest)
        kept = {
            table: {name: rows for name, rows in files.items() if last_step(name) <= step}
            for table, files in listed.items()
        }
        parts = [pq.read_table(run_dir / "vocab" / name, columns=["category"]) for name in kept.get("vocab", ())]
        if not parts:
            raise InputError(f"{run_dir}: nothing durable to resume from; remove the folder and start again")
        manifest.pop("error", None)
        # Files of an earlier schema version stay as they are; new ones have the current version.
        state = {"schema_version": SCHEMA_VERSION, "status": "running", "last_durable_step": step, FILES: kept}
        categories = pa.concat_tables(parts)["category"].to_numpy(zero_copy_only=False)
        writer = cls(run_dir, {**manifest, **state}, categories, rank, gather)
        if rank == 0:
            # Readers go by the manifest: files may go only after it has let go of them.
            write_manifest(run_dir, writer.manifest)
            remove_leftovers(run_dir, writer.manifest)
        return writer

    def append(self, table: str, columns: Mapping[str, Any]) -> None:
        """Buffers rows of ``table``.

        Args:
            table: Name from ``trace.TABLES``.
            columns: Arrays of one length, or scalars that hold for all rows. ``run_id`` is filled in, and so is the
                ``category`` of tokens; nullable columns may be left out. Of text, lone surrogates, which no file can
                hold, become U+FFFD.

        Raises:
            InputError: unknown table or column, a column missing, lengths that differ, a value of a wrong type, or a
                float that is NaN or infinite.
        """
        if table not in TABLES:
            raise InputError(f'unknown table "{table}"{nearest(table, TABLES)}')
        columns = {"run_id": self.manifest["run_id"], **columns}
        if table == "tokens" and "token_id" in columns:
            columns["category"] = self._categorize(columns["token_id"])
        self._buffers[table].append(_as_arrow(TABLES[table], columns))

    def _categorize(self, token_ids: Any) -> Any:
        try:
            found = self._categories.take(_to_array(token_ids, pa.int64(), rows=1))
            return found if _is_array(token_ids) else found[0].as_py()
        except (pa.ArrowException, TypeError, ValueError) as error:
            size = len(self._categories)
            reason = in_one_line(error)
            raise InputError(f"table tokens: token_id is not in the vocabulary, 0 to {size - 1} ({reason})") from None

    def end_step(self, step: int) -> None:
        """Says that the rows appended so far complete ``step``; only rows of ended steps are ever written."""
        self._ended_step = step
        self._num_ended = {name: len(parts) for name, parts in self._buffers.items()}

    def flush(self, step: int | None = None) -> None:
        """Makes the rows of all steps that have ended durable; ``step``, if given, ends here.

        If this raises, nothing has changed for readers, and the rows are still buffered.

        Raises:
            InputError: rows were appended to a step that is durable already.
        """
        if step is not None:
            self.end_step(step)
        first = min(self.manifest["last_durable_step"] + 1, self._ended_step)
        name = part_name(first, self._ended_step, self.rank)
        own: Files = {}
        for table, parts in self._buffers.items():
            if ended := parts[: self._num_ended[table]]:
                if name in self.manifest[FILES].get(table, {}):
                    raise InputError(f"table {table}: step {self._ended_step} is durable already, no row can be added")
                own[table] = {name: _write_part(self.run_dir / table / name, TABLES[table], ended)}
        files = {table: dict(listed) for table, listed in self.manifest[FILES].items()}
        for written in self._gather(own):
            for table, part in written.items():
                files.setdefault(table, {}).update(part)
        manifest = {**self.manifest, "last_durable_step": self._ended_step, FILES: files}
        if self.rank == 0:
            write_manifest(self.run_dir, manifest)
        # Nobody lets go of rows before they are listed.
        self._gather({})
        self.manifest = manifest
        self._buffers = {table: parts[self._num_ended[table] :] for table, parts in self._buffers.items()}
        self._num_ended = dict.fromkeys(TABLES, 0)

    def finish(self, error: str | None = None) -> None:
        """Marks the run ``complete``, or ``failed`` with its error. Rows not flushed are dropped on purpose."""
        self.manifest["status"] = "failed" if error else "complete"
        self.manifest["finished_at"] = now()
        if error:
            self.manifest["error"] = error
        if self.rank == 0:
            write_manifest(self.run_dir, self.manifest)


def write_part(path: Path, table: str, columns: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Writes one file of ``table``, durable at once, for what belongs to a run but to none of its steps.

    Args:
        path: The file; its folder is that of the table, its name must not be one that ``TraceWriter`` gives.
        table: Name from ``trace.TABLES``.
        columns: As in ``TraceWriter.append``; nothing is filled in.
        metadata: Added to the metadata of the file's schema.

    Raises:
        InputError: as ``TraceWriter.append``.
    """
    rows = _as_arrow(TABLES[table], columns)
    _write_part(path, TABLES[table], [rows.replace_schema_metadata({**rows.schema.metadata, **metadata})])


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
    for column in table.columns:
        if column.name not in columns and not column.nullable:
            raise InputError(f'table {table.name}: column "{column.name}" is missing')
        value = columns.get(column.name)
        try:
            array = _to_array(value, column.type, rows)
        except (pa.ArrowException, TypeError, ValueError) as error:
            place, reason = f"table {table.name}: column {column.name}", in_one_line(error)
            raise InputError(f"{place} is not {column.type} ({reason})") from None
        if array.null_count and not column.nullable:
            nulls = f"holds {array.null_count} nulls in {len(array)} rows, and must have a value in each"
            raise InputError(f"table {table.name}: column {column.name} {nulls}")
        if column in table.float_columns:
            _check_finite(array, table, column)
        arrays.append(array)
    return pa.Table.from_arrays(arrays, schema=table.arrow_schema)


def _check_finite(array: pa.Array, table: Table, column: Column) -> None:
    if bad := np.count_nonzero(~np.isfinite(np.asarray(array.drop_null()))):
        remedy = "leave it null where unknown" if column.nullable else "it must be a finite number in every row"
        raise InputError(
            f"table {table.name}: column {column.name} is NaN or infinite in {bad} of {len(array)} rows; {remedy}"
        )


def _to_array(value: Any, kind: pa.DataType, rows: int) -> pa.Array:
    # Arrow would go on looking at the caller's memory, which may hold something else by the time it is written.
    value = value.copy() if isinstance(value, np.ndarray) else value
    try:
        return pa.array(value, kind) if _is_array(value) else pa.repeat(pa.scalar(value, kind), rows)
    except UnicodeEncodeError:
        return _to_array(_without_surrogates(value), kind, rows)


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return well_formed(value)
    return [_without_surrogates(entry) for entry in value] if _is_array(value) else value


def _is_array(value: Any) -> bool:
    return isinstance(value, (list, tuple, np.ndarray, pa.Array, pa.ChunkedArray))


def _is_sorted(rows: pa.Table, names: tuple[str, ...]) -> bool:
    """Whether rows already stand in the order of these columns, as they mostly do: seen faster than sorted."""
    is_tied = np.array(True)
    for name in names:
        values = rows[name].to_numpy()
        before, after = values[:-1], values[1:]
        if (is_tied & (before > after)).any():
            return False
        is_tied = is_tied & (before == after)
    return True


def _write_part(path: Path, table: Table, parts: list[pa.Table]) -> int:
    """Writes one file, sorted; returns its rows."""
    path.parent.mkdir(exist_ok=True)
    rows = pa.concat_tables(parts)
    if not _is_sorted(rows, table.sort_by):
        rows = rows.sort_by([(name, "ascending") for name in table.sort_by])
    names = [column.name for column in table.columns]
    encodings = {column.name: "BYTE_STREAM_SPLIT" for column in table.columns if column.is_measured}
    encodings |= {name: "DELTA_BINARY_PACKED" for name in names if name in DELTA_COLUMNS}
    with durable_file(path) as file:
        pq.write_table(
            rows,
            file,
            compression="zstd",
            use_dictionary=[name for name in names if name not in encodings],  # pyright: ignore[reportArgumentType]
            column_encoding=encodings,
        )
    return len(rows)
