"""Connect DuckDB to the files of traces; SQL can reach no other file."""

from __future__ import annotations

import re
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrace.analysis import queries
from entrace.analysis.sandbox.statements import one_line
from entrace.analysis.statistics import interval_functions
from entrace.analysis.trace.errors import TEMPORARY, InputError
from entrace.analysis.trace.parts import Layout
from entrace.analysis.trace.places import forms_of, storages_of
from entrace.analysis.trace.schema import RESPONSE_TOKENS, SCHEMA_VERSION, TABLES, TOKENS, Column, Table

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

RUNS_COLUMNS = {
    "run_id": "varchar",
    "study": "varchar",
    "arm": "varchar",
    "seed": "integer",
    "status": "varchar",
    "error": "varchar",
    "model": "varchar",
    "task": "varchar",
    "last_durable_step": "integer",
    "total_steps": "integer",
    "git_commit": "varchar",
    "started_at": "varchar",
    "finished_at": "varchar",
    "path": "varchar",
}
STAGES_COLUMNS = {
    "run_id": "varchar",
    "stage": "varchar",
    "first_step": "integer",
    "last_step": "integer",
    "boundary_step": "double",
    "boundary_low": "double",
    "boundary_high": "double",
    "entropy_start": "double",
    "entropy_slope": "double",
    "entropy_slope_low": "double",
    "entropy_slope_high": "double",
    "accuracy_start": "double",
    "accuracy_slope": "double",
    "accuracy_slope_low": "double",
    "accuracy_slope_high": "double",
}
# Numbers of responses of each step, and of those whose tokens are stored.
COVERAGE_COLUMNS = {
    "run_id": "varchar",
    "step": "integer",
    "num_responses": "bigint",
    "num_with_tokens": "bigint",
}
COVERAGE = """
with sampled as (select run_id, step, count(*) as n from rollouts where response_length > 0 group by all),
stored as (select run_id, step, count(*) as n from response_tokens where position = 0 group by all)
select
  run_id, step, greatest(coalesce(sampled.n, 0), coalesce(stored.n, 0)) as num_responses,
  coalesce(stored.n, 0) as num_with_tokens
from sampled full join stored using (run_id, step)
order by run_id, step
"""
# Columns of the tables beside those of the trace; the members of ``queries.COMPUTED`` are filled on first use.
BESIDE_TRACE = {"runs": RUNS_COLUMNS, "stages": STAGES_COLUMNS, "token_coverage": COVERAGE_COLUMNS}
# Columns that schema version 1 implies and does not store.
DERIVED = {
    # A prompt that is sampled twice in one step forms two groups; each group holds every sample_index once.
    "rollouts": (
        "group_id",
        "(select *, min(rollout_id) over (partition by run_id, step, prompt_id, repeat) as group_id from (select *, "
        "row_number() over (partition by run_id, step, prompt_id, sample_index order by rollout_id) as repeat "
        "from {source}))",
    ),
    "tokens": (
        "is_kept",
        "(select * from {source} left join (select run_id, rollout_id, bool_or(is_kept) as is_kept from rollouts "
        "group by all) using (run_id, rollout_id))",
    ),
}
# Columns that the views show instead of null, by table and column.
DEFAULTS = {("rollouts", "generated_length"): "response_length"}
CREATE = re.compile(r"^create (?=view|macro)", re.MULTILINE)
# Characters that brackets make literal in a glob pattern.
GLOB_CHARACTERS = re.compile(r"[*?\[]")


def spill_folder() -> Path:
    """Return a new path for spilled data.

    Without a path, DuckDB would spill to the working directory.
    """
    return Path(tempfile.gettempdir(), f"{TEMPORARY}{uuid.uuid4().hex}")


def connect(
    manifests: Mapping[str, Mapping[str, Any]], files: Mapping[str, Mapping[str, Layout]], memory: int, spill: Path
) -> duckdb.DuckDBPyConnection:
    """Return a connection with the tables and views of traces.

    The connection has the tables of the trace, those of ``BESIDE_TRACE``, and the views of sql/staging. Of
    ``BESIDE_TRACE``, only ``runs`` has rows.

    Args:
        manifests: Content of each ``run.json``, with ``path`` added, by run_id.
        files: Layout of each Parquet file of all runs, by table and path.
        memory: Limit of DuckDB's buffers in bytes; the excess is spilled to disk.
        spill: Folder for spilled data, which DuckDB creates when it spills; the caller removes it.

    Raises:
        InputError: a file cannot be read.
    """
    import duckdb

    con = duckdb.connect(
        config={
            "autoload_known_extensions": "false",
            "autoinstall_known_extensions": "false",
            "python_enable_replacements": "false",
            "memory_limit": f"{memory >> 10}KiB",
            "temp_directory": str(spill),
        }
    )
    for storage in storages_of(path for found in files.values() for path in found).values():
        con.register_filesystem(storage)
    try:
        for name, text in view_queries(files, _read_parquet):
            con.execute(f"create view {name} as {text}")
    except duckdb.Error as error:
        raise InputError(one_line(error)) from None
    for name, columns in BESIDE_TRACE.items():
        con.execute(f"create table {name} ({', '.join(f'{column} {kind}' for column, kind in columns.items())})")
    fill(con, "runs", rows_of_runs(manifests))
    interval_functions.register(con)
    for text in queries.staging():
        con.execute(text)
    # DuckDB checks both the pattern itself and each file that it matches.
    paths = dict.fromkeys(
        form for found in files.values() for path in found for name in forms_of(path) for form in (name, _pattern(name))
    )
    con.execute(f"set allowed_paths = [{', '.join(map(quote, paths))}]")
    # Progress is read by ``query_progress``, never printed.
    con.execute("set enable_progress_bar = true")
    con.execute("set enable_progress_bar_print = false")
    con.execute("set enable_external_access = false")
    con.execute("set lock_configuration = true")
    return con


