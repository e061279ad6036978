"""Writes a trace. Free of torch, so that any trainer can record with it.

Usage::

    writer = TraceWriter.create(run_dir, manifest={"run_id": "ppl-seed0", ...}, vocab=texts)
    writer.append("prompts", {...})
    for step in ...:
        writer.append("tokens", {"step": step, "prompt_id": ids, ...})   # arrays of one length, or scalars
        writer.flush(step)                                               # durable up to here
    writer.finish()
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from analysis.trace.errors import InputError, nearest
from analysis.trace.lexicon import Lexicon
from analysis.trace.manifest import now, read_manifest, write_manifest
from analysis.trace.schema import SCHEMA_VERSION, TABLES, Table

# Smallest exact encodings found for each kind of column: mantissa bytes of measured floats are noise and cost least
# when split from the exponents; ids, lengths and constants within a response are runs.
SPLIT_COLUMNS = {"logprob", "entropy", "grad_norm", "logprob_after", "entropy_after"}
DELTA_COLUMNS = {"rollout_id", "position", "response_length"}
PART = re.compile(r"part-(\d+)-(\d+)\.parquet")


class TraceWriter:
    """Buffers rows in memory and writes one Parquet file a table at every ``flush``.

    A file covers whole steps, appears under its final name only when complete, and is never rewritten.
    """

    def __init__(self, run_dir: Path, manifest: dict[str, Any], categories: np.ndarray) -> None:
        """Use ``create`` or ``resume``; ``categories`` holds the category of each vocabulary entry, shape ``(V,)``."""
        self.run_dir = run_dir
        self.manifest = manifest
        self._categories = pa.array(categories, pa.string())
        self._buffers: dict[str, list[pa.Table]] = {name: [] for name in TABLES}

    @classmethod
    def create(
        cls, run_dir: Path, manifest: Mapping[str, Any], vocab: Sequence[str], lexicon: Lexicon | None = None
    ) -> TraceWriter:
        """Starts a new trace in ``run_dir``.

        Args:
            run_dir: Folder to create; it must not hold a run yet.
            manifest: What ``run.json`` shall say of the run; ``run_id`` is required.
            vocab: Text of every vocabulary entry, indexed by token id.
            lexicon: Words and rules of the token categories; the shipped ones if not given.

        Raises:
            InputError: ``run_dir`` is not empty, or ``run_id`` is missing.
        """
        run_dir = Path(run_dir)
        if "run_id" not in manifest:
            raise InputError('the manifest of a trace needs a "run_id"')
        if run_dir.exists() and any(run_dir.iterdir()):
            raise InputError(f"{run_dir}: already holds files; choose another folder, or go on with --resume")
        categories = (lexicon or Lexicon.load()).categorize(vocab)
        run_dir.mkdir(parents=True, exist_ok=True)
        state = {"schema_version": SCHEMA_VERSION, "status": "running", "started_at": now(), "last_durable_step": 0}
        writer = cls(run_dir, {**manifest, **state}, categories)
        write_manifest(run_dir, writer.manifest)
        writer.append("vocab", {"token_id": np.arange(len(vocab)), "text": list(vocab), "category": categories})
        return writer

    @classmethod
    def resume(cls, run_dir: Path, step: int) -> TraceWriter:
        """Goes on with the trace in ``run_dir`` after ``step``, removing whatever was written beyond it."""
        run_dir = Path(run_dir)
        manifest = read_manifest(run_dir)
        for path in run_dir.glob("*/.*.tmp"):
            path.unlink()
        for path in run_dir.glob("*/part-*.parquet"):
            if (match := PART.fullmatch(path.name)) and int(match[2]) > step:
                path.unlink()
        parts = [pq.read_table(path, columns=["category"]) for path in sorted((run_dir / "vocab").glob("*.parquet"))]
        if not parts:
            raise InputError(f"{run_dir}: nothing durable to resume from; remove the folder and start again")
        manifest.pop("error", None)
        writer = cls(
            run_dir,
            {**manifest, "status": "running", "last_durable_step": step},
            pa.concat_tables(parts)["category"].to_numpy(zero_copy_only=False),
        )
        write_manifest(run_dir, writer.manifest)
        return writer

    def append(self, table: str, columns: Mapping[str, Any]) -> None:
        """Buffers rows of ``table``.

        Args:
            table: Name from ``analysis.trace.TABLES``.
            columns: Arrays of one length, or scalars that hold for all rows. ``run_id`` is filled in, and so is the
                ``category`` of tokens; nullable columns may be left out.

        Raises:
            InputError: unknown table or column, a column missing, lengths that differ, or a value of a wrong type.
        """
        if table not in TABLES:
            raise InputError(f'unknown table "{table}"{nearest(table, TABLES)}')
        columns = {"run_id": self.manifest["run_id"], **columns}
        if table == "tokens":
            columns["category"] = self._categories.take(pa.array(columns["token_id"]))
        self._buffers[table].append(_as_arrow(TABLES[table], columns))

    def flush(self, step: int) -> None:
        """Makes all buffered rows durable; ``step`` is the last step that they complete."""
        first = self.manifest["last_durable_step"] + 1
        for name, parts in self._buffers.items():
            if parts:
                _write_part(self.run_dir / name / f"part-{first:06d}-{step:06d}.parquet", TABLES[name], parts)
                self._buffers[name] = []
        self.manifest["last_durable_step"] = step
        write_manifest(self.run_dir, self.manifest)

    def finish(self, error: str | None = None) -> None:
        """Marks the run ``complete``, or ``failed`` with its error. Rows not flushed are dropped on purpose."""
        self.manifest["status"] = "failed" if error else "complete"
        self.manifest["finished_at"] = now()
        if error:
            self.manifest["error"] = error
        write_manifest(self.run_dir, self.manifest)


def write_part(path: Path, table: str, columns: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Writes one file of ``table``, durable at once, for what belongs to a run but to none of its steps.

    Args:
        path: The file; its folder is that of the table, its name must not be one that ``TraceWriter`` gives.
        table: Name from ``analysis.trace.TABLES``.
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
            array = pa.array(value, column.type) if _is_array(value) else pa.repeat(pa.scalar(value, column.type), rows)
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise InputError(f"table {table.name}: column {column.name} is no {column.type} ({error})") from None
        if array.null_count and not column.nullable:
            raise InputError(f"table {table.name}: column {column.name} holds {array.null_count} nulls")
        arrays.append(array)
    return pa.Table.from_arrays(arrays, schema=table.arrow_schema)


def _is_array(value: Any) -> bool:
    return isinstance(value, (list, tuple, np.ndarray, pa.Array, pa.ChunkedArray))


def _write_part(path: Path, table: Table, parts: list[pa.Table]) -> None:
    path.parent.mkdir(exist_ok=True)
    rows = pa.concat_tables(parts)
    order = pc.sort_indices(rows, [(name, "ascending") for name in table.sort_by]).to_numpy()  # pyright: ignore[reportAttributeAccessIssue]
    if not np.array_equal(order, np.arange(len(order))):
        rows = rows.take(order)
    names = [column.name for column in table.columns]
    encodings = {name: "BYTE_STREAM_SPLIT" for name in names if name in SPLIT_COLUMNS and table.name == "tokens"}
    encodings |= {name: "DELTA_BINARY_PACKED" for name in names if name in DELTA_COLUMNS}
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        pq.write_table(
            rows,
            file,
            compression="zstd",
            use_dictionary=[name for name in names if name not in encodings],  # pyright: ignore[reportArgumentType]
            column_encoding=encodings,
        )
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
