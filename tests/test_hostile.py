"""Test that hostile text in a trace is shown and never acted on.

The outputs are the page, the terminal, CSV, SQL, and pictures.
"""

from __future__ import annotations

import csv
import gc
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from entrace.analysis.compare import compare
from entrace.analysis.compare.text import to_text
from entrace.analysis.report import SCRIPT, TEMPLATES, write_report
from entrace.analysis.runs import open_runs
from entrace.analysis.terminal.export import FORMATS, to_report_csv
from entrace.analysis.terminal.progress import Progress
from entrace.analysis.trace import TABLES, InputError, TraceWriter
from entrace.analysis.trace.digests import DIGESTS
from entrace.analysis.trace.plain import plain
from tests.analysis.conftest import VOCAB, write_failed, write_tiny, written
from tests.analysis.synthetic import Planted, write_run
from tests.slow import slow_after

MARKUP = """<script>alert(1)</script><img src=x onerror=alert(1)>"' onload=alert(1) x='</pre></style>{{ 7*7 }}"""
CONTROLS = "\x1b[31mred\x1b]8;;https://example.org\x07link\x9b2J\x00\r\x08\x7f\u202egnp.\u2066\n\u2028"
SPREADSHEET = '=HYPERLINK("https://example.org")'
HOSTILE = f"{SPREADSHEET}[red]$\\frac{{1}}$_{MARKUP}{CONTROLS}'; drop table runs; -- [link=https://example.org]"
LONG = "very long " * 1_000_000
# Of the page of an ordinary report.
TAGS = {"html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h3", "p", "b", "a", "br", "code", "pre"}
TAGS |= {"span", "div", "section", "details", "summary", "table", "thead", "tbody", "tr", "th", "td", "img"}
TAGS |= {"nav", "ul", "li", "script"}
ATTRIBUTES = {
    "alt",
    "aria-label",
    "charset",
    "class",
    "colspan",
    "content",
    "href",
    "http-equiv",
    "id",
    "lang",
    "name",
    "src",
    "style",
}
# Of the output of commands: lines end in a line feed, nothing else of its kind is there.
UNSEEN = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\u2029\u2066-\u2069\ud800-\udfff]")


def rewrite(folder: Path, change: Callable[[str, str], str]) -> None:
    """Replace all text in the tables of a run.

    ``change`` maps column and text to the new text. The digests are removed.
    """
    for path in (path for name in TABLES for path in (folder / name).glob("*.parquet")):
        table = pq.read_table(path)
        for i, field in enumerate(table.schema):
            if pa.types.is_string(field.type):
                texts = [text if text is None else change(field.name, text) for text in table[i].to_pylist()]
                table = table.set_column(i, field, pa.array(texts, field.type))
        pq.write_table(table, path)
    (folder / DIGESTS).unlink()


def poison(folder: Path, tail: str) -> None:
    """Replace all text of a run by hostile text; ``tail`` keeps run ids distinct."""
    kept = {"category", "entropy_kind", "split", "prompt_id"}
    names = {"run_id": HOSTILE + tail}
    rewrite(folder, lambda column, text: names.get(column, text if column in kept else HOSTILE))
    path = folder / "run.json"
    manifest = json.loads(path.read_text())
    arm = HOSTILE + manifest["arm"]
    named = dict.fromkeys(("study", "model", "task", "git_commit", "started_at", "finished_at"), HOSTILE)
    own = {"run_id": names["run_id"], "arm": arm, "baseline": f"{HOSTILE}none", "config": {HOSTILE: [LONG, "\ud800"]}}
    path.write_text(json.dumps({**manifest, **named, **own, "hardware": {HOSTILE: HOSTILE}, "versions": {"x": LONG}}))


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("plain") / "tiny")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hostile") / "a[0]*'; -- <b>"
    for seed in range(2):
        for arm, planted in (("none", Planted()), ("$ppl", Planted(eval_accuracy=0.9))):
            folder = write_run(root / f"{arm}-seed{seed}", arm=arm, seed=seed, planted=planted, steps=30, groups=4)
            poison(folder, folder.name)
    write_failed(root / "broken", error=f"{HOSTILE}{LONG}\ud800")
    return root


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write one short run, for tests that need hostile text and no comparison."""
    folder = write_run(tmp_path_factory.mktemp("hostile") / "a[0]*'; -- <b>" / "run", steps=4, groups=1)
    poison(folder, folder.name)
    return folder


@pytest.fixture(scope="module")
def report(hostile: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return write_report(open_runs(hostile), tmp_path_factory.mktemp("report") / "out").parent


class Page(HTMLParser):
    """Tags, attributes and links of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]


