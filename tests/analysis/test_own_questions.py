"""Test that a user's own SQL, figure, and claims work like built-in ones.

These files are in a folder of the user.
"""

import json
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

import entrace
from entrace.analysis.claims import judge
from entrace.analysis.ledger import load_ledger
from entrace.analysis.report import write_report
from entrace.analysis.trace.errors import InputError

FROZEN = Path(__file__).parents[1] / "fixtures" / "frozen" / "none-seed0"
SQL = """\
-- question: How much entropy do the first tokens of a response have?
-- grain: one row per run, step, and prompt
-- params: $runs list of run_id, null = all
-- units: first_sum, first_tokens: nats, tokens
-- needs: tokens
select run_id, step, prompt_id, sum(entropy) as first_sum, count(*) as first_tokens
from tokens
where position < 3 and ($runs is null or list_contains($runs, run_id))
group by all
order by all
"""
FIGURE = """\
import seaborn

CAPTION = "Entropy of the first three tokens."


def draw(frame, ax):
    seaborn.lineplot(x=frame["step"], y=frame["first_sum"] / frame["first_tokens"], errorbar=None, ax=ax)
    return ax
"""
CLAIMS = """\
[X1]
question = "Do responses start with uncertain tokens?"
test = "Mean over steps with autocorrelated errors."
figure = "first_tokens"
[X1.parts.entropy]
statistic = "mean entropy of the first three tokens"
null = "the first three tokens are certain"
unit = "nats"
direction = "positive"
smallest_effect = 0.01
limit = "steps"
sql = "first_tokens"
values = ["first_sum", "first_tokens"]
over = "run"
"""


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "questions"
    folder.mkdir()
    for name, text in {"first_tokens.sql": SQL, "first_tokens.py": FIGURE, "claims.toml": CLAIMS}.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.usefixtures("few_figures")
def test_sql_figure_and_claim_are_added(folder, tmp_path):
    runs = entrace.open_runs(FROZEN, questions=folder)
    rows = runs.query("first_tokens")
    assert rows.columns == ["run_id", "step", "prompt_id", "first_sum", "first_tokens"]
    assert entrace.figures.draw("first_tokens", runs).lines
    verdicts = judge(runs)
    assert {verdict.claim for verdict in verdicts} == {*load_ledger(), "X1"}
    own = next(verdict for verdict in verdicts if verdict.claim == "X1")
    by_step = rows.group_by("step").agg(pl.col("first_sum", "first_tokens").sum())
    assert own.effect == pytest.approx((by_step["first_sum"] / by_step["first_tokens"]).mean())
    assert own.low < own.effect < own.high
    assert own.sql == str(folder / "first_tokens.sql")
    page = write_report(runs, tmp_path / "report").read_text()
    assert "Entropy of the first three tokens." in page
    assert "where position &lt; 3" in page
    assert (tmp_path / "report" / "first_tokens.png").is_file()


def test_other_runs_do_not_see_them(folder):
    entrace.open_runs(FROZEN, questions=folder)
    with pytest.raises(InputError, match='unknown question "first_tokens"'):
        entrace.open_runs(FROZEN).query("first_tokens")