def narrow(con: duckdb.DuckDBPyConnection, files: Mapping[str, Mapping[str, Layout]]) -> duckdb.DuckDBPyConnection:
    """Connect to the same database with views of only some of the files.

    Args:
        con: What ``connect`` returned, with the views of ``queries.KEPT`` renamed to ``new_<name>``.
        files: As for ``connect``, of some of the runs.
    """
    narrowed = con.cursor()
    for name, text in view_queries(files, _read_parquet):
        narrowed.execute(f"create temp view {name} as {text}")
    for text in queries.staging():
        narrowed.execute(CREATE.sub("create temp ", text))
    # Rows that are kept are in tables of the database.
    for view in queries.KEPT:
        narrowed.execute(f"alter view temp.{view} rename to new_{view}")
    return narrowed


def rows_of_runs(manifests: Mapping[str, Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """Return the rows of the table ``runs``."""
    return [
        tuple(_scalar({**manifest, "run_id": run_id}.get(name)) for name in RUNS_COLUMNS)
        for run_id, manifest in manifests.items()
    ]


def fill(con: duckdb.DuckDBPyConnection, name: str, rows: Sequence[tuple[Any, ...]]) -> None:
    """Replace the rows of a table of ``BESIDE_TRACE``."""
    con.execute(f"delete from {name}")
    if columns := list(zip(*rows, strict=True)):
        con.execute(f"insert into {name} select {', '.join('unnest(?)' for _ in columns)}", list(map(list, columns)))


def view_queries(
    files: Mapping[str, Mapping[str, Layout]], read: Callable[[Table, Layout, list[str]], str]
) -> Iterator[tuple[str, str]]:
    """Yield name and query of each view of the trace.

    A view reads only views that come before it.

    Args:
        files: As for ``connect``.
        read: Returns the source of rows that FROM names for files of a table with one layout.
    """
    # The view of tokens of schema version 1 reads the view of rollouts, which must exist first.
    for table in reversed(TABLES.values()):
        found = files[table.name]
        layouts = sorted(set(found.values()))
        sources = [
            _select(table, layout, read(table, layout, [path for path in found if found[path] == layout]))
            for layout in layouts
        ]
        nothing = f"select {', '.join(f'{_null(column)} as {column.name}' for column in table.columns)} where false"
        if table is TOKENS:
            yield RESPONSE_TOKENS, " union all ".join(sources) or nothing
            sources = [
                f"{source} where loss_mask is not false" if layout.has_context else source
                for layout, source in zip(layouts, sources, strict=True)
            ]
        yield table.name, " union all ".join(sources) or nothing


def _read_parquet(table: Table, layout: Layout, paths: list[str]) -> str:
    patterns = ", ".join(quote(_pattern(path)) for path in paths)
    return f"read_parquet([{patterns}], hive_partitioning = false)"


def stored_columns(table: Table, layout: Layout) -> list[str]:
    """Return the columns of a table that files of a layout hold."""
    return [column.name for column in table.columns if column.name not in layout.absent]


def _select(table: Table, layout: Layout, source: str) -> str:
    """Return a SELECT of all columns of ``table`` from a source of one layout."""
    stored = stored_columns(table, layout)
    source = f"(select {', '.join(stored)} from {source})"
    if layout.version < SCHEMA_VERSION and table.name in DERIVED:
        name, derived = DERIVED[table.name]
        source = derived.format(source=source)
        stored.append(name)
    columns = []
    for column in table.columns:
        value = column.name if column.name in stored else _null(column)
        default = DEFAULTS.get((table.name, column.name))
        columns.append(f"{f'coalesce({value}, {default})' if default else value} as {column.name}")
    return f"select {', '.join(columns)} from {source}"


def _null(column: Column) -> str:
    return f"null::{_sql_type(column.type)}"


def _sql_type(kind: pa.DataType) -> str:
    import pyarrow as pa

    if isinstance(kind, pa.ListType):
        return f"{kind.value_type}[]"
    return f"map({kind.key_type}, {kind.item_type})" if isinstance(kind, pa.MapType) else str(kind)


def _pattern(path: str) -> str:
    """Return the glob pattern that matches only this path.

    DuckDB reads file names as patterns.
    """
    return GLOB_CHARACTERS.sub(r"[\g<0>]", path)


def quote(text: str) -> str:
    """Return a literal of SQL."""
    return "'" + text.replace("'", "''") + "'"


def _scalar(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float) else str(value)
