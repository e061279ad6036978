"""Define the commands that read traces, and translate errors into exit codes.

Exit codes: 0 success, 1 failure, 2 bad input, 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from entrace.analysis.runs import Runs

NOTES_SHOWN, NOTE_LENGTH = 5, 200

app = typer.Typer(
    name="entrace",
    help="Record, query, and compare RL runs with verifiable rewards, token by token.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RunsArgument = Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders, study folders, or globs.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts (default: text).")]
QuestionsOption = Annotated[
    Path | None,
    typer.Option("--questions", metavar="DIR", help="Folder with your own SQL, figures, and claims (default: none)."),
]


class Format(StrEnum):
    """Name the output formats of ``entrace sql``, as in ``export.FORMATS``."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"
    PARQUET = "parquet"


@app.command()
def sql(
    arguments: Annotated[
        list[str], typer.Argument(metavar='RUN... "QUERY"', help="Runs, then the query; with --file, runs only.")
    ],
    file: Annotated[
        Path | None, typer.Option(help="File that contains the query (default: the query is the last argument).")
    ] = None,
    form: Annotated[
        Format, typer.Option("--format", help="Output format; table shows at most 100 rows.")
    ] = Format.TABLE,
    param: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Value of the parameter $NAME (default: null); repeatable."),
    ] = None,
) -> None:
    """Run one read-only SQL query over the tables of the trace, plus the tables runs and stages.

    Example: entrace sql data/runs/study "select step, avg(entropy) from tokens group by all order by step"
    """
    from entrace.analysis.runs import open_runs
    from entrace.analysis.terminal.export import render, show
    from entrace.analysis.trace.errors import InputError

    paths = arguments if file else arguments[:-1]
    if not paths:
        raise InputError('sql: expected RUN... "QUERY", found one argument; name the runs first, then the query')
    text = _read_text(file) if file else arguments[-1]
    opened = open_runs(paths)
    frame = opened.sql(text, _parse_params(param or []))
    if form is Format.PARQUET and sys.stdout.isatty():
        raise InputError("sql: parquet is binary; redirect it to a file, as in ... --format parquet > rows.parquet")
    rows = render(frame, form.value)
    sys.stdout.buffer.write(show(rows.decode()).encode() if sys.stdout.isatty() else rows)
    _remark(opened)


@app.command()
def tables(
    table: Annotated[str | None, typer.Argument(help="Name of a table (default: all tables).")] = None,
    json: JsonOption = False,
) -> None:
    """Print the data dictionary: every column with its type, unit, and meaning.

    Example: entrace tables tokens
    """
    from entrace.analysis.trace import TABLES, InputError, nearest

    if table is not None and table not in TABLES:
        raise InputError(f'unknown table "{table}"{nearest(table, TABLES)}')
    chosen = [TABLES[table]] if table else list(TABLES.values())
    if json:
        print_json(
            {
                t.name: {
                    "grain": t.grain,
                    "key": t.sort_by,
                    "columns": [
                        {"name": c.name, "type": str(c.type), "unit": c.unit, "meaning": c.meaning} for c in t.columns
                    ],
                }
                for t in chosen
            }
        )
        return
    for entry in chosen:
        typer.echo(f"{entry.name}: {entry.grain}; key run_id, {', '.join(entry.sort_by)}")
        for column in entry.columns:
            typer.echo(f"  {column.name:<20} {column.type!s:<13} {column.unit:<22} {column.meaning}")


@app.command()
def claims(
    runs: RunsArgument,
    ledger: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Claims to judge (default: the shipped claims.toml).")
    ] = None,
    questions: QuestionsOption = None,
    json: JsonOption = False,
) -> None:
    """Print the scorecard: what the runs say about each claim.

    Example: entrace claims data/runs/study --json
    """
    from entrace.analysis.claims import judge, load_ledger, overall
    from entrace.analysis.runs import open_runs

    opened = open_runs(runs, questions=questions)
    verdicts = judge(opened, load_ledger(ledger, opened.questions) if ledger else None)
    _remark(opened)
    if json:
        print_json({"overall": overall(verdicts), "verdicts": [verdict.to_dict() for verdict in verdicts]})
        return
    for v in verdicts:
        interval = "[no interval]" if v.low is None or v.high is None else f"[{v.low:.3g}, {v.high:.3g}]"
        estimate = f"{v.effect:.3g} {interval} {v.unit}, n = {v.n:,} {v.of}" if v.effect is not None else ""
        say(f"{v.claim:<3} {v.part:<16} {v.subject:<16} {v.verdict:<13} {estimate}".rstrip())
        say(f"    {v.why}")
        say(f"    null: {v.null}" + (f"; detectable from {v.detectable:.3g} on" if v.detectable is not None else ""))
        say(f"    figure {v.figure}, {v.sql}")