@pytest.fixture
def command(command: Callable[..., tuple[int, bytes, str]]):
    """``command`` with what was written to stdout as text."""

    def call(*args: str) -> tuple[int, str, str]:
        code, out, err = command(*args)
        return code, out.decode(), err

    return call


@pytest.mark.slow
def test_page_holds_nothing_but_its_own_markup(report: Path):
    text = (report / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags == TAGS
    assert page.attributes == ATTRIBUTES
    assert all(link.startswith(("#", "data:image/png;base64,")) or (report / link).is_file() for link in page.links)
    assert "&lt;script&gt;alert(1)" in text
    # One script, the page's own, which sorts tables; the policy allows no other.
    assert text.count("<script") == 1
    assert (TEMPLATES / SCRIPT).read_text(encoding="utf-8").strip() in text
    assert "{{ 7*7 }}" in text
    assert not UNSEEN.search(text)
    assert re.search(r"""http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:""", text)


@pytest.mark.slow
def test_page_stays_small(report: Path):
    assert (report / "report.html").stat().st_size < 1_500_000
    assert all(path.stat().st_size < 500_000 for path in report.iterdir() if path.name != "report.html")


@pytest.mark.slow
def test_cells_of_the_report_run_no_formula(report: Path):
    paths = sorted(report.glob("*.csv"))
    assert len(paths) > 20
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert not UNSEEN.search(text), path.name
        header, *rows = csv.reader(text.splitlines())
        assert all(re.fullmatch(r"[a-z0-9_]+", name) for name in header), path.name
        assert all(len(row) == len(header) for row in rows), path.name
        for cell in (cell for row in rows for cell in row if not re.fullmatch(r"-?[\d.]+(e[-+]?\d+)?|-?inf", cell)):
            assert not cell.strip().startswith(("=", "+", "-", "@")), (path.name, cell)
    assert f"'{SPREADSHEET}" in next(csv.reader((report / "ablation_final.csv").read_text().splitlines()[1:]))[0]


@pytest.mark.parametrize("cell", ["=1", " =1", '"=1', "@x", "＝1", "－1", "\t=1", "\r1", "\n1"])
def test_what_a_spreadsheet_takes_for_a_formula_is_marked(cell: str):
    rows = list(csv.reader(to_report_csv(pl.DataFrame({"text": [cell, "a-b"], "number": [-1.5, 2]})).splitlines()))
    assert rows[1][0].startswith("'")
    assert [rows[1][1], *rows[2]] == ["-1.5", "a-b", "2.0"]


def test_scripts_read_exact_values():
    frame = pl.DataFrame({"text": [HOSTILE, SPREADSHEET, '"', "a\r\nb", ""], "number": [-1.0, 1e-300, 0.1, 2.5, 1e300]})
    with io.StringIO(written(frame, "csv").decode(), newline="") as lines:
        rows = list(csv.reader(lines))[1:]
    assert [(text, float(number)) for text, number in rows] == frame.rows()
    assert json.loads(written(frame, "json")) == frame.to_dicts()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_json_is_json(value: float):
    def refuse(name: str) -> None:
        raise AssertionError(name)

    frame = pl.DataFrame({"x": [value], "rows": [[{"y": value}]]})
    assert json.loads(written(frame, "json"), parse_constant=refuse) == [{"x": None, "rows": [{"y": None}]}]


@pytest.mark.slow
def test_terminal_sees_no_control_character(command, hostile: Path):
    everything = "select * from runs, (select * from vocab limit 3), (select * from rollouts limit 1)"
    nested = "select [text] as texts, {'a': text} as record, text as \"name\u001b[31m\" from vocab limit 1"
    for args in (
        ["sql", everything],
        ["sql", nested],
        ["claims"],
        ["compare", "--metric", "all"],
        ["claims", "--json"],
    ):
        code, out, err = command(args[0], str(hostile), *args[1:])
        assert code == 0, args
        assert not UNSEEN.search(out + err), args
        assert all(line.startswith("entrace: ") and len(line) < 500 for line in err.splitlines()), args
        assert "HYPERLINK" in out.upper(), args
    wide = command("sql", str(hostile), "select text from vocab limit 1")[1]
    assert wide.count("\n") == 3


@pytest.mark.parametrize(
    "args",
    [
        ["sql", "RUN", f"select 1 as x{CONTROLS}; selec"],
        ["sql", "RUN", "select $a", "--param", f"b{CONTROLS}=1"],
        ["sql", "RUN", "select 1", "--format", f"\x1b[31m{MARKUP}"],
        ["claims", f"nowhere{CONTROLS.replace(chr(0), '')}"],
        ["claims", "x" * 5000],
        ["claims", "RUN", f"--{CONTROLS}"],
        ["compare", "RUN", "--metric", f"{CONTROLS}"],
        [CONTROLS],
        ["sql", "RUN", "select error(chr(27) || '[31m' || chr(10) || 'x')"],
        ["sql", "RUN", "select 1", "--param", "a=" + "[" * 100_000],
        ["sql", "RUN", "select \udce9"],
    ],
)
def test_errors_are_one_short_line(command, hostile_run: Path, args: list[str]):
    code, out, err = command(*[str(hostile_run) if arg == "RUN" else arg for arg in args])
    assert (code, out) == (2, "")
    assert err.startswith("entrace: ")
    assert err.count("\n") == 1
    assert len(err) < 2100
    assert not UNSEEN.search(err)


def test_progress_shows_names_as_they_are(tmp_path: Path):
    name = "[red]x[/red]:smile:\x1b[35mz\x1b]8;;https://example.org\x07\u202e\n"
    script = """
import sys
from entrace.analysis.terminal.grid_progress import GridProgress
from entrace.analysis.terminal.progress import Progress
from entrace.analysis.trace.verify import accept_edits
name = sys.argv[1].encode().decode("unicode_escape")
with Progress(name, 2) as progress:
    progress.update(1, name)
    progress.update(2, name)
with GridProgress(name, {name: (name, 2)}) as progress:
    progress.update(name, 1, accuracy=0.5)
    progress.end(name, None)
"""
    primary, terminal = pty.openpty()
    code = name.encode("unicode_escape").decode()
    env = {**os.environ, "COLUMNS": "250", "TERM": "xterm"}
    child = subprocess.Popen([sys.executable, "-c", script, code], stderr=terminal, env=env)
    os.close(terminal)
    seen = b""
    while chunk := _read(primary):
        seen += chunk
    os.close(primary)
    assert child.wait() == 0
    # Bar, note, title of the table and its arm.
    assert seen.count(b"[red]x[/red]:smile:\\x1b[35mz\\x1b]8;;https://example.org") >= 4
    assert not any(sign in seen for sign in (b"\x1b[35m", b"\x1b]8;", "\u202e".encode()))


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""


def test_plain_lines_of_progress_are_lines(capsys: pytest.CaptureFixture[str]):
    with Progress(CONTROLS, 1) as progress:
        progress.update(1, LONG)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert len(err) < 400
    assert not UNSEEN.search(err)


def test_grid_of_hostile_arms(command, tmp_path: Path):
    import entrace.trainer.cli  # noqa: F401, adds its commands to the app

    quoted = json.dumps(f"{MARKUP}{CONTROLS}../$(id)")
    arms = f"[arms]\nnone = {{}}\n{quoted} = {{ shaping.ppl.alpha = 0.1 }}\n"
    (tmp_path / "grid.toml").write_text(f'config = "tiny"\nbaseline = "none"\nseeds = [0]\n{arms}')
    code, out, err = command("ablate", str(tmp_path / "grid.toml"), "--dry-run", "--out", str(tmp_path / "out"))
    assert (code, err) == (0, "")
    assert not UNSEEN.search(out)
    assert re.search(r"^[\w.+=-]*_script_[\w.+=-]*  <script>", out, re.MULTILINE | re.ASCII)


@pytest.mark.usefixtures("heard_ctrl_c")
def test_ctrl_c_ends_a_long_query_and_leaves_nothing(command, tiny_path: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    stop = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT))
    stop.start()
    code, out, _ = command("sql", str(tiny_path), "select count(*) from range(100000000000)")
    stop.join()
    assert (code, out) == (130, "")
    gc.collect()
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("heard_ctrl_c")
def test_runs_can_be_asked_again_after_ctrl_c(tiny_path: Path):
    runs = open_runs(tiny_path)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        runs.sql("select count(*) from range(100000000000)")
    assert runs.sql("select 1 as x").item() == 1


