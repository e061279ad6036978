"""Start Spark, cancel the jobs of a query, and end a Spark with stuck tasks.

Spark cannot interrupt every task.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrace.analysis.trace.errors import InputError, in_one_line

if TYPE_CHECKING:
    from pyspark import SparkContext
    from pyspark.sql import SparkSession

# Without memory, a JVM may neither work nor end.
JAVA_OPTIONS = (
    "-XX:+ExitOnOutOfMemoryError",
    "-XX:+DisplayVMOutputToStderr",
    f'"-Dlog4j2.configurationFile={Path(__file__).with_name("log4j2.properties")}"',
)
# Settings of a session that entrace starts; PYSPARK_SUBMIT_ARGS and an active session go before them.
STARTED: dict[str, Any] = {
    "spark.app.name": "entrace",
    "spark.driver.extraJavaOptions": " ".join(JAVA_OPTIONS),
    # On a cluster, an executor whose tasks cannot be interrupted is ended before the grace of a query is over.
    "spark.task.reaper.enabled": "true",
    "spark.task.reaper.killTimeout": "2s",
    "spark.task.reaper.pollingInterval": "500ms",
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
    "spark.sql.legacy.ctePrecedencePolicy": "CORRECTED",
    "spark.sql.parser.escapedStringLiterals": "false",
    "spark.sql.runSQLOnFiles": "false",
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.variable.substitute": "false",
}
# Seconds between two looks at the tasks of a query.
WAIT_S = 0.5
# Seconds in which canceled tasks must end, and after which a JVM that was asked to end is killed.
GRACE_S = 3.0
# Added to the error of a stopped query whose tasks did not end.
ENDED = ", together with Spark, which could not interrupt it; the next query starts Spark again"
CONTINUES = ", but Spark cannot interrupt it: its tasks continue in the active application, and occupy its cores"
# The error of a query whose application has ended.
LOST = (
    "Spark ended during the query, possibly for lack of memory (raise --driver-memory in PYSPARK_SUBMIT_ARGS); "
    "the next query starts Spark again"
)
# Name of the threads in which queries run.
THREAD = "entrace-spark"
# Loggers to which pyspark also writes what it raises, as JSON of thousands of characters.
LOGGERS = ("SQLQueryContextLogger", "DataFrameQueryContextLogger")

# Starting and ending Spark changes globals of pyspark.
_lock = threading.RLock()
# The application that entrace started, if any.
_started: SparkContext | None = None


@contextmanager
def quiet() -> Iterator[None]:
    """Hide pyspark's warnings to programmers, such as on the version of pandas."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"pyspark\b")
        yield


def start() -> SparkSession:
    """Return a new session of the active application, or of one that is started here.

    Raises:
        InputError: Java is missing, or Spark does not start.
    """
    global _started
    from pyspark import SparkContext
    from pyspark.errors import PySparkException
    from pyspark.logger import PySparkLogger
    from pyspark.sql import SparkSession

    for name in LOGGERS:
        PySparkLogger.getLogger(name).addFilter(_is_of_others)
    with _lock:
        active = SparkContext._active_spark_context
        if active is not None and not _is_alive(active):
            if not _end(active):
                _forget(active)
            active = None
        if active is None and not (os.environ.get("JAVA_HOME") or shutil.which("java")):
            raise InputError(
                "spark: no Java found; install Java 17 or 21, as in apt-get install openjdk-17-jre-headless, or set "
                "JAVA_HOME"
            )
        try:
            with _kept_handler():
                session = SparkSession.builder.config(map={} if active else STARTED).getOrCreate()
        except (PySparkException, RuntimeError) as error:
            raise InputError(f"spark: Spark did not start ({reason_of(error)}); it needs Java 17 or 21") from None
        context = session.sparkContext
        if active is None:
            _started = context
        if str(context.master).startswith("local") and "PYSPARK_PYTHON" not in os.environ:
            context.pythonExec = sys.executable
        session = session.newSession()
        for name, value in MEANING.items():
            session.conf.set(name, value)
        return session


def is_alive(session: SparkSession) -> bool:
    """Return whether the application of a session can answer queries."""
    return _is_alive(session.sparkContext)