def test_the_command_takes_the_folder(folder):
    command = [sys.executable, "-m", "entrace", "claims", str(FROZEN), "--questions", str(folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "X1" in json.loads(done.stdout)["overall"]


def test_the_command_sql_names_the_file(folder, command):
    (folder / "first_tokens.sql").write_text(SQL.replace("sum(entropy)", "sum(entropi)"))
    code, _, err = command("sql", str(FROZEN), "--questions", str(folder), "--question", "first_tokens")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"entrace: {folder}/first_tokens.sql: sql: Binder Error")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("first_tokens.sql", "select 1", r'expected "-- question: ..." among the first lines'),
        ("first_tokens.sql", SQL.replace("needs: tokens", "needs: token"), 'needs: unknown value "token"'),
        ("stage_dynamics.sql", SQL, '"stage_dynamics" is a built-in question'),
        ("claims.toml", CLAIMS.replace("X1", "S1"), "claim S1 is built in"),
        ("claims.toml", CLAIMS.replace('sql = "first_tokens"', 'sql = "first_token"'), "sql: unknown question"),
        ("claims.toml", CLAIMS.replace('over = "run"', 'over = "all"'), "over: unknown value"),
        ("claims.toml", CLAIMS.replace(', "first_tokens"]', "]"), "values: expected two columns"),
        ("claims.toml", CLAIMS.replace("null = ", "note = "), '"null" is missing'),
        ("claims.toml", CLAIMS + "famly = 'x'", 'part "entropy": unknown key "famly"; valid: '),
        (
            "claims.toml",
            CLAIMS.replace("[X1.parts", "famly = 'x'\n[X1.parts"),
            'claim X1: unknown key "famly"; did you',
        ),
        ("claims.toml", CLAIMS.replace("0.01", "nan"), "smallest_effect is nan; expected a number, 0 or above"),
        ("claims.toml", CLAIMS.replace("0.01", "-0.5"), "smallest_effect is -0.5; expected a number"),
        ("claims.toml", CLAIMS.replace("0.01", "inf"), "smallest_effect is inf; expected a number"),
        ("claims.toml", CLAIMS.replace("0.01", "true"), "smallest_effect is True; expected a number"),
        ("claims.toml", CLAIMS.replace('"positive"', '"up"'), "direction is 'up'; expected \"positive\" or"),
        ("first_tokens.sql", SQL.replace("select run", "explain select run"), "first_tokens.sql: EXPLAIN describes a"),
        *[
            ("second.sql", SQL.replace("sum(entropy)", value), f"second.sql: csv cannot represent .* .first_sum {kind}")
            for value, kind in {"{'a': 1}": "Struct", "'a'::blob": "Binary"}.items()
        ],
        ("claims.toml", CLAIMS.replace('"first_sum"', '"first_sums"'), 'no column "first_sums"; did you mean'),
        (
            "claims.toml",
            CLAIMS.replace('"first_sum"', '"run_id"'),
            'column "run_id" has type String, expected a number',
        ),
        ("first_tokens.sql", SQL.replace("from tokens", "form tokens"), "first_tokens.sql: sql: Parser Error"),
        ("first_tokens.sql", SQL + "; select 2", "first_tokens.sql: sql is read-only: expected one query"),
        ("first_tokens.sql", SQL.replace("sum(entropy)", "sum(entropi)"), 'first_tokens.sql: sql: .*"entropi"'),
        ("first_tokens.sql", SQL.replace("$runs", "$only"), "first_tokens.sql: claim X1, .* a claim chooses runs"),
        ("first_tokens.sql", SQL.replace("entropy)", "run_id::float)"), "first_tokens.sql: sql: Conversion Error"),
        ("second.py", FIGURE, "second.py: a figure needs second.sql beside it"),
        ("first_tokens.py", "def paint(): ...", r"expected a function draw\(frame, ax\)"),
        ("first_tokens.py", "import nowhere", "first_tokens.py: cannot be imported"),
        ("first_tokens.py", "raise SystemExit", r"first_tokens.py: cannot be imported \(SystemExit\)"),
        ("first_tokens.py", "import sys; sys.exit('bye')", r"first_tokens.py: cannot be imported \(SystemExit: bye\)"),
        ("first_tokens.py", FIGURE.replace("first_sum", "first"), "first_tokens.py: draw failed"),
        ("first_tokens.py", FIGURE.replace("return ax", "raise SystemExit"), "first_tokens.py: draw failed"),
        ("first_tokens.py", FIGURE + "def size(frame): return frame['width']", "first_tokens.py: size failed"),
        ("first_tokens.py", FIGURE.replace("CAPTION =", "CAPTION = 1,"), "first_tokens.py: CAPTION: expected a text"),
    ],
)
@pytest.mark.usefixtures("few_figures")
def test_a_bad_file_is_one_line_before_the_long_work(folder, tmp_path, monkeypatch, name, text, message):
    (folder / name).write_text(text)
    started = []
    monkeypatch.setattr("entrace.analysis.claims.judge", started.append)
    with pytest.raises(InputError, match=message) as raised:
        write_report(entrace.open_runs(FROZEN, questions=folder), tmp_path / "report")
    assert "\n" not in str(raised.value)
    assert not started
    assert not (tmp_path / "report").exists()


