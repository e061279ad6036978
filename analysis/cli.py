"""Define the commands that read traces, and translate errors into exit codes.

Exit codes: 0 success, 1 failure, 2 bad input, 130 stopped with Ctrl-C, 143 stopped with SIGTERM.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import asdict
from enum import StrEnum
from io import TextIOWrapper
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from entrace.analysis.terminal.stops import hear_signals, restore_stops

if TYPE_CHECKING:
    import polars as pl

    from entrace.analysis.queries import Question
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
        list[str] | None,
        typer.Argument(
            metavar='RUN... "QUERY"',
            help="Runs, then the query; with --file, runs only; with --question, runs and NAME=VALUE.",
            show_default=False,
        ),
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="File that contains the query (default: the query is the last argument).")
    ] = None,
    question: Annotated[
        str | None, typer.Option(metavar="NAME", help="Named question to ask instead of a query (default: none).")
    ] = None,
    is_list: Annotated[
        bool, typer.Option("--list", help="List the named questions instead of running a query (default: run).")
    ] = False,
    questions: QuestionsOption = None,
    form: Annotated[
        Format, typer.Option("--format", help="Output format; table shows at most 100 rows.")
    ] = Format.TABLE,
    safe: Annotated[
        bool,
        typer.Option("--safe", help="With --format csv: put ' before text that a spreadsheet would run as a formula."),
    ] = False,
    param: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Value of the parameter $NAME (default: null); repeatable."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Most memory for the query, such as 500MB (default 2GiB).")
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Most seconds of computing; 0 for no limit (default 600)."),
    ] = None,
    engine: Annotated[
        str, typer.Option(metavar="NAME", help="Engine that computes: duckdb, or spark for a cluster.")
    ] = "duckdb",
) -> None:
    """Run one read-only SQL query on trace tables and the tables runs and stages.

    Example: entrace sql data/runs/study "select step, avg(entropy) from tokens group by all order by step"

    Example: entrace sql data/runs/study --question movement_concentration stage=plateau
    """
    from entrace.analysis.queries import Questions
    from entrace.analysis.runs import open_runs
    from entrace.analysis.terminal.export import Visible, write
    from entrace.analysis.terminal.query_progress import QueryProgress
    from entrace.analysis.trace.errors import InputError

    is_terminal = sys.stdout.isatty()
    if form is Format.PARQUET and is_terminal:
        raise InputError("sql: parquet is binary; redirect it to a file, as in ... --format parquet > rows.parquet")
    if file and question:
        raise InputError("sql: --file and --question both name a query; give one of them")
    out = Visible(sys.stdout.buffer) if is_terminal else sys.stdout.buffer
    given = arguments or []
    asked = Questions(questions)
    if is_list:
        listed = asked.table()
        if form is Format.TABLE:
            _print_questions(listed)
        else:
            write([listed], form.value, out, is_safe=safe)
        return
    paths, settings, text = given, [], ""
    if question:
        paths, settings = _split_settings(given, asked[question])
        text = asked.read(question)
    elif not file:
        paths, text = given[:-1], "".join(given[-1:])
    if not paths:
        raise InputError(
            'sql: expected RUN... "QUERY", found one argument; name the runs first, then the query'
            if given
            else 'sql: expected RUN... "QUERY", RUN... --question NAME, or --list'
        )
    opened = open_runs(paths, questions=questions, engine=engine)
    text = _read_text(file) if file else text
    params = _parse_params([*(param or []), *settings], text)
    with opened.questions.named(question or ""), QueryProgress() as progress:
        parts = opened.stream(
            text,
            params,
            memory=memory,
            timeout=timeout,
            # On a terminal, rows and progress would overwrite each other.
            on_progress=None if is_terminal and form is not Format.TABLE else progress.update,
            reader=_descriptor(sys.stdout),
        )
        write(progress.counted(parts), form.value, out, is_safe=safe)
    if question and not progress.num_rows:
        say(f"entrace: {opened.why_no_rows(question, params)}", err=True)
    note_incomplete(opened)


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
        print_json({t.name: {"grain": t.grain, "key": t.sort_by, "columns": t.describe()} for t in chosen})
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
    from entrace.analysis.claims import judge, load_ledger, scorecard
    from entrace.analysis.runs import open_runs

    opened = open_runs(runs, questions=questions)
    verdicts = judge(opened, load_ledger(ledger, opened.questions) if ledger else None)
    note_incomplete(opened)
    if json:
        print_json(scorecard(verdicts))
        return
    for v in verdicts:
        interval = "[no interval]" if v.low is None or v.high is None else f"[{v.low:.3g}, {v.high:.3g}]"
        estimate = f"{v.effect:.3g} {interval} {v.unit}, n = {v.n:,} {v.of}" if v.effect is not None else ""
        say(f"{v.claim:<3} {v.part:<16} {v.subject:<16} {v.verdict:<13} {estimate}".rstrip())
        say(f"    {v.why}")
        say(
            f"    null: {v.null}"
            + (f"; smallest detectable effect {v.detectable:.3g} (power .8)" if v.detectable is not None else "")
        )
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
    """Compare every arm with its baseline.

    The output has paired differences, verdicts, aggregates, and excluded runs.

    Example: entrace compare data/runs/study --metric avg_at_k --metric response_length
    """
    from entrace.analysis.compare import compare as compare_runs
    from entrace.analysis.compare.text import choose_metrics, to_json, to_text
    from entrace.analysis.runs import open_runs

    opened = open_runs(runs)
    comparison = compare_runs(opened, accuracy)
    chosen = choose_metrics(comparison, metric or ["all" if json else "avg_at_k"])
    note_incomplete(opened)
    if json:
        print_json(to_json(chosen))
    else:
        typer.echo(to_text(chosen))


@app.command()
def report(
    runs: RunsArgument,
    out: Annotated[
        str,
        typer.Option(help="Folder or URL of the report: new, empty, or an earlier report, which is replaced."),
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
    note_incomplete(opened)
    if json:
        print_json({"report": str(page)})
    else:
        say(f"report: {page}")


@app.command()
def view(
    runs: RunsArgument,
    host: Annotated[
        str,
        typer.Option(help="Address to serve on; beyond this machine, the printed URL holds a secret token."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; the next free one if it is in use.")] = 8765,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = True,
    questions: QuestionsOption = None,
) -> None:
    """Serve a local page with figures, responses, comparisons, and an SQL console.

    Responses are shown down to the token. Ctrl-C stops the server.

    Example: entrace view data/runs/study
    """
    from entrace.analysis.trace.errors import InputError

    try:
        from entrace.analysis.viewer import server
    except ModuleNotFoundError as error:
        raise InputError(f"view: {error.name} is missing; install it with pip install 'entrace[view]'") from None
    from entrace.analysis.viewer.session import Session

    session = Session(runs, questions)
    served = server.prepare(session, host, port)
    note_incomplete(session.runs)
    if port and served.port != port:
        say(f"entrace: port {port} is in use", err=True)
    say(f"view: {served.url}")
    if browser and not server.open_browser(served.url):
        say("entrace: no browser was found; open the address above", err=True)
    # A server ends with Ctrl-C; nothing is left unfinished.
    with suppress(KeyboardInterrupt):
        served.run()
    session.close()


@app.command()
def verify(
    runs: RunsArgument,
    accept_edits: Annotated[
        bool,
        typer.Option(
            "--accept-edits", help="Record files that you edited or removed as they are now (default: only check)."
        ),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Read every file of the runs and compare it with its digest.

    The exit code is 1 if a file is damaged or missing.

    Example: entrace verify data/runs/study
    """
    from entrace.analysis.runs import find_run_folders
    from entrace.analysis.terminal.progress import Progress
    from entrace.analysis.trace.verify import accept_edits as accept
    from entrace.analysis.trace.verify import list_files, verify_run

    folders = find_run_folders(runs)
    if accept_edits:
        for folder in folders:
            for name in accept(folder):
                say(f"accepted{'' if (folder / name).exists() else ' as removed'}: {folder / name}", err=True)
    steps = count(1)
    with Progress("verify", sum(len(list_files(folder)) for folder in folders)) as progress:
        results = [verify_run(folder, lambda: progress.update(next(steps))) for folder in folders]
    if json:
        print_json({"is_intact": not any(result.faults for result in results), "runs": list(map(asdict, results))})
    else:
        for result in results:
            for finding in result.findings:
                say(str(finding))
            say(result.summary)
    raise typer.Exit(1 if any(result.faults for result in results) else 0)