def cancel(session: SparkSession, group: str) -> str:
    """Cancel the jobs of a group.

    If their tasks do not end in ``GRACE_S``, end an application that was started here. Spark interrupts the thread of a
    task, which most tasks notice between two rows of their input. A task that computes for long on one row, such as a
    cross join, does not, and would occupy a core.

    Args:
        session: Session in which the jobs run.
        group: Group of the jobs; later jobs of this group are canceled as well.

    Returns:
        Text to add to the error of the query; empty if its tasks have ended.
    """
    from py4j.protocol import Py4JError

    context = session.sparkContext
    try:
        # pyspark's cancelJobGroup does not reach the jobs that a query has yet to submit.
        context._jsc.sc().cancelJobGroupAndFutureJobs(group)  # pyright: ignore[reportOptionalMemberAccess]
        deadline = time.monotonic() + GRACE_S
        # Spark's status lags behind by some 0.1 s.
        time.sleep(WAIT_S)
        while _num_active_tasks(context, group):
            if time.monotonic() >= deadline:
                return ENDED if _end(context) else CONTINUES
            time.sleep(WAIT_S)
    except (Py4JError, OSError, AttributeError):
        # Another thread has ended the application.
        if is_alive(session):
            raise
    return ""


def percentage(session: SparkSession, group: str) -> float:
    """Return the percentage of tasks that are done, of the jobs of a group.

    Only the stages known so far count.
    """
    stages = list(_stages(session.sparkContext, group))
    return 100 * sum(stage.numCompletedTasks for stage in stages) / max(1, sum(stage.numTasks for stage in stages))


def reason_of(error: Exception) -> str:
    """Return an error of Spark in one line.

    The plan, the stack, and settings are left out.
    """
    said = str(error)
    # pyspark converts what Spark raises, unless Spark wraps it.
    cause = getattr(error, "java_exception", None)
    while cause is not None:
        said = cause.getMessage() or said
        cause = cause.getCause()
    for end in (" SQLSTATE:", "\n\tat ", ' If necessary set "spark.'):
        said = said.partition(end)[0]
    return in_one_line(Exception(said))


def _is_of_others(record: logging.LogRecord) -> bool:
    return record.threadName != THREAD


def _num_active_tasks(context: SparkContext, group: str) -> int:
    return sum(stage.numActiveTasks for stage in _stages(context, group))


def _stages(context: SparkContext, group: str) -> Iterator[Any]:
    tracker = context.statusTracker()
    jobs = filter(None, map(tracker.getJobInfo, tracker.getJobIdsForGroup(group)))
    for stage in {stage for job in jobs for stage in job.stageIds}:
        if info := tracker.getStageInfo(stage):
            yield info


def _is_alive(context: SparkContext) -> bool:
    from py4j.protocol import Py4JError

    try:
        return context._jsc is not None and not context._jsc.sc().isStopped()
    except (Py4JError, OSError, AttributeError):
        return False


def _end(context: SparkContext) -> bool:
    """End the JVM, with all tasks, of an application that was started here.

    Return False for any other application. Stopping the application alone would leave its tasks running in the JVM.
    """
    from pyspark import SparkContext

    with _lock:
        jvm = getattr(SparkContext._gateway, "proc", None)
        if context is not _started or jvm is None:
            return False
        # It would report that the JVM has ended.
        context._accumulatorServer.handle_error = lambda *_: None  # pyright: ignore
        # Asked to end, a JVM removes its temporary files.
        jvm.terminate()
        try:
            jvm.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            jvm.kill()
            jvm.wait()
        _forget(context)
        return True


def _forget(context: SparkContext) -> None:
    """Let pyspark start a new JVM after that of ``context`` has ended."""
    global _started
    from pyspark import SparkContext

    # Nothing is left to be stopped in the JVM.
    context._jsc = None  # pyright: ignore
    context.stop()
    gateway = SparkContext._gateway
    if gateway is not None and getattr(gateway, "proc", None) is not None and gateway.proc.poll() is not None:
        gateway.shutdown()
        SparkContext._gateway = SparkContext._jvm = None
    _started = None


@contextmanager
def _kept_handler() -> Iterator[None]:
    """Keep the handler of Ctrl-C, which pyspark replaces.

    The handler of pyspark fails after its application has ended.
    """
    former = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and former is not None:
            signal.signal(signal.SIGINT, former)
