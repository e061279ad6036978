"""The commands that read traces, and the one place where errors become exit codes.

Exit codes: 0 done, 1 failed, 2 bad input.
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
    help="Records, queries and compares RL runs with verifiable rewards, token by token.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RunsArgument = Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders, study folders or globs.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


class Format(StrEnum):
    """What ``entrace sql`` prints; the same names as ``export.FORMATS``."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"
    PARQUET = "parquet"


@app.command()
def sql(
    arguments: Annotated[
        list[str], typer.Argument(metavar='RUN... "QUERY"', help="Runs, then the query unless --file is given.")
    ],
    file: Annotated[Path | None, typer.Option(help="File that holds the query.")] = None,
    form: Annotated[Format, typer.Option("--format", help="How to print the rows.")] = Format.TABLE,
    param: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Value of $NAME; left out, it is null.")
    ] = None,
) -> None:
    """Run one read-only SELECT over the tables of the trace, and views runs and stages.

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
    table: Annotated[str | None, typer.Argument(help="One table; all if left out.")] = None,
    json: JsonOption = False,
) -> None:
    """Print the data dictionary: every column with its type, unit and meaning.

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
    json: JsonOption = False,
) -> None:
    """Print the scorecard: what the runs say about each claim.

    Example: entrace claims data/runs/study --json
    """
    from entrace.analysis.claims import judge, load_ledger, overall
    from entrace.analysis.runs import open_runs

    chosen = load_ledger(ledger)
    opened = open_runs(runs)
    verdicts = judge(opened, chosen)
    _remark(opened)
    if json:
        print_json({"overall": overall(verdicts), "verdicts": [verdict.to_dict() for verdict in verdicts]})
        return
    for v in verdicts:
        figures = f"{v.effect:.3g} [{v.low:.3g}, {v.high:.3g}] {v.unit}, n = {v.n:,} {v.of}" if v.n else ""
        say(f"{v.claim:<3} {v.part:<16} {v.subject:<16} {v.verdict:<13} {figures}".rstrip())
        say(f"    {v.why}")
        say(f"    null: {v.null}" + (f"; detectable from {v.detectable:.3g} on" if v.detectable is not None else ""))
        say(f"    figure {v.figure}, {v.sql}")


@app.command()
def compare(
    runs: RunsArgument,
    accuracy: Annotated[
        float | None, typer.Option(help="Accuracy that steps are counted to; half way of the baseline if left out.")
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Metric to print, may be repeated; all prints every one.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Compare every arm with its baseline: paired differences, verdicts, aggregates, and the runs that take no part.

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
    out: Annotated[Path, typer.Option(help="Folder to write; new, empty or an earlier report.")],
    json: JsonOption = False,
) -> None:
    """Write figures, tables, scorecard and one self-contained HTML page.

    Example: entrace report data/runs/study --out reports/study
    """
    from entrace.analysis.report import NUM_PARTS, write_report
    from entrace.analysis.runs import open_runs
    from entrace.analysis.terminal.progress import Progress

    opened = open_runs(runs)
    with Progress("report", NUM_PARTS) as progress:
        page = write_report(opened, out, on_step=progress.update)
    _remark(opened)
    if json:
        print_json({"report": str(page)})
    else:
        say(f"report: {page}")


def run(command: typer.Typer) -> None:
    """Runs the command line: bad input is one line and exit 2, any other failure one line and exit 1."""
    if isinstance(sys.stdout, TextIOWrapper):
        # Not every terminal can show every sign.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = command(sys.argv[1:] or ["--help"], standalone_mode=False)
        sys.stdout.flush()
        sys.exit(status if isinstance(status, int) else 0)
    except BrokenPipeError:
        # The reader has gone. Python would complain once more while closing stdout.
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
    # Only typer's usage errors have it; their class has moved between its versions.
    if describe := getattr(error, "format_message", None):
        return f"{describe().rstrip('.')}; see --help", 2
    kind, said = type(error).__name__, str(error).strip()
    return f"{kind}: {said}" if said else kind, 1


def _fail(message: str, status: int) -> None:
    say(f"entrace: {' '.join(message.split())}", err=True)
    sys.exit(status)


def say(line: str, err: bool = False) -> None:
    """Prints one line, whatever the names in it hold."""
    from entrace.analysis.trace.plain import plain

    typer.echo(plain(line), err=err)


def print_json(value: Any) -> None:
    """Prints what ``--json`` asks for."""
    from entrace.analysis.terminal.export import to_json

    typer.echo(to_json(value))


def _remark(runs: Runs) -> None:
    """Says on stderr what is missing of runs that are not there in full."""
    from entrace.analysis.trace.plain import plain

    for run_id, note in list(runs.notes.items())[:NOTES_SHOWN]:
        say(f"entrace: {plain(run_id, NOTE_LENGTH)}: {plain(note, NOTE_LENGTH)}", err=True)
    if (more := len(runs.notes) - NOTES_SHOWN) > 0:
        say(f"entrace: {more} more runs are not there in full", err=True)


def _read_text(path: Path) -> str:
    from entrace.analysis.trace.errors import InputError, in_one_line, reason_of

    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {reason_of(error)}") from None
    except ValueError as error:
        raise InputError(f"{path}: not text ({in_one_line(error)})") from None


def _parse_params(pairs: list[str]) -> dict[str, Any]:
    """Values that read as JSON are taken as such, ``bins=5`` as a number; the rest is text."""
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
