"""Open traces and run read-only SQL over them; the SQL can reach no other file."""

from __future__ import annotations

import glob
import re
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrace.analysis import queries
from entrace.analysis.queries import BUILT_IN, Questions
from entrace.analysis.statistics import interval_functions
from entrace.analysis.terminal.interrupt import interruptible
from entrace.analysis.trace.errors import InputError, in_one_line, nearest, reason_of
from entrace.analysis.trace.manifest import MANIFEST, read_manifest
from entrace.analysis.trace.parts import check_part, list_parts, listed_files
from entrace.analysis.trace.plain import well_formed
from entrace.analysis.trace.sampling import TokenSampling
from entrace.analysis.trace.schema import SCHEMA_VERSION, TABLES, Table

if TYPE_CHECKING:
    import duckdb
    import polars as pl

    from entrace.analysis.statistics.stages import StageFit

DEFAULT_BASELINE = "none"
# Limit of DuckDB alone, which spills the excess to disk. Python and its libraries need memory in addition.
MEMORY_LIMIT = "1500MiB"

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
stored as (select run_id, step, count(*) as n from tokens where position = 0 group by all)
select
  run_id, step, greatest(coalesce(sampled.n, 0), coalesce(stored.n, 0)) as num_responses,
  coalesce(stored.n, 0) as num_with_tokens