def test_a_claim_may_name_a_column_twice(folder):
    (folder / "first_tokens.sql").write_text(SQL.replace("count(*)", "sum(position) as place_sum, count(*)"))
    values = '["first_sum", "first_tokens", "place_sum", "first_tokens"]'
    (folder / "claims.toml").write_text(CLAIMS.replace('["first_sum", "first_tokens"]', values))
    runs = entrace.open_runs(FROZEN, questions=folder)
    [verdict] = judge(runs, load_ledger(folder / "claims.toml", runs.questions))
    by_step = runs.query("first_tokens").group_by("step").agg(pl.col("first_sum", "place_sum", "first_tokens").sum())
    expected = (by_step["first_sum"] - by_step["place_sum"]) / by_step["first_tokens"]
    assert verdict.effect == pytest.approx(expected.mean())


def test_files_may_begin_with_a_byte_order_mark(folder):
    for name in ("first_tokens.sql", "claims.toml"):
        path = folder / name
        path.write_text(path.read_text(), encoding="utf-8-sig")
    runs = entrace.open_runs(FROZEN, questions=folder)
    assert runs.query("first_tokens").height
    assert "X1" in load_ledger(questions=runs.questions)


@pytest.mark.usefixtures("few_figures")
def test_sql_without_a_figure_has_its_rows_and_says_so(folder, tmp_path):
    (folder / "first_tokens.py").unlink()
    runs = entrace.open_runs(FROZEN, questions=folder)
    page = write_report(runs, tmp_path / "report").read_text()
    assert "Not drawn: the folder has no figure first_tokens.py." in page
    rows = pl.read_csv(tmp_path / "report" / "first_tokens.csv")
    assert rows["first_tokens"].to_list() == runs.query("first_tokens")["first_tokens"].to_list()
    with pytest.raises(InputError, match=r"first_tokens.sql: the question has no figure; write first_tokens.py"):
        entrace.figures.draw("first_tokens", runs)
    with pytest.raises(InputError, match='unknown figure "stage_dynamic"; did you mean "stage_dynamics"'):
        entrace.figures.draw("stage_dynamic", runs)


def test_sql_without_runs_is_about_all_runs(folder):
    (folder / "claims.toml").unlink()
    (folder / "first_tokens.sql").write_text(SQL.replace("($runs is null or list_contains($runs, run_id))", "true"))
    runs = entrace.open_runs(FROZEN, questions=folder)
    assert entrace.figures.draw("first_tokens", runs).lines


def test_parts_inherit_the_keys_of_their_claim(folder):
    lifted = 'unit = "nats"\n'
    shared = CLAIMS.replace(lifted, "").replace("[X1]\n", f"[X1]\n{lifted}")
    shared += shared.partition("[X1.parts.entropy]")[2].join(["[X1.parts.second]", 'unit = "bits"\n'])
    (folder / "claims.toml").write_text(shared)
    parts = load_ledger(questions=entrace.open_runs(FROZEN, questions=folder).questions)["X1"]["parts"]
    assert {part: spec["unit"] for part, spec in parts.items()} == {"entropy": "nats", "second": "bits"}


def test_an_unknown_parameter_names_the_file(folder):
    runs = entrace.open_runs(FROZEN, questions=folder)
    with pytest.raises(InputError, match=r'first_tokens.sql: unknown parameter "stage"; valid: runs'):
        runs.query("first_tokens", stage="rising")


def test_a_folder_without_questions(tmp_path):
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(InputError, match=r"holds no question; expected files such as <name>.sql, or claims.toml"):
        entrace.open_runs(FROZEN, questions=tmp_path)


def test_no_such_folder(tmp_path):
    with pytest.raises(InputError, match="no such folder of questions"):
        entrace.open_runs(FROZEN, questions=tmp_path / "nowhere")
