"""Register the files of traces in a Spark session, and run translated queries there."""

# pyright: reportMissingImports=false
from __future__ import annotations

import os
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrace.analysis.sandbox.connection import BESIDE_TRACE, rows_of_runs, stored_columns, view_queries
from entrace.analysis.sandbox.process import Limits, ReadError, out_of_time
from entrace.analysis.statistics import interval_functions
from entrace.analysis.trace.connection import SCHEME
from entrace.analysis.trace.errors import InputError, in_one_line
from entrace.analysis.trace.parts import Layout
from entrace.analysis.trace.places import source_of, to_place
from entrace.analysis.trace.schema import RESPONSE_TOKENS, TABLES, Table

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa
    from pyspark.sql import DataFrame, SparkSession

# Settings of a session that entrace starts; PYSPARK_SUBMIT_ARGS and an active session go before them.
STARTED: dict[str, Any] = {
    "spark.app.name": "entrace",
    "spark.driver.extraJavaOptions": f"-Dlog4j2.configurationFile={Path(__file__).with_name('log4j2.properties')}",
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
}
# Settings on which the meaning of a query depends, and those that keep it from files and the environment.
MEANING = {
    "spark.sql.ansi.enabled": "true",
    "spark.sql.caseSensitive": "false",
    "spark.sql.enforceReservedKeywords": "false",
    "spark.sql.files.ignoreCorruptFiles": "false",
    "spark.sql.files.ignoreMissingFiles": "false",
    "spark.sql.parser.escapedStringLiterals": "false",
    "spark.sql.runSQLOnFiles": "false",
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.variable.substitute": "false",
}
WAIT_S = 0.5