from sampled full join stored using (run_id, step)
order by run_id, step
"""
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
# EXPLAIN ANALYZE executes the statement that follows, which must therefore be a query as well.
COMMENTS = r"(?:\s|--[^\n]*|/\*(?:(?!\*/).)*\*/)*"
EXPLAIN = re.compile(rf"{COMMENTS}explain\b\s*(\([^)]*\)|analyze\b)?", re.IGNORECASE | re.DOTALL)
FINAL_SEMICOLON = re.compile(rf";{COMMENTS}\Z", re.DOTALL)
# Readable names for statement types of DuckDB.
STATEMENT_NAMES = {"MULTI": "a PIVOT inside another statement"}
# Missing ranges of steps that the note on a run lists.
GAPS_SHOWN = 3
# Characters that brackets make literal in a glob pattern.
GLOB_CHARACTERS = re.compile(r"[*?\[]")
SQL_POSITION = re.compile(r"\s*\n\s*LINE \d+:.*", re.DOTALL)


def open_runs(paths: str | Path | Iterable[str | Path], *, questions: str | Path | None = None) -> Runs:
    """Open one or more traces for reading, up to their last durable step.

    Args:
        paths: Run folders, study folders (all runs inside are opened), or globs of either.
        questions: Folder with the user's own SQL, figures, and claims; see ``queries``.

    Returns:
        The runs, including failed runs and runs without data.

    Raises:
        InputError: a path is not a trace, has an unreadable schema version, lacks a column, or holds a damaged file;
            or a file in ``questions`` is malformed.
    """
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    if not given:
        raise InputError("no run given; name at least one run folder or study folder")
    folders = dict.fromkeys(folder.resolve() for path in given for folder in find_run_folders(path))
    manifests: dict[str, dict[str, Any]] = {}
    files: dict[str, dict[str, int]] = {name: {} for name in TABLES}
    notes: dict[str, str | None] = {}
    for folder in folders:
        if str(folder) != well_formed(str(folder)):
            raise InputError(f"{folder}: the name is not UTF-8; rename it")
        manifest = {**read_manifest(folder), "path": str(folder)}
        run_id = manifest.get("run_id") or folder.name
        if run_id in manifests:
            taken = manifests[run_id]["path"]
            raise InputError(f'{folder}: run_id "{run_id}" is already used by {taken}; open only one of the two')
        manifests[run_id] = manifest
        parts = list_parts(folder, manifest)
        for name, table in TABLES.items():
            files[name] |= {str(path): check_part(path, table, rows) for path, rows in parts[name].items()}
        listed = listed_files(folder, manifest)
        gone = [name for name, found in parts.items() if not found and listed.get(name)]
        notes[run_id] = _describe_progress(manifest, _read_steps(folder, parts["steps"]), gone)
    asked = BUILT_IN if questions is None else Questions(Path(questions).resolve())
    return Runs(manifests, files, notes, asked)


class Runs:
    """Hold traces that ``open_runs`` opened together, and answer queries about them.

    Attributes:
        manifests: Content of each ``run.json``, with ``path`` added, by run_id.
        notes: One line per incomplete or sampled run that states what is missing, by run_id.
        questions: The questions that can be asked, built in or the user's own.
    """

    def __init__(
        self,
        manifests: dict[str, dict[str, Any]],
        files: dict[str, dict[str, int]],
        notes: dict[str, str | None],
        questions: Questions = BUILT_IN,
    ) -> None:
        """Connect DuckDB to ``files``: the schema version of each Parquet file of all runs, by table and path."""
        self.manifests = manifests
        self.questions = questions
        self.notes = {run_id: note for run_id, note in notes.items() if note}
        self._fits: dict[str, StageFit] | None = None
        self._filled: set[str] = set()
        self._kept: dict[tuple[str, ...], pl.DataFrame] = {}
        self._finite: set[str] = set()
        self._files = [path for paths in files.values() for path in paths]
        self._con = _connect(manifests, files)

    def __repr__(self) -> str:
        return f"Runs({', '.join(self.manifests)})"

    def sql(self, text: str, params: Mapping[str, Any] | None = None) -> pl.DataFrame:
        """Run one read-only query over the traces.

        The query is a SELECT, PIVOT, DESCRIBE, SUMMARIZE, or similar statement, or EXPLAIN of one. It can read the
        tables of the trace (``entrace tables``), the tables ``runs`` and ``stages``, and the views of sql/staging.

        Args:
            text: DuckDB SQL.
            params: Values of the ``$name`` parameters; an omitted one is null, which shipped queries read as "all".

        Raises:
            InputError: the text is not a single query, a parameter is unknown, or DuckDB rejects the query.
        """
        import duckdb

        try:
            names = _parameters(text)
        except duckdb.Error as error:
            raise InputError(_one_line(error)) from None
        given = dict(params or {})
        for name in given:
            if name not in names:
                hint = nearest(name, names) if names else "; this query has none"
                raise InputError(f'unknown parameter "{name}"{hint}')
        for name in queries.computed_tables_in(text):
            self._fill(name)
        return self._select(text, dict.fromkeys(names) | given)

    def query(self, stem: str, **params: Any) -> pl.DataFrame:
        """Run one of the shipped queries, such as ``query("entropy_by_position", stage="plateau")``.

        Raises:
            InputError: the query or a parameter is unknown.
        """
        return self.sql(self.questions.read(stem), params)

    def query_once(self, stem: str, run_ids: Sequence[str]) -> pl.DataFrame:
        """Run a shipped query over some runs and cache the rows, which several parts of a claim share."""
        key = (stem, *run_ids)
        if key not in self._kept:
            self._kept[key] = self.query(stem, runs=list(run_ids))
        return self._kept[key]

    def why_empty(self, need: str) -> str:
        """Return why a question has no rows: the traces lack the data that it needs, or no data match the question."""
        probe, hint, name = queries.NEEDS[need]
        if self._select(f"{probe} limit 1", {}).is_empty():
            reasons = {str((manifest.get("unknown") or {}).get(name, hint)) for manifest in self.manifests.values()}
            return reasons.pop() if len(reasons) == 1 else hint
        return f"the traces hold {need}, but none that match this question"

    @cached_property
    def token_coverage(self) -> pl.DataFrame:
        """Return the number of responses of each run and step, and the number of those whose tokens are stored."""
        return self._run(COVERAGE, {})

    def token_share(self, stem: str, run_ids: Sequence[str] | None = None) -> str:
        """Return in words of which share of the responses a question reads tokens.

        Args:
            stem: Name of the question.
            run_ids: Runs that it reads (default: all).

        Returns:
            Empty if the question reads no tokens, or if the tokens of all responses, or of none, are stored.
        """
        probe, *_ = queries.NEEDS[self.questions.need(stem)]
        if "tokens" not in queries.tables_in(probe):
            return ""
        frame = self.token_coverage
        frame = frame if run_ids is None else frame.filter(frame["run_id"].is_in(list(run_ids)))
        stored, recorded = int(frame["num_with_tokens"].sum()), int(frame["num_responses"].sum())
        if stored in (0, recorded):
            return ""
        share, steps = f"{100 * stored / recorded:.2g} %", int((frame["num_with_tokens"] > 0).sum())
        return f"tokens of {share} of the responses are stored, on {steps:,} of {len(frame):,} steps"

    @property
    def stage_fits(self) -> dict[str, StageFit]:
        """Return the two-stage fit of every run with recorded steps; see ``statistics.stages``."""
        if self._fits is None:
            from entrace.analysis.statistics.stages import fit_stages

            known = "entropy_token_mean is not null and accuracy is not null"
            steps = self._select(
                f"select run_id, step, entropy_token_mean, accuracy from steps where {known} order by run_id, step", {}
            )
            self._fits = {
                str(run_id): fit_stages(
                    part["step"].to_numpy(), part["entropy_token_mean"].to_numpy(), part["accuracy"].to_numpy()
                )
                for (run_id,), part in steps.group_by("run_id", maintain_order=True)
            }
        return self._fits

    @property
    def baseline(self) -> str:
        """Return the baseline arm that the study names (default ``none``)."""
        named = (manifest.get("baseline") for manifest in self.manifests.values())
        return next(filter(None, named), DEFAULT_BASELINE)

    def subjects(self) -> dict[str, list[str]]:
        """Return the runs on which claims about training itself are judged, by label.

        If a run of the baseline arm has data, the only subject is that arm, with all its runs together. Otherwise each
        run is a subject of its own.
        """
        recorded = list(self.stage_fits)
        baseline = [run for run in recorded if self.manifests.get(run, {}).get("arm") == self.baseline]
        return {self.baseline: baseline} if baseline else {run: [run] for run in recorded}

    def _fill(self, name: str) -> None:
        """Fill a table of ``queries.COMPUTED``, once."""
        if name in self._filled:
            return
        self._filled.add(name)
        if name == "token_coverage":
            self._con.register("computed", self.token_coverage.to_arrow())
            self._con.execute(f"insert into {name} select * from computed")
            self._con.unregister("computed")
            return
        rows = [
            (run_id, *[segment.get(column) for column in list(STAGES_COLUMNS)[1:]])
            for run_id, fit in self.stage_fits.items()
            for segment in fit.segments()
        ]
        if rows:
            self._con.executemany(f"insert into stages values ({', '.join('?' * len(STAGES_COLUMNS))})", rows)

    def _select(self, text: str, params: dict[str, Any]) -> pl.DataFrame:
        for name in queries.tables_in(text):
            self._check_finite(TABLES[name])
        return self._run(text, params)

    def _check_finite(self, table: Table) -> None:
        """Reject a table that holds NaN or infinity, which would silently spread through every mean.

        Each table is scanned once, before the first query that reads it. The scan takes 50 ms per million tokens, about
        as long as one question, so queries over steps alone do not scan the tokens.

        Raises:
            InputError: a float column holds NaN or infinity.
        """
        if table.name in self._finite or not table.float_columns:
            return
        counts = ", ".join(f"count(*) filter (not isfinite({c.name})) as {c.name}" for c in table.float_columns)
        found = self._run(
            f"select run_id, count(*) as num_rows, {counts} from {table.name} group by all order by 1", {}
        )
        for row in found.iter_rows(named=True):
            if column := next((column for column in table.float_columns if row[column.name]), None):
                remedy = "write null where the value is unknown" if column.nullable else "correct or remove these rows"
                raise InputError(
                    f"run {row['run_id']}: table {table.name}: column {column.name} is NaN or infinite in "
                    f"{row[column.name]} of {row['num_rows']} rows; {remedy}, and write the trace again"
                )
        self._finite.add(table.name)

    def _run(self, text: str, params: dict[str, Any]) -> pl.DataFrame:
        import duckdb
        import polars as pl

        # A CTE can hold an INSERT, which only the read-only transaction rejects.
        self._con.execute("begin transaction read only")
        try:
            return interruptible(self._con, lambda: self._con.sql(text, params=params).pl())
        except duckdb.Error as error:
            # A resumed run deletes the rows that it recorded after its checkpoint.
            if gone := next((path for path in self._files if not Path(path).exists()), None):
                raise InputError(f"{gone}: deleted since the run was opened; open the run again") from None
            raise InputError(_one_line(error)) from None
        except pl.exceptions.PolarsError as error:
            reason = in_one_line(error)
            raise InputError(
                f"sql: the type of a result column is not supported ({reason}); cast the column, as in x::varchar"
            ) from None
        finally:
            self._con.execute("rollback")


def find_run_folders(path: str | Path) -> list[Path]:
    """Return the run that a path names, or the runs in a study folder, or those that a glob matches.

    Raises:
        InputError: there is no run.
    """
    try:
        is_pattern = glob.has_magic(str(path)) and not Path(path).exists()
        places = map(Path, sorted(glob.glob(str(path)))) if is_pattern else [Path(path)]
        found = [folder for place in places for folder in _runs_inside(place)]
    except OSError as error:
        raise InputError(f"{path}: {reason_of(error)}") from None
    if not found:
        raise InputError(f"{path}: {'no such folder' if not Path(path).exists() else f'not a trace (no {MANIFEST})'}")
    return found


def _runs_inside(folder: Path) -> list[Path]:
    if (folder / MANIFEST).is_file():
        return [folder]
    return [path.parent for path in sorted(folder.glob(f"*/{MANIFEST}"))]


def _read_steps(folder: Path, parts: Iterable[Path]) -> list[int]:
    """Return the recorded steps in ascending order.

    Raises:
        InputError: a step is recorded twice, or a file is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        columns = [pq.read_table(path, columns=["step"])["step"].drop_null() for path in parts]
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{folder / 'steps'}: damaged Parquet file ({in_one_line(error)})") from None
    steps = sorted(step for column in columns for step in column.to_pylist())
    if twice := next((step for step, following in pairwise(steps) if step == following), None):
        raise InputError(
            f"{folder / 'steps'}: step {twice} is recorded twice; remove the file that is not part of the run"
        )
    return steps