@app.command()
def compare(
    runs: RunsArgument,
    accuracy: Annotated[
        float | None,
        typer.Option(
            help="Accuracy in [0, 1] up to which steps are counted (default: midpoint of the baseline's first and last "
            "evaluation)."
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Metric to print, or all (default: avg_at_k; with --json all); repeatable."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Compare every arm with its baseline: paired differences, verdicts, aggregates, and excluded runs.

    Example: entrace compare data/runs/study --metric avg_at_k --metric response_length
    """
    from entrace.analysis.compare import compare as compare_runs
    from entrace.analysis.compare.text import choose_metrics, to_json, to_text
    from entrace.analysis.runs import open_runs

    opened = open_runs(runs)
    comparison = compare_runs(opened, accuracy)
    chosen = choose_metrics(comparison, metric or ["all" if json else "avg_at_k"])
    _remark(opened)
    if json:
        print_json(to_json(chosen))
    else:
        typer.echo(to_text(chosen))


@app.command()
def report(
    runs: RunsArgument,
    out: Annotated[
        Path, typer.Option(help="Folder of the report: new, empty, or an earlier report, which is replaced.")
    ],
    questions: QuestionsOption = None,
    json: JsonOption = False,
) -> None:
    """Write figures, tables, the scorecard, and one self-contained HTML page.

    Example: entrace report data/runs/study --out reports/study
    """
    from entrace.analysis.report import num_parts, write_report
    from entrace.analysis.runs import open_runs
    from entrace.analysis.terminal.progress import Progress

    opened = open_runs(runs, questions=questions)
    with Progress("report", num_parts(opened)) as progress:
        page = write_report(opened, out, on_step=progress.update)
    _remark(opened)
    if json:
        print_json({"report": str(page)})
    else:
        say(f"report: {page}")


def run(command: typer.Typer) -> None:
    """Run the command line; an error becomes one line on stderr and exit code 2 (bad input) or 1."""
    if isinstance(sys.stdout, TextIOWrapper):
        # Some terminals cannot encode every character.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = command(sys.argv[1:] or ["--help"], standalone_mode=False)
        sys.stdout.flush()
        sys.exit(status if isinstance(status, int) else 0)
    except BrokenPipeError:
        # The reader closed the pipe. Python would raise the error again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (KeyboardInterrupt, typer.Abort):
        _fail("stopped", 130)
    except Exception as error:
        _fail(*_describe(error))


def _describe(error: Exception) -> tuple[str, int]:
    from entrace.analysis.trace.errors import InputError

    if isinstance(error, InputError):
        return str(error), 2
    # Only usage errors of typer have this method. Their class differs between versions of typer.
    if describe := getattr(error, "format_message", None):
        return f"{describe().rstrip('.')}; see --help", 2
    kind, said = type(error).__name__, str(error).strip()
    return f"{kind}: {said}" if said else kind, 1


def _fail(message: str, status: int) -> None:
    say(f"entrace: {' '.join(message.split())}", err=True)
    sys.exit(status)


def say(line: str, err: bool = False) -> None:
    """Print one line with control characters escaped."""
    from entrace.analysis.trace.plain import plain

    typer.echo(plain(line), err=err)


def print_json(value: Any) -> None:
    """Print ``value`` as JSON."""
    from entrace.analysis.terminal.export import to_json

    typer.echo(to_json(value))


def _remark(runs: Runs) -> None:
    """Print on stderr the notes on incomplete runs."""
    from entrace.analysis.trace.plain import plain

    for run_id, note in list(runs.notes.items())[:NOTES_SHOWN]:
        say(f"entrace: {plain(run_id, NOTE_LENGTH)}: {plain(note, NOTE_LENGTH)}", err=True)
    if (more := len(runs.notes) - NOTES_SHOWN) > 0:
        say(f"entrace: {more} more runs are incomplete", err=True)


def _read_text(path: Path) -> str:
    from entrace.analysis.trace.errors import InputError, in_one_line, reason_of

    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {reason_of(error)}") from None
    except ValueError as error:
        raise InputError(f"{path}: not UTF-8 text ({in_one_line(error)})") from None


def _parse_params(pairs: list[str]) -> dict[str, Any]:
    """Return parameters by name; a value that is valid JSON is parsed (``bins=5`` is a number), others are text."""
    from json import loads

    from entrace.analysis.trace.errors import InputError

    params = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f'--param: expected NAME=VALUE, found "{pair}"')
        try:
            params[name] = loads(value)
        except (ValueError, RecursionError):
            params[name] = value
    return params