class SparkEngine:
    """A Spark session with the tables of traces, the views of sql/staging, and the functions of intervals."""

    def __init__(self, manifests: Mapping[str, Mapping[str, Any]], files: Mapping[str, Mapping[str, Layout]]) -> None:
        """Register the files of traces.

        Args:
            manifests: As for ``sandbox.connection.connect``.
            files: As for ``sandbox.connection.connect``.

        Raises:
            InputError: pyspark, sqlglot, or Java is missing, or Spark cannot open a file.
        """
        try:
            import pyspark.errors
            import sqlglot  # noqa: F401
        except ModuleNotFoundError as error:
            raise InputError(f"spark: {error.name} is missing; install it with pip install 'entrace[spark]'") from None
        from entrace.analysis.spark.translation import shared, translate_own, translate_view

        self._rejections = (pyspark.errors.AnalysisException, pyspark.errors.ParseException)
        self._session = _start()
        self._tables = {*TABLES, RESPONSE_TOKENS, *BESIDE_TRACE, *shared().views}
        for name, text in view_queries(files, self._read):
            self._create_view(name, translate_own(text))
        for name in BESIDE_TRACE:
            self.fill(name, rows_of_runs(manifests) if name == "runs" else [])
        for name in shared().views:
            self._create_view(name, translate_view(name))
        self._functions = set(self._register_functions())

    def fill(self, name: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """Replace the rows of a table of ``BESIDE_TRACE``."""
        columns = BESIDE_TRACE[name].items()
        schema = ", ".join(f"{column} {kind.replace('varchar', 'string')}" for column, kind in columns)
        self._session.createDataFrame(list(rows), schema).createOrReplaceTempView(name)

    def stop(self) -> None:
        """End all queries."""
        self._session.interruptAll()

    def answer(
        self,
        text: str,
        params: Mapping[str, Any],
        columns: Callable[[], pl.DataFrame],
        limits: Limits,
        on_progress: Callable[[float], None] | None = None,
    ) -> pl.DataFrame:
        """Return the rows of a query.

        Args:
            text: One query that DuckDB has parsed.
            params: Values of all of its parameters.
            columns: Returns the columns of the answer, with DuckDB's types and without rows.
            limits: Its ``timeout`` holds for this query; Spark's own settings limit memory.
            on_progress: Called twice a second with the percentage of the tasks known so far that are done.

        Raises:
            InputError: the query uses what Spark lacks, Spark rejects it, or it takes too long.
            ReadError: the query failed while it read files or computed.
        """
        import polars as pl
        from py4j.protocol import Py4JError
        from pyspark.errors import PySparkException

        from entrace.analysis.spark.translation import translate

        translated = translate(text, params, self._tables, self._functions)
        like = columns()
        try:
            frame = self._session.sql(translated)
            # A star over a join with USING lists its columns in another order.
            same = sorted(frame.columns) == sorted(like.columns)
            frame = frame.select(*(f"`{name}`" for name in like.columns)) if same else frame.toDF(*like.columns)
            table = self._collect(frame, limits, on_progress)
        except self._rejections as error:
            raise InputError(f"sql: {_reason(error)}") from None
        except (PySparkException, Py4JError) as error:
            raise ReadError(f"sql: {_reason(error)}") from None
        return pl.DataFrame(table).cast(dict(like.schema))  # pyright: ignore[reportArgumentType]

    def _collect(self, frame: DataFrame, limits: Limits, on_progress: Callable[[float], None] | None) -> pa.Table:
        tag = uuid.uuid4().hex

        answer: Future[pa.Table] = Future()

        def run() -> None:
            try:
                self._session.addTag(tag)
                answer.set_result(frame.toArrow())
            except Exception as error:  # Raised where the answer is awaited.
                answer.set_exception(error)

        deadline = time.monotonic() + limits.timeout if limits.timeout else None
        jobs: set[int] = set()
        # After an interruption, pyspark may wait for rows forever; nothing waits for this thread.
        threading.Thread(target=run, daemon=True).start()
        try:
            while not wait([answer], WAIT_S).done:
                if deadline and time.monotonic() >= deadline:
                    raise out_of_time(limits)
                if on_progress:
                    on_progress(self._percentage(jobs))
        finally:
            if not answer.done():
                self._session.interruptTag(tag)
        return answer.result()

    def _percentage(self, jobs: set[int]) -> float:
        """Return the percentage of tasks that are done, over the stages of ``jobs`` and of the active jobs."""
        tracker = self._session.sparkContext.statusTracker()
        jobs.update(tracker.getActiveJobsIds())
        stages = {stage for job in jobs if (info := tracker.getJobInfo(job)) for stage in info.stageIds}
        known = [info for info in map(tracker.getStageInfo, stages) if info]
        return 100 * sum(info.numCompletedTasks for info in known) / max(1, sum(info.numTasks for info in known))

    def _create_view(self, name: str, text: str) -> None:
        self._session.sql(f"create or replace temporary view {name} as {text}")

    def _read(self, table: Table, layout: Layout, paths: list[str]) -> str:
        """Register the files of one layout, exactly as listed, and return the name of their view."""
        from py4j.protocol import Py4JError
        from pyspark.errors import PySparkException

        name = f"_{table.name}_{uuid.uuid4().hex}"
        schema = _spark_schema(stored_columns(table, layout), paths[0])
        reader = self._session.read.schema(schema).option("recursiveFileLookup", True).option("__globPaths__", False)
        try:
            frame = reader.parquet(*map(_uri, paths))
            found = len(frame.inputFiles())
        except (PySparkException, Py4JError) as error:
            remedy = "; s3:// needs the package hadoop-aws, see docs/spark.md" if SCHEME in paths[0] else ""
            raise InputError(f"{paths[0]}: Spark cannot open it ({_reason(error)}){remedy}") from None
        if found != len(paths):
            raise InputError(
                f"{table.name}: Spark reads {found} of the {len(paths)} files; it ignores names that begin with _ or ."
            )
        frame.createOrReplaceTempView(name)
        return name

    def _register_functions(self) -> Iterator[str]:
        from pyspark.sql.functions import ArrowUDFType, arrow_udf

        estimate = "value double, low double, high double"
        functions: dict[str, tuple[Callable[..., Any], str]] = {
            name: (partial(interval_functions.estimates_of_prompts, bounds=bounds), estimate)
            for name, bounds in interval_functions.BOUNDS.items()
        }
        functions["random_top_share"] = interval_functions.random_top_shares, "double"
        for name, (function, kind) in functions.items():
            self._session.udf.register(name, arrow_udf(function, kind, ArrowUDFType.SCALAR))
            yield name


def _start() -> SparkSession:
    """Return a new session of the active application, or of one that is started here.

    Raises:
        InputError: Java is missing, or Spark does not start.
    """
    from pyspark.errors import PySparkException
    from pyspark.sql import SparkSession

    session = SparkSession.getActiveSession()
    if session is None:
        if not (os.environ.get("JAVA_HOME") or shutil.which("java")):
            raise InputError(
                "spark: no Java found; install Java 17 or 21, as in apt-get install openjdk-17-jre-headless, or set "
                "JAVA_HOME"
            )
        try:
            session = SparkSession.builder.config(map=STARTED).getOrCreate()
        except (PySparkException, RuntimeError) as error:
            raise InputError(f"spark: Spark did not start ({_reason(error)}); it needs Java 17 or 21") from None
    context = session.sparkContext
    if str(context.master).startswith("local") and "PYSPARK_PYTHON" not in os.environ:
        context.pythonExec = sys.executable
    session = session.newSession()
    for name, value in MEANING.items():
        session.conf.set(name, value)
    return session


def _spark_schema(names: Sequence[str], path: str) -> str:
    """Return the schema of some columns of a file; as in DuckDB, the first of several decides their types."""
    import pyarrow.parquet as pq

    schema = pq.read_schema(source_of(to_place(path)))
    return ", ".join(f"`{name}` {_spark_type(schema.field(name).type)}" for name in names)


def _spark_type(kind: pa.DataType) -> str:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _spark_type(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return f"array<{_spark_type(kind.value_type)}>"
    if pa.types.is_map(kind):
        return f"map<{_spark_type(kind.key_type)}, {_spark_type(kind.item_type)}>"
    if pa.types.is_integer(kind):
        bits = kind.bit_width * (2 if pa.types.is_unsigned_integer(kind) else 1)
        return {8: "tinyint", 16: "smallint", 32: "int", 64: "bigint"}.get(bits, "decimal(20, 0)")
    if pa.types.is_floating(kind):
        return {32: "float", 64: "double"}[kind.bit_width]
    return "boolean" if pa.types.is_boolean(kind) else "string"


def _uri(path: str) -> str:
    """Return Hadoop's name of a file: without a scheme it would lie on the cluster, and S3 has a scheme of its own."""
    if SCHEME not in path:
        return f"file:{path}"
    return f"s3a{path.removeprefix('s3')}" if path.startswith(f"s3{SCHEME}") else path


def _reason(error: Exception) -> str:
    """Return an error of Spark in one line, without the plan and the stack behind it."""
    return in_one_line(Exception(str(error).partition(" SQLSTATE:")[0].partition("\n\tat ")[0]))