@pytest.mark.parametrize(
    "name",
    slow_after(
        4,
        ["a[1]", "it's", "x\ny", "-rf", "b*", "c?", 'a"b', "<b>", "back\\slash", "[", "; drop table runs", "a,b", "{}"],
    ),
)
def test_a_folder_opens_as_itself(tiny_path: Path, tmp_path: Path, name: str):
    # What the names would match if they were taken for patterns.
    for other in ("a1", "bx", "cx"):
        write_other(tiny_path, tmp_path / other)
    write_other(tiny_path, tmp_path / name)
    runs = open_runs(tmp_path / name)
    assert runs.sql("select distinct run_id from tokens").rows() == [(name,)]
    assert runs.query("entropy_by_position", runs=[name])["run_id"].unique().to_list() == [name]
    assert runs.sql("select path from runs").item() == str((tmp_path / name).resolve())


def write_other(run: Path, folder: Path) -> None:
    shutil.copytree(run, folder)
    rewrite(folder, lambda column, text: folder.name if column == "run_id" else text)
    path = folder / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "run_id": folder.name}))


def test_queries_find_a_run_by_its_name_whatever_it_is(hostile: Path):
    runs = open_runs(hostile)
    ids = sorted(runs.stage_fits)
    assert len(ids) == 4
    assert all(HOSTILE in run_id for run_id in ids)
    assert runs.query("stage_dynamics", runs=ids[:1])["run_id"].unique().to_list() == ids[:1]
    assert len(runs.subjects()) == 1
    text = to_text(compare(runs))
    assert not UNSEEN.search(text)
    assert all(len(line) < 10_000 for line in text.splitlines())


