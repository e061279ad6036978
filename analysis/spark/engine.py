"""Register the files of traces in a Spark session, and run queries there."""

# pyright: reportMissingImports=false
from __future__ import annotations

import math
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import TYPE_CHECKING, Any

from entrace.analysis.sandbox.connection import BESIDE_TRACE, rows_of_runs, stored_columns, view_queries
from entrace.analysis.sandbox.process import Limits, ReadError, out_of_time
from entrace.analysis.spark import session as spark
from entrace.analysis.statistics import interval_functions
from entrace.analysis.trace.connection import SCHEME
from entrace.analysis.trace.errors import InputError
from entrace.analysis.trace.parts import Layout
from entrace.analysis.trace.places import source_of, to_place
from entrace.analysis.trace.schema import RESPONSE_TOKENS, TABLES, Table

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa
    from pyspark.sql import SparkSession


class SparkEngine:
    """A Spark session with the tables, views, and functions of traces.

    The views are those of sql/staging, and the functions compute intervals.
    """

    def __init__(self, manifests: Mapping[str, Mapping[str, Any]], files: Mapping[str, Mapping[str, Layout]]) -> None:
        """Register the files of traces.

        Args:
            manifests: As for ``sandbox.connection.connect``.
            files: As for ``sandbox.connection.connect``.

        Raises:
            InputError: pyspark, sqlglot, or Java is missing, or Spark cannot open a file.
        """
        try:
            with spark.quiet():
                import pyspark.errors
            import sqlglot  # noqa: F401
        except ModuleNotFoundError as error:
            raise InputError(f"spark: {error.name} is missing; install it with pip install 'entrace[spark]'") from None
        self._rejections = (pyspark.errors.AnalysisException, pyspark.errors.ParseException)
        self._files = files
        self._rows: dict[str, Sequence[tuple[Any, ...]]] = {name: [] for name in BESIDE_TRACE}
        self._rows["runs"] = rows_of_runs(manifests)
        # One per running query.
        self._stops: set[threading.Event] = set()
        self._lock = threading.RLock()
        self._connect()

    def fill(self, name: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """Replace the rows of a table of ``BESIDE_TRACE``."""
        with self._lock:
            self._rows[name] = rows
            self._create_table(self._connected(), name)

    def stop(self) -> None:
        """End all queries."""
        for stop in list(self._stops):
            stop.set()

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
        session = self._connected()

        def answer() -> pa.Table:
            frame = session.sql(translated)
            # A star over a join with USING lists its columns in another order.
            same = sorted(frame.columns) == sorted(like.columns)
            frame = frame.select(*(f"`{name}`" for name in like.columns)) if same else frame.toDF(*like.columns)
            return frame.toArrow()

        try:
            table = self._run(session, answer, limits, on_progress)
        except self._rejections as error:
            raise InputError(f"sql: {spark.reason_of(error)}") from None
        except (PySparkException, Py4JError, OSError) as error:
            if not spark.is_alive(session):
                raise InputError(f"sql: {spark.LOST}") from None
            raise ReadError(f"sql: {spark.reason_of(error)}") from None
        return pl.DataFrame(table).cast(dict(like.schema))  # pyright: ignore[reportArgumentType]

    def _run(
        self,
        session: SparkSession,
        query: Callable[[], pa.Table],
        limits: Limits,
        on_progress: Callable[[float], None] | None,
    ) -> pa.Table:
        """Return the rows of a query that runs in a thread of its own.

        Raises:
            InputError: the query takes too long, or ``stop`` was called.
            Exception: the error that ``query`` raised.
        """
        group = uuid.uuid4().hex
        answer: Future[pa.Table] = Future()

        def run() -> None:
            try:
                session.sparkContext.setJobGroup(group, "entrace", interruptOnCancel=True)
                answer.set_result(query())
            except Exception as error:  # Raised where the answer is awaited.
                answer.set_exception(error)

        deadline = time.monotonic() + (limits.timeout or math.inf)
        stop = threading.Event()
        self._stops.add(stop)
        is_canceled = False
        try:
            # After an interruption, pyspark may wait for rows forever; nothing waits for this thread.
            threading.Thread(target=run, name=spark.THREAD, daemon=True).start()
            while not wait([answer], spark.WAIT_S).done:
                if stop.is_set() or time.monotonic() >= deadline:
                    is_canceled = True
                    note = spark.cancel(session, group)
                    raise InputError(f"sql: stopped{note}") if stop.is_set() else out_of_time(limits, note)
                if on_progress:
                    on_progress(spark.percentage(session, group))
        finally:
            self._stops.discard(stop)
            if not (is_canceled or answer.done()):
                spark.cancel(session, group)
        return answer.result()

    def _connected(self) -> SparkSession:
        """Return the session, or a new one with all tables if its application has ended."""
        with self._lock:
            if not spark.is_alive(self._session):
                self._connect()
            return self._session

    def _connect(self) -> None:
        """Start a session, and register files, tables, views, and functions in it."""
        from entrace.analysis.spark.translation import shared, translate_own, translate_view

        self._tables = {*TABLES, RESPONSE_TOKENS, *BESIDE_TRACE, *shared().views}
        with spark.quiet():
            session = spark.start()
            for name, text in view_queries(self._files, partial(_read, session)):
                _create_view(session, name, translate_own(text))
            for name in BESIDE_TRACE:
                self._create_table(session, name)
            for name in shared().views:
                _create_view(session, name, translate_view(name))
            self._functions = set(_register_functions(session))
        self._session = session

    def _create_table(self, session: SparkSession, name: str) -> None:
        columns = BESIDE_TRACE[name].items()
        schema = ", ".join(f"{column} {kind.replace('varchar', 'string')}" for column, kind in columns)
        session.createDataFrame(list(self._rows[name]), schema).createOrReplaceTempView(name)


def _create_view(session: SparkSession, name: str, text: str) -> None:
    session.sql(f"create or replace temporary view {name} as {text}")


def _read(session: SparkSession, table: Table, layout: Layout, paths: list[str]) -> str:
    """Register the files of one layout, and return the name of their view.

    Files are registered exactly as listed.
    """
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    name = f"_{table.name}_{uuid.uuid4().hex}"
    schema = _spark_schema(stored_columns(table, layout), paths[0])
    reader = session.read.schema(schema).option("recursiveFileLookup", True).option("__globPaths__", False)
    try:
        frame = reader.parquet(*map(_uri, paths))
        found = len(frame.inputFiles())
    except (PySparkException, Py4JError) as error:
        remedy = "; s3:// needs the package hadoop-aws, see docs/spark.md" if SCHEME in paths[0] else ""
        raise InputError(f"{paths[0]}: Spark cannot open it ({spark.reason_of(error)}){remedy}") from None
    if found != len(paths):
        raise InputError(
            f"{table.name}: Spark reads {found} of the {len(paths)} files; it ignores names that begin with _ or ."
        )
    frame.createOrReplaceTempView(name)
    return name


def _register_functions(session: SparkSession) -> Iterator[str]:
    from pyspark.sql.functions import ArrowUDFType, arrow_udf

    estimate = "value double, low double, high double"
    functions: dict[str, tuple[Callable[..., Any], str]] = {
        name: (partial(interval_functions.estimates_of_prompts, bounds=bounds), estimate)
        for name, bounds in interval_functions.BOUNDS.items()
    }
    functions["random_top_share"] = interval_functions.random_top_shares, "double"
    for name, (function, kind) in functions.items():
        session.udf.register(name, arrow_udf(function, kind, ArrowUDFType.SCALAR))
        yield name


def _spark_schema(names: Sequence[str], path: str) -> str:
    """Return the schema of some columns of a file.

    As in DuckDB, the first of several files decides their types.
    """
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
    """Return Hadoop's name of a file.

    Without a scheme, the file would be on the cluster. S3 has a scheme of its own, ``s3a``.
    """
    if SCHEME not in path:
        return f"file:{path}"
    return f"s3a{path.removeprefix('s3')}" if path.startswith(f"s3{SCHEME}") else path