def _describe_progress(manifest: Mapping[str, Any], steps: Sequence[int], gone: Sequence[str]) -> str | None:
    """Return one line that states what is missing from a run, or None if the run is complete."""
    sampling = TokenSampling.of(manifest)
    sampled = "" if sampling == TokenSampling() else f"tokens are stored for {sampling}"
    # An imported trace may hold only every tenth step, as its trainer saved it.
    gaps = [] if manifest.get("scored") else [(a + 1, b - 1) for a, b in pairwise([0, *steps]) if b - a > 1]
    missing = "; steps " + ", ".join(f"{a} to {b}" if b > a else str(a) for a, b in gaps[:GAPS_SHOWN]) + " are missing"
    total = f" of {manifest['total_steps']}" if manifest.get("total_steps") else ""
    done = f"{len(steps)}{total} steps recorded"
    status = {"running": "being written or interrupted", "failed": f"failed ({manifest.get('error')})"}
    state = status.get(manifest.get("status") or "")
    if not state and not gaps and not gone:
        unknown = manifest.get("unknown")
        unknown = f"{len(unknown)} recorded quantities are unknown; see `unknown` in {MANIFEST}" if unknown else ""
        return "; ".join(filter(None, (unknown, sampled))) or None
    removed = f"removed: {', '.join(gone)}" if gone else ""
    progress = f"{state or manifest.get('status')}, {done}{missing if gaps else ''}"
    return "; ".join(filter(None, (progress, removed, sampled)))