def test_lone_surrogates_in_a_manifest_become_replacement_characters(tiny_path: Path, tmp_path: Path, command):
    folder = tmp_path / "run"
    shutil.copytree(tiny_path, folder)
    path = folder / "run.json"
    text = path.read_text().replace('"none"', r'"a\ud800b\ud83d\ude00"').replace('"hand"', r'"\udc00\ud800"')
    path.write_text(text)
    (folder / DIGESTS).unlink()
    assert command("sql", str(folder), "select arm, study from runs", "--format", "csv") == (
        0,
        "arm,study\na\ufffdb\U0001f600,\ufffd\ufffd\n",
        "",
    )


def test_file_names_that_are_not_utf_8_are_refused(tiny_path: Path, tmp_path: Path, command):
    shutil.copytree(os.fsencode(tiny_path), os.fsencode(tmp_path) + b"/caf\xe9")
    code, _, err = command("claims", str(tmp_path))
    assert (code, err) == (2, f"entrace: {tmp_path}/caf\\udce9: the name is not UTF-8; rename it\n")


@pytest.mark.slow
def test_ten_megabytes_pass_through(tmp_path: Path, command):
    frozen = Path(__file__).parent / "fixtures" / "frozen" / "none-seed0" / "rollouts"
    row = pq.read_table(next(frozen.glob("*.parquet"))).slice(0, 1).to_pydict()
    writer = TraceWriter.create(tmp_path / "run", {"run_id": "run"}, [*VOCAB, LONG])
    texts = {"completion": [LONG], "answer": [LONG]}
    writer.append("rollouts", {**row, **texts, "run_id": "run", "step": 1, "group_id": 0})
    writer.append("vocab", {"token_id": [99], "text": [f"{HOSTILE}{LONG}"], "category": "special"})
    writer.flush(1)
    writer.finish(error=LONG)
    runs = open_runs(tmp_path / "run")
    frame = runs.sql("select completion, answer, text, error from rollouts, vocab, runs where token_id = 99")
    assert len(written(frame, "table")) < 2000
    assert json.loads(written(frame, "json"))[0]["completion"] == LONG
    assert LONG.encode() in written(frame, "csv")
    assert set(FORMATS) == {"table", "json", "csv", "parquet"}
    page = write_report(runs, tmp_path / "out")
    assert sum(path.stat().st_size for path in page.parent.iterdir()) < 3_000_000


def test_text_is_made_plain_and_short():
    assert plain("a\tb\x1b\u202e\U000e0041é\u200d漢$") == "a\\tb\\x1b\\u202e\\U000e0041é\u200d漢$"
    assert plain("abcdefghij", 5) == "ab…ij"
    assert plain("\x1b" * 100, 20) == plain(plain("\x1b" * 100, 20), 20)
    assert len(plain("\x1b" * 100, 20)) == 20
    error = InputError("a\nb" + "x" * 10_000_000)
    assert str(error).startswith("a\\nbx")
    assert len(str(error)) == 2000
