"""Open traces and run read-only SQL over them; the SQL can reach no other file."""

from __future__ import annotations

import glob
import shutil
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrace.analysis import queries
from entrace.analysis.parameters import parameters, shown, to_plain
from entrace.analysis.queries import BUILT_IN, KEPT, Need, Questions
from entrace.analysis.sandbox.connection import (
    COVERAGE,
    RUNS_COLUMNS,
    STAGES_COLUMNS,
    connect,
    fill,
    narrow,
    spill_folder,
)
from entrace.analysis.sandbox.process import LimitError, Limits, QueryProcess, ReadError
from entrace.analysis.sandbox.statements import columns_of, one_line, query_parameters
from entrace.analysis.sandbox.worker import Query
from entrace.analysis.spark.engine import SparkEngine
from entrace.analysis.terminal.interrupt import Result, interruptible
from entrace.analysis.trace import digests
from entrace.analysis.trace.arguments import checked
from entrace.analysis.trace.errors import InputError, fault_of, in_one_line, nearest, reason_of
from entrace.analysis.trace.manifest import IMPORTED, MANIFEST, read_manifest
from entrace.analysis.trace.parts import (
    Layout,
    check_parts,
    check_whole,
    columns_with_values,
    listed_files,
    listed_name,
    read_steps,
)
from entrace.analysis.trace.places import find, is_remote, reaching, to_place
from entrace.analysis.trace.plain import well_formed
from entrace.analysis.trace.sampling import TokenSampling
from entrace.analysis.trace.schema import TABLES, Table
from entrace.analysis.trace.verify import check_run

if TYPE_CHECKING:
    import duckdb
    import polars as pl

    from entrace.analysis.statistics.stages import StageFit

ENGINES = ("duckdb", "spark")
DEFAULT_BASELINE = "none"
# Columns of the runs and of the trace that hold text.
TEXT_COLUMNS = {name for name, kind in RUNS_COLUMNS.items() if kind == "varchar"} | {
    column.name for table in TABLES.values() for column in table.columns if str(column.type) == "string"
}
# Default of the bytes for DuckDB in this process.
BUFFERS = 1500 << 20
# Missing ranges of steps that the note on a run lists.
GAPS_SHOWN = 3
# Most values of a column that the note on an empty result lists.
VALUES_SHOWN = 5
# A question about at most this share of the runs is answered from their files alone; DuckDB would open all others, too.
# The views of as many groups of runs are kept.
NARROW_SHARE, NARROWED = 0.25, 2
# Most rows of a part of an answer of Spark, which arrives as a whole.
PART_ROWS = 1 << 16