def _connect(manifests: dict[str, dict[str, Any]], files: dict[str, dict[str, int]]) -> duckdb.DuckDBPyConnection:
    import duckdb

    # By default DuckDB spills to the working directory. It creates this folder only when it spills.
    spill = Path(tempfile.gettempdir(), f"entrace-{uuid.uuid4().hex}")
    con = duckdb.connect(
        config={
            "autoload_known_extensions": "false",
            "autoinstall_known_extensions": "false",
            "python_enable_replacements": "false",
            "memory_limit": MEMORY_LIMIT,
            "temp_directory": str(spill),
        }
    )
    weakref.finalize(con, shutil.rmtree, spill, ignore_errors=True)
    # The view of tokens of schema version 1 reads the view of rollouts, which must exist first.
    for name in reversed(TABLES):
        _create_view(con, TABLES[name], files[name])
    computed = {"runs": RUNS_COLUMNS, "stages": STAGES_COLUMNS, "token_coverage": COVERAGE_COLUMNS}
    for name, columns in computed.items():
        con.execute(f"create table {name} ({', '.join(f'{column} {kind}' for column, kind in columns.items())})")
    rows = [
        [_scalar({**manifest, "run_id": run_id}.get(name)) for name in RUNS_COLUMNS]
        for run_id, manifest in manifests.items()
    ]
    con.executemany(f"insert into runs values ({', '.join('?' * len(RUNS_COLUMNS))})", rows)
    interval_functions.register(con)
    for text in queries.staging():
        con.execute(text)
    # DuckDB checks both the pattern itself and each file that it matches.
    paths = dict.fromkeys(form for found in files.values() for path in found for form in (path, _pattern(path)))
    con.execute(f"set allowed_paths = [{', '.join(map(_quote, paths))}]")
    con.execute("set enable_external_access = false")
    con.execute("set lock_configuration = true")
    return con