@app.command()
def prune(
    runs: RunsArgument,
    token_steps: Annotated[int, typer.Option(min=1, metavar="K", help="Keep the tokens of every K-th step.")] = 1,
    token_responses: Annotated[
        float, typer.Option(metavar="SHARE", help="Keep the tokens of this share of the responses, in (0, 1].")
    ] = 1.0,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print sizes, the new ones estimated, instead of pruning (default: prune)."),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Thin the tokens of recorded runs.

    The result is as if the runs had been recorded with record.token_steps and record.token_responses. Tokens of the
    first step, of the last step, and of steps with after-update values are kept whatever K is. All other tables stay
    complete, and a pruned run can be resumed. A run that is being written is refused. If the command is stopped, call
    it again.

    Example: entrace prune data/runs/study --token-steps 5 --token-responses 0.25
    """
    from entrace.analysis.runs import find_run_folders
    from entrace.analysis.terminal.progress import Progress
    from entrace.analysis.trace.errors import InputError
    from entrace.analysis.trace.prune import prune as prune_run
    from entrace.analysis.trace.sampling import TokenSampling

    if not 0 < token_responses <= 1:
        raise InputError(f"--token-responses {token_responses:g}: expected a share in (0, 1], such as 0.25")
    sampling = TokenSampling(token_steps, token_responses)
    if sampling == TokenSampling():
        raise InputError("prune: nothing to remove; set --token-steps above 1, or --token-responses below 1")
    folders = find_run_folders(runs)
    found = []
    with Progress("prune", len(folders)) as progress:
        for done, folder in enumerate(folders, start=1):
            found.append(prune_run(folder, sampling, dry_run=dry_run))
            progress.update(done, folder.name)
    if json:
        print_json([asdict(pruned) for pruned in found])
        return
    for p in found:
        sizes = f"{p.bytes_before / 1e6:,.1f} to {p.bytes_after / 1e6:,.1f} MB"
        say(f"{p.run}: tokens {p.rows_before:,} to {p.rows_after:,}, {sizes}{' (estimated)' * dry_run}")


def run(command: typer.Typer) -> None:
    """Run the command line; an error becomes one line on stderr.

    The exit code is then 2 (bad input) or 1.
    """
    if isinstance(sys.stdout, TextIOWrapper):
        # Some terminals cannot encode every character.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with hear_signals(), restore_stops():
            status = _invoke(command)
            sys.stdout.flush()
        sys.exit(status if isinstance(status, int) else 0)
    except BrokenPipeError:
        # The reader closed the pipe.
        _discard_output()
        sys.exit(0)
    except (KeyboardInterrupt, typer.Abort) as stop:
        how = getattr(stop, "__notes__", ["run the same command again"])[-1]
        _fail(f"stopped; {how}", getattr(stop, "exit_code", 130))
    except Exception as error:
        _fail(*_describe(error))


def _invoke(command: typer.Typer) -> Any:
    # Calling the command itself would turn Ctrl-C into an exit code and lose its notes.
    try:
        group = typer.main.get_command(command)
        with group.make_context("entrace", sys.argv[1:] or ["--help"]) as context:
            return group.invoke(context)
    except typer.Exit as done:
        return done.exit_code


def _describe(error: Exception) -> tuple[str, int]:
    from entrace.analysis.trace.errors import InputError, describe_fault, quoted_input_error

    if isinstance(error, InputError):
        return str(error), 2
    if quoted := quoted_input_error(error):
        return quoted, 2
    if fault := describe_fault(error):
        return fault, 1
    # Only usage errors of typer have this method. Their class differs between versions of typer.
    if describe := getattr(error, "format_message", None):
        return f"{describe().rstrip('.')}; see --help", 2
    kind, said = type(error).__name__, str(error).strip()
    return f"{kind}: {said}" if said else kind, 1


def _fail(message: str, status: int) -> None:
    say(f"entrace: {' '.join(message.split())}", err=True)
    try:
        sys.stdout.flush()
    except OSError:
        _discard_output()
    sys.exit(status)


def _discard_output() -> None:
    # Python would raise the error again when it flushes stdout at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(line: str, err: bool = False) -> None:
    """Print one line with control characters escaped."""
    from entrace.analysis.trace.plain import plain

    typer.echo(plain(line), err=err)


def print_json(value: Any) -> None:
    """Print ``value`` as JSON."""
    from entrace.analysis.terminal.export import to_json

    typer.echo(to_json(value))


def note_incomplete(runs: Runs) -> None:
    """Print on stderr the notes on incomplete and sampled runs."""
    from entrace.analysis.trace.plain import plain

    for run_id, note in list(runs.notes.items())[:NOTES_SHOWN]:
        say(f"entrace: {plain(run_id, NOTE_LENGTH)}: {plain(note, NOTE_LENGTH)}", err=True)
    if (more := len(runs.notes) - NOTES_SHOWN) > 0:
        say(f"entrace: {more} more runs are incomplete or sampled", err=True)


def _print_questions(listed: pl.DataFrame) -> None:
    """Print each question, wrapped on a terminal, below its name."""
    from shutil import get_terminal_size
    from textwrap import fill

    width = get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    for row in listed.iter_rows(named=True):
        level = f"{row['level']}, {row['claim']}" if row["claim"] else row["level"]
        say(f"{row['stem']} ({level})")
        for line in fill(row["question"], width, initial_indent="  ", subsequent_indent="  ").splitlines():
            say(line)


def _descriptor(stream: Any) -> int | None:
    """Return the file descriptor of a stream; None without one, as in a notebook."""
    try:
        return stream.fileno()
    except (AttributeError, OSError):
        return None


def _read_text(path: Path) -> str:
    from entrace.analysis.trace.errors import InputError, in_one_line, reason_of

    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: {reason_of(error)}") from None
    except ValueError as error:
        raise InputError(f"{path}: not UTF-8 text ({in_one_line(error)})") from None


def _split_settings(arguments: list[str], question: Question) -> tuple[list[str], list[str]]:
    """Return the runs and the settings NAME=VALUE among the arguments.

    A run may have an equals sign in its name.
    """
    from entrace.analysis.parameters import parameters
    from entrace.analysis.trace.errors import InputError, nearest

    known = parameters(question.params)
    runs, settings = [], []
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if equals and name in known:
            settings.append(argument)
        elif equals and name.isidentifier() and not Path(argument).exists():
            raise InputError(f'{question.stem}: unknown parameter "{name}"{nearest(name, known)}')
        else:
            runs.append(argument)
    return runs, settings


def _parse_params(pairs: list[str], text: str) -> dict[str, Any]:
    """Return parameters by name.

    A value that is valid JSON is parsed (``bins=5`` is a number), others are text. If the headers of the query declare
    a parameter as text, such as a run, only a list and ``null`` are parsed (``runs=0`` is the run named 0).
    """
    from json import loads

    from entrace.analysis.parameters import parameters
    from entrace.analysis.queries import headers
    from entrace.analysis.runs import TEXT_COLUMNS
    from entrace.analysis.trace.errors import InputError

    described = parameters(headers(text).get("params", ""))
    params: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f'--param: expected NAME=VALUE, found "{pair}"')
        try:
            params[name] = loads(value)
        except (ValueError, RecursionError):
            params[name] = value
        is_text = name in described and described[name].takes_text(TEXT_COLUMNS)
        if is_text and not isinstance(params[name], list | None):
            params[name] = value
    return params