@checked
def open_runs(
    paths: str | Path | Iterable[str | Path],
    *,
    questions: str | Path | None = None,
    verify: bool = False,
    buffers: int = BUFFERS,
    engine: str = "duckdb",
) -> Runs:
    """Open one or more traces for reading, up to their last durable step.

    Args:
        paths: Run folders, study folders (all runs inside are opened), or globs of either.
        questions: Folder with the user's own SQL, figures, and claims; see ``queries``.
        verify: Check every byte of every file first, as ``entrace verify`` does. Without it, damage inside large files
            is not seen.
        buffers: Bytes for DuckDB in this process, which answers the shipped questions; the excess is spilled to disk.
        engine: ``"duckdb"``, or ``"spark"`` to compute every answer on Spark, which the extra ``spark`` installs.

    Returns:
        The runs, including failed runs and runs without data.

    Raises:
        InputError: a path is not a trace, has an unreadable schema version, lacks a column, or holds a damaged file;
            a file in ``questions`` is malformed; or the engine is unknown or cannot start.
    """
    if engine not in ENGINES:
        raise InputError(f'engine: unknown engine "{engine}"{nearest(str(engine), ENGINES)}')
    folders = find_run_folders([paths] if isinstance(paths, str | Path) else paths)
    manifests: dict[str, dict[str, Any]] = {}
    files: dict[str, dict[str, Layout]] = {name: {} for name in TABLES}
    notes: dict[str, str | None] = {}
    for folder in folders:
        with reaching(folder):
            if str(folder) != well_formed(str(folder)):
                raise InputError(f"{folder}: the name is not UTF-8; rename it")
            if verify:
                check_run(folder)
            manifest = {**read_manifest(folder), "path": str(folder)}
            run_id = manifest.get("run_id") or folder.name
            if run_id in manifests:
                taken = manifests[run_id]["path"]
                raise InputError(f'{folder}: run_id "{run_id}" is already used by {taken}; open only one of the two')
            manifests[run_id] = manifest
            recorded = digests.read(folder)
            parts = check_parts(folder, manifest, recorded)
            for name, layouts in parts.items():
                files[name] |= {str(path): layout for path, layout in layouts.items()}
            listed = listed_files(folder, manifest)
            gone = [name for name, found in parts.items() if not found and listed.get(name)]
            steps = _read_steps(folder, parts["steps"], listed.get("steps", {}), recorded)
            progress = _describe_progress(manifest, steps, gone)
            damage = f"{digests.DIGESTS} is damaged; see entrace verify {folder}" if recorded.damage else None
            notes[run_id] = "; ".join(filter(None, [progress, damage]))
    asked = BUILT_IN if questions is None else Questions(Path(questions).resolve())
    spark = SparkEngine(manifests, files) if engine == "spark" else None
    return Runs(manifests, files, notes, asked, buffers, spark)


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
        files: dict[str, dict[str, Layout]],
        notes: dict[str, str | None],
        questions: Questions = BUILT_IN,
        buffers: int = BUFFERS,
        spark: SparkEngine | None = None,
    ) -> None:
        """Connect DuckDB to ``files``, the Parquet files of all runs.

        ``files`` holds the layout of each file, by table and path. With ``spark``, DuckDB only checks queries and names
        the types of their columns.
        """
        self.manifests = manifests
        self.questions = questions
        self.notes = {run_id: note for run_id, note in notes.items() if note}
        self._fits: dict[str, StageFit] | None = None
        self._filled: set[str] = set()
        self._runs_kept: dict[str, set[str]] = {view: set() for view in KEPT}
        self._kept: dict[tuple[str, ...], pl.DataFrame] = {}
        # Runs without NaN and infinity, by table.
        self._finite: dict[str, set[str]] = {name: set() for name in TABLES}
        self._files = files
        self._columns: dict[str, dict[str, set[str]]] = {}
        self._spark = spark
        self._spill = spill_folder()
        # The connection has one transaction at a time.
        self._connected = threading.RLock()
        # The connection that ``stop`` may interrupt.
        self._running: duckdb.DuckDBPyConnection | None = None
        self._stopping = threading.Lock()
        self._con = connect(manifests, files, buffers, self._spill)
        self._narrowed: dict[frozenset[str], duckdb.DuckDBPyConnection] = {}
        for view in KEPT:
            self._con.execute(f"alter view {view} rename to new_{view}")
            self._con.execute(f"create table {view} as from new_{view} limit 0")
        weakref.finalize(self._con, shutil.rmtree, self._spill, ignore_errors=True)
        # At most one process that has answered a query and waits for the next.
        self._idle: list[QueryProcess] = []
        self._processes: weakref.WeakSet[QueryProcess] = weakref.WeakSet()

    def __repr__(self) -> str:
        return f"Runs({', '.join(self.manifests)})"

    @checked
    def sql(
        self,
        text: str,
        params: Mapping[str, Any] | None = None,
        *,
        memory: str | float | None = None,
        timeout: float | None = None,
    ) -> pl.DataFrame:
        """Run one read-only query over the traces in a separate process.

        The process has limits of memory and time.

        The query is a SELECT, PIVOT, DESCRIBE, SUMMARIZE, or similar statement, or EXPLAIN of one. It can read the
        tables of the trace (``entrace tables``), the tables ``runs`` and ``stages``, and the views of sql/staging.

        Args:
            text: DuckDB SQL.
            params: Values of the ``$name`` parameters; an omitted one is null, which shipped queries read as "all". If
                the text begins with the header ``-- params:``, values must be of the kinds that it names.
            memory: Most memory for the query, and for its rows, such as ``"500MB"`` (default 2GiB).
            timeout: Most seconds of computing (default 600; 0 for no limit).

        Raises:
            InputError: the text is not a single query, a parameter or its value is unknown, DuckDB rejects the query,
                or a limit is reached.
        """
        return self._collect(self._to_query(text, self._check(text, params or {})), Limits.parse(memory, timeout))

    @checked
    def stream(
        self,
        text: str,
        params: Mapping[str, Any] | None = None,
        *,
        memory: str | float | None = None,
        timeout: float | None = None,
        on_progress: Callable[[float], None] | None = None,
        reader: int | None = None,
    ) -> Iterator[pl.DataFrame]:
        """Run a query like ``sql``, and return its rows in parts, as they arrive.

        Args:
            text: As for ``sql``.
            params: As for ``sql``.
            memory: As for ``sql``; rows that were returned do not count.
            timeout: As for ``sql``; only time spent waiting for rows counts.
            on_progress: Called with the percentage done, as DuckDB estimates it, about twice a second.
            reader: Descriptor to which the caller writes; the query ends if it is a pipe that nobody reads.

        Returns:
            Parts with equal columns, of some megabytes each; the first one has no rows.

        Raises:
            InputError: as for ``sql``.
        """
        limits = Limits.parse(memory, timeout)
        return self._send(self._to_query(text, self._check(text, params or {})), limits, on_progress, reader)

    @checked
    def query(self, stem: str, **params: Any) -> pl.DataFrame:
        """Ask a question, such as ``query("entropy_by_position", stage="plateau")``.

        ``questions[stem]`` describes the parameters. If no rows are left, a warning says why; see ``why_no_rows``.

        Raises:
            InputError: the question, a parameter, or its value is unknown.
        """
        frame = self.ask(stem, **self._check(self.questions.read(stem), params))
        if frame.is_empty():
            # Two frames up: the call of the user, beyond the check of its arguments.
            warnings.warn(self.why_no_rows(stem, params), stacklevel=3)
        return frame

    def ask(self, stem: str, **params: Any) -> pl.DataFrame:
        """Return the rows of a question without the checks and warning of ``query``.

        The values of its parameters must come from the traces.
        """
        text = self.questions.read(stem)
        if "runs" in self.questions.parameter_names(stem) and (lacking := self.lacking(stem)):
            asked = params.get("runs")
            params["runs"] = [run for run in (self.manifests if asked is None else asked) if run not in lacking]
        if stem not in self.questions.own:
            if "runs" in params and self._among(params["runs"]) == self.manifests.keys():
                # DuckDB would compare the run of every row with the list.
                params["runs"] = None
            return self.run_shipped(text, params)
        with self.questions.named(stem):
            return self._collect(self._to_query(text, params), Limits())

    def columns(self, stem: str) -> pl.Schema:
        """Return names and types of a question's columns, without computing rows.

        Raises:
            InputError: no such question, or DuckDB rejects its SQL.
        """
        with self.questions.named(stem):
            text = columns_of(self.questions.read(stem))
            [frame] = self._send_to_process(Query(text, _complete(text, {}), {}), Limits())
            return frame.schema

    def run_shipped(self, text: str, params: Mapping[str, Any] | None = None) -> pl.DataFrame:
        """Run SQL of this package in this process, which saves starting another one.

        Raises:
            InputError: a parameter is unknown, or a file cannot be read.
        """
        given = _complete(text, params or {})
        self._check_tables(text, given.get("runs"))
        self._fill_computed(text)
        with self._connected:
            for view in [] if self._spark else queries.kept_views_in(text):
                self._keep(view, self._among(given.get("runs")))
            return self._run(text, given)

    def read(
        self,
        text: str,
        params: Mapping[str, Any] | None = None,
        *,
        memory: str | float | None = None,
        timeout: float | None = None,
    ) -> pl.DataFrame:
        """Run a query like ``sql``, without scanning its tables for NaN.

        Pages with single rows use this method.

        Raises:
            InputError: as for ``sql``.
        """
        return self._collect(self._with_computed(text, _complete(text, params or {})), Limits.parse(memory, timeout))

    def stop(self) -> None:
        """End all queries that other threads wait for."""
        for process in list(self._processes):
            process.close()
        with self._stopping:
            if self._running:
                self._running.interrupt()
        if self._spark:
            self._spark.stop()

    @checked
    def view(self, height: int = 800) -> Any:
        """Return ``entrace view`` as a notebook frame, ``height`` pixels high.

        Raises:
            InputError: the extra ``view`` is missing.
        """
        # The viewer imports this module.
        return import_module("entrace.analysis.viewer.notebook").show(self, height)

    @checked
    def why_no_rows(self, stem: str, params: Mapping[str, Any]) -> str:
        """Return one line that says why a question has no rows.

        The line names the conditions that removed all rows, or the data that the traces lack. A condition is
        responsible if the question has rows without it.
        """
        conditions = {name: value for name, value in params.items() if value is not None}
        text = self.questions.read(stem)
        total = self.ask(stem).height
        if not conditions or not total:
            return f"{stem}: no rows: {self.why_empty(stem)}"
        described = parameters(queries.headers(text)["params"])
        named = {name: f"{name}={shown(to_plain(value))}" for name, value in conditions.items()}
        checked = self._check(text, conditions)
        without: dict[str, str] = {}
        for name in conditions:
            rows = self.ask(stem, **{other: value for other, value in checked.items() if other != name})
            if rows.height:
                column = described[name].column if name in described else name
                without[name] = f"{rows.height:,} rows{_describe_values(rows, column)}"
        if len(without) == 1:
            [(name, rows)] = without.items()
            return f"{stem}: no rows: {named[name]} removed all {rows}"
        parts = [f"; without {named[name]} there are {rows}" for name, rows in without.items()]
        together = " and ".join(named[name] for name in without or named)
        return f"{stem}: no rows: {together} together removed all {total:,} rows" + "".join(parts)

    def query_once(self, stem: str, run_ids: Sequence[str]) -> pl.DataFrame:
        """Run a shipped query over some runs and cache its rows.

        Several parts of a claim share these rows.
        """
        key = (stem, *run_ids)
        if key not in self._kept:
            self._kept[key] = self.ask(stem, runs=list(run_ids))
        return self._kept[key]

    def why_empty(self, stem: str) -> str:
        """Return why a question has no rows.

        Either the traces lack data that the question needs, or no data match it.
        """
        needs = self.questions.needs(stem)
        if need := next((need for need in needs if not self._holders(need)), None):
            reasons = {self._why_lacking(run, need) for run in self.manifests}
            return reasons.pop() if len(reasons) == 1 else need.remedy
        return f"the traces hold {self.questions[stem].needs}, but none that match this question"

    def lacking(self, stem: str) -> dict[str, str]:
        """Return the runs that a question leaves out, with reasons.

        A run is left out if no row has a value of a column that the question needs. A run without rows is not left out,
        because it changes no answer.
        """
        return {
            run: self._why_lacking(run, need)
            for need in reversed(self.questions.needs(stem))
            for run, columns in self._recorded(need.table).items()
            if need.value and need.value not in columns
        }

    def _why_lacking(self, run: str, need: Need) -> str:
        reason = (self.manifests[run].get("unknown") or {}).get(need.place)
        if reason is None:
            return need.remedy
        return f"{need.place} is unknown: {reason}" if need.column else reason

    def _holders(self, need: Need) -> set[str]:
        """Return the runs that hold what a question needs."""
        return {run for run, columns in self._recorded(need.table).items() if (need.value or "run_id") in columns}

    def _recorded(self, table: str) -> dict[str, set[str]]:
        """Return the columns of a table that have values, by run.

        Required columns that the manifest lists in ``unknown`` are left out: their values mean nothing.
        """
        if table not in self._columns:
            folders = {manifest["path"]: run for run, manifest in self.manifests.items()}
            found: dict[str, set[str]] = {}
            for path in map(to_place, self._files[table]):
                found.setdefault(folders[str(path.parents[1])], set()).update(columns_with_values(path))
            for run, columns in found.items():
                unknown = self.manifests[run].get("unknown") or {}
                columns -= {c.name for c in TABLES[table].columns if not c.nullable and f"{table}.{c.name}" in unknown}
            self._columns[table] = found
        return self._columns[table]

    @cached_property
    def token_coverage(self) -> pl.DataFrame:
        """Count the responses of each run and step, and those with stored tokens."""
        return self._run(COVERAGE, {})

    def token_share(self, stem: str, run_ids: Sequence[str] | None = None) -> str:
        """Return in words of which share of the responses a question reads tokens.

        Args:
            stem: Name of the question.
            run_ids: Runs that it reads (default: all).

        Returns:
            Empty if the question reads no tokens, or if the tokens of all responses, or of none, are stored.
        """
        if not any(need.table == "tokens" for need in self.questions.needs(stem)):
            return ""
        frame = self.token_coverage
        frame = frame if run_ids is None else frame.filter(frame["run_id"].is_in(list(run_ids)))
        stored, recorded = int(frame["num_with_tokens"].sum()), int(frame["num_responses"].sum())
        if stored in (0, recorded):
            return ""
        share, steps = f"{100 * stored / recorded:.2g}%", int((frame["num_with_tokens"] > 0).sum())
        return f"tokens of {share} of the responses are stored, on {steps:,} of {len(frame):,} steps"

    @property
    def stage_fits(self) -> dict[str, StageFit]:
        """Return the two-stage fit of every run with steps; see ``statistics.stages``."""
        if self._fits is None:
            import polars as pl

            from entrace.analysis.statistics.stages import fit_stages

            series = ("entropy_token_mean", "accuracy")
            steps = self._select(f"select run_id, step, {', '.join(series)} from steps order by run_id, step", {})
            fits: dict[str, StageFit] = {}
            for (run_id,), part in steps.group_by("run_id", maintain_order=True):
                known = part.drop_nulls([name for name in series if part[name].count()])
                if len(known) and any(part[name].count() for name in series):
                    entropy, accuracy = (known[name].cast(pl.Float64).to_numpy() for name in series)
                    fits[str(run_id)] = fit_stages(known["step"].to_numpy(), entropy, accuracy)
            self._fits = fits
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

    def _values_of(self, column: str) -> list[Any] | None:
        """Return the distinct values of a column; None if no table has the column."""
        homes = {"runs": RUNS_COLUMNS, **{name: table.arrow_schema.names for name, table in TABLES.items()}}
        table = next((name for name, columns in homes.items() if column in columns), None)
        if table is None:
            return None
        found = self._select(f"select distinct {column} from {table} where {column} is not null", {})
        return found[column].to_list()

    def _compute(self, name: str) -> list[tuple[Any, ...]]:
        """Return the rows of a table of ``queries.COMPUTED``."""
        if name == "token_coverage":
            return self.token_coverage.rows()
        return [
            (run_id, *[segment.get(column) for column in list(STAGES_COLUMNS)[1:]])
            for run_id, fit in self.stage_fits.items()
            for segment in fit.segments()
        ]

    def _keep(self, view: str, run_ids: Iterable[str]) -> None:
        """Keep the rows of a view of ``KEPT`` for some runs.

        The rows cannot change, as only files listed at opening are read.
        """
        if missing := [run for run in run_ids if run not in self._runs_kept[view]]:
            text = f"insert into {view} from new_{view} where list_contains($runs, run_id)"
            with self._transaction(text, {"runs": missing}, "") as con:
                # Ctrl-C right after an earlier commit left the rows that it committed.
                con.execute(f"delete from {view} where list_contains($runs, run_id)", {"runs": missing})
                self._compute_on(con, lambda: con.execute(text, {"runs": missing}))
            self._runs_kept[view].update(missing)

    def _fill_computed(self, text: str) -> None:
        """Fill the tables of ``queries.COMPUTED`` that a query reads first."""
        # What is computed asks the connection itself, so a thread that holds it must not wait for another to compute.
        computed = {name: self._compute(name) for name in queries.computed_tables_in(text) - self._filled}
        with self._connected:
            for name in computed.keys() - self._filled:
                with self._transaction(text, {}, "") as con:
                    fill(con, name, computed[name])
                if self._spark:
                    self._spark.fill(name, computed[name])
                self._filled.add(name)

    def _select(self, text: str, params: dict[str, Any]) -> pl.DataFrame:
        self._check_tables(text)
        return self._run(text, params)

    def _check_tables(self, text: str, run_ids: Iterable[str] | None = None) -> None:
        for name in queries.tables_in(text):
            self._check_finite(TABLES[name], run_ids)

    def _check_finite(self, table: Table, run_ids: Iterable[str] | None = None) -> None:
        """Reject a table with NaN or infinity, which would spread through every mean.

        The rows of each run (default: of all) are scanned once, before the first query that reads them. The scan takes
        50 ms per million tokens, about as long as one question, so queries over steps alone do not scan the tokens.

        Raises:
            InputError: a float column holds NaN or infinity.
        """
        unchecked = self._among(run_ids) - self._finite[table.name]
        if not table.float_columns or not unchecked:
            return
        counts = ", ".join(f"count(*) filter (not isfinite({c.name})) as {c.name}" for c in table.float_columns)
        found = self._run(
            f"select run_id, count(*) as num_rows, {counts} from {table.name} "
            "where $runs is null or list_contains($runs, run_id) group by all order by 1",
            {"runs": None if len(unchecked) == len(self.manifests) else sorted(unchecked)},
        )
        for row in found.iter_rows(named=True):
            if column := next((column for column in table.float_columns if row[column.name]), None):
                # Damage looks like this as well, and has another remedy.
                self._check_content(table)
                remedy = "write null where the value is unknown" if column.nullable else "correct or remove these rows"
                raise InputError(
                    f"run {row['run_id']}: table {table.name}: column {column.name} is NaN or infinite in "
                    f"{row[column.name]} of {row['num_rows']} rows; {remedy}, and write the trace again"
                )
        self._finite[table.name] |= unchecked

    def _among(self, run_ids: Iterable[str] | None) -> frozenset[str]:
        """Return the runs with these ids; all runs without a choice."""
        return frozenset(self.manifests if run_ids is None else self.manifests.keys() & set(run_ids))

    def _to_query(self, text: str, given: Mapping[str, Any]) -> Query:
        return self._with_computed(text, self._prepare(text, given))

    def _with_computed(self, text: str, params: dict[str, Any]) -> Query:
        """Return a query for another process, which has none of the computed tables."""
        return Query(text, params, {name: self._compute(name) for name in queries.computed_tables_in(text)})

    def _prepare(self, text: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Check a query and the tables that it reads, and return all of its parameters.

        Raises:
            InputError: as for ``sql``.
        """
        params = _complete(text, given)
        self._check_tables(text)
        return params

    def _check(self, text: str, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return parameters with values of the kinds that the query's headers name."""
        described = parameters(queries.headers(text).get("params", ""))
        return {
            name: described[name].check(value, self._values_of) if name in described else to_plain(value)
            for name, value in params.items()
        }

    def _collect(self, query: Query, limits: Limits) -> pl.DataFrame:
        import polars as pl

        frames, size = [], 0
        for frame in self._send(query, limits):
            frames.append(frame)
            size += frame.estimated_size()
            if size > limits.memory:
                raise LimitError(
                    f"the result needs more than {limits.memory_text} of memory",
                    "aggregate, add a LIMIT, raise memory=, or read it in parts with runs.stream",
                )
        return pl.concat(frames)

    def _send(
        self,
        query: Query,
        limits: Limits,
        on_progress: Callable[[float], None] | None = None,
        reader: int | None = None,
    ) -> Iterator[pl.DataFrame]:
        """Yield the rows of a query as Spark or the query process returns them."""
        if not self._spark:
            yield from self._send_to_process(query, limits, on_progress, reader)
            return
        self._fill_computed(query.text)

        def columns() -> pl.DataFrame:
            [frame] = self._send_to_process(Query(columns_of(query.text), query.params, {}), limits)
            return frame

        frame = self._ask_spark(query.text, query.params, columns, limits, on_progress)
        yield frame.clear()
        yield from frame.iter_slices(PART_ROWS)

    def _send_to_process(
        self,
        query: Query,
        limits: Limits,
        on_progress: Callable[[float], None] | None = None,
        reader: int | None = None,
    ) -> Iterator[pl.DataFrame]:
        import polars as pl

        # Several answers may be read at once, possibly by several threads; each needs its own process.
        try:
            process = self._idle.pop()
        except IndexError:
            process = None
        if process is None or process.memory != limits.memory or not process.is_alive:
            process = QueryProcess(self.manifests, self._files, limits)
            self._processes.add(process)
        try:
            for part in process.ask(query, limits, on_progress, reader):
                yield pl.DataFrame(part)
        except ReadError as error:
            self._explain(Exception(str(error)), query.text)
            raise
        except pl.exceptions.PolarsError as error:
            raise _unsupported(error) from None
        finally:
            if process.is_alive and not self._idle:
                self._idle.append(process)

    def _run(self, text: str, params: dict[str, Any]) -> pl.DataFrame:
        """Run a query of our own in this process, or on Spark."""
        if not self._spark:
            return self._run_here(text, params)
        return self._ask_spark(text, params, lambda: self._run_here(columns_of(text), params), Limits(timeout=0))

    def _ask_spark(
        self,
        text: str,
        params: Mapping[str, Any],
        columns: Callable[[], pl.DataFrame],
        limits: Limits,
        on_progress: Callable[[float], None] | None = None,
    ) -> pl.DataFrame:
        assert self._spark
        try:
            return self._spark.answer(text, params, columns, limits, on_progress)
        except ReadError as error:
            self._explain(Exception(str(error)), text)
            raise

    def _run_here(self, text: str, params: Mapping[str, Any]) -> pl.DataFrame:
        import polars as pl

        with self._transaction(text, params, "read only") as con:
            try:
                return self._compute_on(con, lambda: con.sql(text, params=params).pl())
            except pl.exceptions.PolarsError as error:
                raise _unsupported(error) from None

    def _compute_on(self, con: duckdb.DuckDBPyConnection, query: Callable[[], Result]) -> Result:
        """Return the result of a query; Ctrl-C and ``stop`` can end it.

        They end nothing else: an interrupted COMMIT or ROLLBACK would leave its transaction open.
        """
        with self._stopping:
            self._running = con
        try:
            return interruptible(con, query)
        finally:
            with self._stopping:
                self._running = None

    @contextmanager
    def _transaction(self, text: str, params: Mapping[str, Any], kind: str) -> Iterator[duckdb.DuckDBPyConnection]:
        """Yield a connection in a transaction for one query.

        Args:
            text: The query.
            params: Its parameters, of which ``runs`` chooses the connection.
            kind: ``read only``, or empty.

        Raises:
            InputError: DuckDB rejects the query, or a file cannot be read.
        """
        import duckdb

        with self._connected:
            con = self._connection_for(params.get("runs"))
            try:
                _begin(con, kind)
                yield con
                con.execute("commit")
            except BaseException as error:
                # Ctrl-C may arrive before BEGIN and after COMMIT.
                with suppress(duckdb.TransactionException):
                    con.execute("rollback")
                if not isinstance(error, duckdb.Error):
                    raise
                # The parser and the binder reject a query before it reads a file.
                if not isinstance(error, duckdb.ParserException | duckdb.BinderException | duckdb.CatalogException):
                    self._explain(error, text)
                raise InputError(one_line(error)) from None

    def _connection_for(self, run_ids: Iterable[str] | None) -> duckdb.DuckDBPyConnection:
        """Return the connection that reads the fewest files for a query.

        The query names its runs in the parameter ``runs``.
        """
        chosen = self._among(run_ids)
        if not chosen or len(chosen) > NARROW_SHARE * len(self.manifests):
            return self._con
        if chosen not in self._narrowed:
            if len(self._narrowed) == NARROWED:
                self._narrowed.pop(next(iter(self._narrowed))).close()
            folders = {self.manifests[run]["path"] for run in chosen}
            self._narrowed[chosen] = narrow(
                self._con,
                {
                    table: {path: layout for path, layout in found.items() if str(to_place(path).parents[1]) in folders}
                    for table, found in self._files.items()
                },
            )
        return self._narrowed[chosen]

    def _explain(self, error: Exception, text: str) -> None:
        """Raise the cause of a failed query if a file or the disk is at fault.

        The error of DuckDB names neither.

        Raises:
            InputError: a file that the query reads is damaged, or was deleted.
            OSError: the disk is full, or a similar fault occurred.
        """
        files = [path for paths in self._files.values() for path in paths]
        # A resumed run deletes the rows that it recorded after its checkpoint.
        if gone := next((path for path in files if not to_place(path).exists()), None):
            raise InputError(f"{gone}: deleted since the run was opened; open the run again") from None
        if fault := fault_of(error):
            place = next((path for path in files if path in str(error)), str(self._spill))
            raise OSError(fault.errno, fault.strerror, place) from None
        for name in queries.tables_in(text):
            self._check_content(TABLES[name])

    def _check_content(self, table: Table) -> None:
        """Check every byte of the files of a table.

        Raises:
            InputError: a file is damaged.
        """
        paths = list(map(to_place, self._files[table.name]))
        recorded = {folder: digests.read(folder) for folder in {path.parents[1] for path in paths}}
        for path in paths:
            check_whole(path, table, known=recorded[path.parents[1]].of(f"{table.name}/{listed_name(path)}"))


def _complete(text: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all parameters of one query, null unless given.

    Raises:
        InputError: the text is not a single query, cannot be parsed, or lacks a parameter that is given.
    """
    names = query_parameters(text)
    for name in given:
        if name not in names:
            hint = nearest(name, names) if names else "; this query has none"
            raise InputError(f'unknown parameter "{name}"{hint}')
    return dict.fromkeys(names) | dict(given)


def _begin(con: duckdb.DuckDBPyConnection, kind: str) -> None:
    """Begin a transaction, and end one that Ctrl-C left open."""
    import duckdb

    try:
        con.execute(f"begin transaction {kind}")
    except duckdb.TransactionException:
        con.execute("rollback")
        con.execute(f"begin transaction {kind}")


def _unsupported(error: Exception) -> InputError:
    reason = in_one_line(error)
    return InputError(
        f"sql: the type of a result column is not supported ({reason}); cast the column, as in x::varchar"
    )


def find_run_folders(paths: Iterable[str | Path]) -> list[Path]:
    """Return the run folders among ``paths``, each once.

    A path is a run folder, a study folder, or a glob of either.

    Raises:
        InputError: a path is not a trace, or no path is given.
    """
    folders = dict.fromkeys(folder.resolve() for path in paths for folder in _find_run_folders(path))
    if not folders:
        raise InputError("no run given; name at least one run folder or study folder")
    return list(folders)


def is_run(path: str | Path) -> bool:
    """Return whether a path names runs or nothing at all, rather than other files."""
    try:
        return bool(_find_run_folders(path))
    except InputError:
        return not to_place(path).exists()


def _find_run_folders(path: str | Path) -> list[Path]:
    with reaching(path):
        place = to_place(path)
        try:
            exists = place.exists()
            if exists or not glob.has_magic(str(path)):
                places = [place]
            else:
                places = find(str(path)) if is_remote(place) else map(Path, sorted(glob.glob(str(path))))
            found = [folder for place in places for folder in _runs_inside(place)]
        except OSError as error:
            if is_remote(place):
                raise
            raise InputError(f"{path}: {reason_of(error)}") from None
    if not found:
        raise InputError(f"{path}: {f'not a trace (no {MANIFEST})' if exists else 'no such folder'}")
    return found


def _runs_inside(folder: Path) -> list[Path]:
    if (folder / MANIFEST).is_file():
        return [folder]
    return [path.parent for path in sorted(folder.glob(f"*/{MANIFEST}"))]


def _read_steps(
    folder: Path, parts: Iterable[Path], rows: Mapping[str, int | None], recorded: digests.Recorded
) -> list[int]:
    """Return the recorded steps in ascending order.

    Raises:
        InputError: a step is recorded twice, or a file is damaged.
    """
    names = {path: listed_name(path) for path in parts}
    steps = sorted(
        step for path, name in names.items() for step in read_steps(path, rows.get(name), recorded.of(f"steps/{name}"))
    )
    if twice := next((step for step, following in pairwise(steps) if step == following), None):
        raise InputError(
            f"{folder / 'steps'}: step {twice} is recorded twice; remove the file that is not part of the run"
        )
    return steps


def _describe_progress(manifest: Mapping[str, Any], steps: Sequence[int], gone: Sequence[str]) -> str | None:
    """Return one line that states what a run lacks, or None if it is complete."""
    sampling = TokenSampling.of(manifest)
    sampled = "" if sampling == TokenSampling() else f"tokens are stored for {sampling}"
    # An imported trace may hold only every tenth step, as its trainer saved it.
    gaps = [] if manifest.get(IMPORTED) else [(a + 1, b - 1) for a, b in pairwise([0, *steps]) if b - a > 1]
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


def _describe_values(rows: pl.DataFrame, column: str) -> str:
    """Return ``, whose stage is "rising"`` for the values of a column.

    The text is empty if there are many values or none.
    """
    values = rows[column].drop_nulls().unique().sort().to_list() if column in rows.columns else []
    return f", whose {column} is {' or '.join(map(shown, values))}" if 0 < len(values) <= VALUES_SHOWN else ""