def _create_view(con: duckdb.DuckDBPyConnection, table: Table, files: dict[str, int]) -> None:
    import duckdb

    if not files:
        con.register("empty", table.arrow_schema.empty_table())
        con.execute(f"create table {table.name} as select * from empty")
        con.unregister("empty")
        return
    sources = [
        _select_version(table, version, [path for path, found in files.items() if found == version])
        for version in sorted(set(files.values()))
    ]
    try:
        con.execute(f"create view {table.name} as {' union all '.join(sources)}")
    except duckdb.Error as error:
        raise InputError(_one_line(error)) from None


def _select_version(table: Table, version: int, files: list[str]) -> str:
    """Return a SELECT of all columns of ``table`` from files of one schema version."""
    paths = ", ".join(_quote(_pattern(path)) for path in files)
    stored = ", ".join(column.name for column in table.columns if column.since <= version)
    source = f"(select {stored} from read_parquet([{paths}]))"
    if version < SCHEMA_VERSION and table.name in DERIVED:
        name, derived = DERIVED[table.name]
        source, stored = derived.format(source=source), f"{stored}, {name}"
    known = stored.split(", ")
    columns = (c.name if c.name in known else f"null::{c.type} as {c.name}" for c in table.columns)
    return f"select {', '.join(columns)} from {source}"


def _parameters(text: str) -> set[str]:
    """Return the names of the ``$parameters`` of one query, or of EXPLAIN of one.

    Raises:
        InputError: the text is not a single query.
        duckdb.Error: the SQL cannot be parsed.
    """
    import duckdb

    if text != well_formed(text):
        raise InputError("sql: the query is not UTF-8")
    if explain := EXPLAIN.match(text):
        text = text[explain.end() :]
    statements = duckdb.extract_statements(text)
    is_select = len(statements) == 1 and statements[0].type == duckdb.StatementType.SELECT
    if not is_select and not _is_pivot(text):
        found = " and ".join(STATEMENT_NAMES.get(s.type.name, s.type.name) for s in statements) or "nothing"
        raise InputError(f"sql is read-only: expected one query, such as SELECT or PIVOT; found {found}")
    return {name for statement in statements for name in statement.named_parameters}


def _is_pivot(text: str) -> bool:
    """Return whether SQL is one query with a PIVOT, which DuckDB expands into several statements.

    EXISTS accepts exactly one query, and no other statement.
    """
    import duckdb

    try:
        duckdb.extract_statements(f"select exists ({FINAL_SEMICOLON.sub('', text)}\n)")
    except duckdb.Error:
        return False
    return True


def _one_line(error: Exception) -> str:
    return f"sql: {' '.join(SQL_POSITION.sub('', str(error)).split())}"


def _pattern(path: str) -> str:
    """Return the glob pattern that matches only this path; DuckDB reads file names as patterns."""
    return GLOB_CHARACTERS.sub(r"[\g<0>]", path)


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _scalar(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float) else str(value)
