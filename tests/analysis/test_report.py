"""Test that reports stand alone, escape text, and leave others' folders alone."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import polars as pl
import pytest

from entrace.analysis import figures
from entrace.analysis.effects.estimate import count
from entrace.analysis.figures import STEMS
from entrace.analysis.report import MARK, _provenance, num_parts, write_report
from entrace.analysis.runs import Runs, open_runs
from entrace.analysis.terminal.export import to_report_csv
from entrace.analysis.trace import InputError, TraceWriter, write_manifest
from tests.analysis.conftest import step_row, write_failed, write_steps, written
from tests.analysis.synthetic import write_run
from tests.slow import slow, slow_after

HOSTILE = '<script>alert("x")</script>'


# One figure of each part of the report, and the one whose table is checked; test_figures.py draws the others.
SOME = ["stage_dynamics", "impact_by_position", "entropy_by_position", "paired_differences", "ablation_final"]


@pytest.fixture(scope="module", params=[SOME, slow(STEMS)], ids=["some", "all"])
def stems(request: pytest.FixtureRequest) -> list[str]:
    return request.param


@pytest.fixture(scope="module")
def report(study: Runs, stems: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "STEMS", stems)
        return write_report(study, tmp_path_factory.mktemp("report") / "out").parent


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]


def test_report_holds_page_figures_and_data(report: Path, stems: list[str]):
    expected = {f"{stem}.{form}" for stem in stems for form in ("png", "pdf", "csv")}
    compared = {"comparison.csv", "comparison_by_seed.csv", "comparison_aggregates.csv"}
    assert {path.name for path in report.iterdir()} == {"report.html", "claims.json", *compared, *expected}
    assert sum(path.stat().st_size for path in report.iterdir()) < 3_500_000


def test_page_opens_offline(report: Path, stems: list[str]):
    page = (report / "report.html").read_text()
    links = Links()
    links.feed(page)
    assert links.tags.isdisjoint({"link", "iframe"})
    assert page.count("<script>") == page.count("<script") == 1
    assert sum(source.startswith("data:image/png;base64,") for source in links.sources) == len(stems)
    # Claims link to figures that are left out here.
    left_out = {f"#{stem}" for stem in STEMS} - {f"#{stem}" for stem in stems}
    for link in (source for source in links.sources if not source.startswith("data:") and source not in left_out):
        assert f'id="{link[1:]}"' in page if link.startswith("#") else (report / link).is_file()
    assert not re.search(r"@import|url\(|https?:", page)


def test_page_allows_only_its_own_script(report: Path):
    page = (report / "report.html").read_text()
    script = page[page.index("<script>") + 8 : page.index("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}';" in page


def test_contents_lead_to_every_figure_with_its_query_and_data(report: Path, stems: list[str]):
    page = (report / "report.html").read_text()
    contents = page[page.index("<nav") : page.index("</nav>")]
    assert [link for link in re.findall(r'href="#(\w+)"', contents) if link in STEMS] == stems
    for stem in stems:
        section = page[page.index(f'id="{stem}"') :].split("</section>")[0]
        assert f'<a href="#{stem}-sql">SQL</a>' in section
        assert f'<details id="{stem}-sql">' in section
        assert f'<a href="{stem}.csv">CSV</a>' in section


def test_page_shows_failed_runs_queries_and_verdicts(report: Path):
    page = (report / "report.html").read_text()
    assert "step 3: loss is nan" in page
    assert "analysis/sql/token/entropy_by_position.sql" in page
    assert "select * from final" in page
    assert page.count('class="chip supported"') > 5
    scorecard = json.loads((report / "claims.json").read_text())
    assert scorecard["overall"]["S2"] == "supported"
    assert all(verdict["null"] in html.unescape(page) for verdict in scorecard["verdicts"])


def test_final_table_in_csv_keeps_failed_runs(report: Path):
    rows = pl.read_csv(report / "ablation_final.csv").filter(run_id="broken-seed0")
    assert rows["status"].to_list() == ["failed"]


@pytest.mark.usefixtures("few_figures")
def test_report_replaces_a_report_with_equal_bytes_and_shows_progress(report: Path, study: Runs, tmp_path: Path):
    first = write_report(study, tmp_path / "first").parent
    again = tmp_path / "again"
    again.mkdir()
    (again / "report.html").write_text((report / "report.html").read_text())
    seen: list[int] = []
    write_report(study, again, on_step=lambda done, name: seen.append(done))
    assert seen == list(range(1, num_parts(study) + 1))
    for path in first.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_report_replaces_nothing_but_a_report(tiny: Runs, tmp_path: Path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "report.html").write_text("mine")
    with pytest.raises(InputError, match="holds files other than a report"):
        write_report(tiny, tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["report.html"]
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "report"):
        with pytest.raises(InputError, match="file: is a file; name a folder"):
            write_report(tiny, out)


def test_hostile_names_and_errors_are_escaped(tmp_path: Path):
    folder = write_steps(tmp_path / "run")
    manifest = json.loads((folder / "run.json").read_text())
    hostile = {"run_id": "tiny", "arm": HOSTILE, "study": HOSTILE, "error": HOSTILE, "config": {"a": HOSTILE}}
    write_manifest(folder, {**manifest, **hostile})
    write_failed(tmp_path / "broken", error=HOSTILE)
    page = write_report(open_runs([folder, tmp_path / "broken"]), tmp_path / "out").read_text()
    assert HOSTILE not in page
    assert "&lt;script&gt;" in page


def test_comparison_stands_on_the_page_and_beside_it(report: Path):
    page = (report / "report.html").read_text()
    section = page[page.index('<h2 id="comparison">') : page.index('<h2 id="final">')]
    # The arm ppl was planted .2 above the baseline.
    assert 'class="chip better"' in section
    assert "<td>broken-seed0</td>" in section
    assert "failed: step 3: loss is nan" in section
    assert "prompts and seeds" in section
    rows = pl.read_csv(report / "comparison.csv")
    primary = rows.filter(is_primary=True)
    assert primary.select("arm", "baseline", "metric", "verdict", "num_seeds").rows() == [
        ("ppl", "none", "avg_at_k", "better", 3)
    ]
    assert 0.15 < primary["difference"][0] < 0.25
    assert rows.height > 5
    assert pl.read_csv(report / "comparison_by_seed.csv").filter(metric="avg_at_k")["seed"].to_list() == [0, 1, 2]
    assert pl.read_csv(report / "comparison_aggregates.csv")["arm"].to_list() == ["none", "ppl"]


def test_report_without_another_arm_has_no_comparison_and_removes_an_earlier_one(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.html").write_text(MARK)
    (tmp_path / "out" / "comparison.csv").write_text("earlier")
    page = write_report(open_runs(write_steps(tmp_path / "run")), tmp_path / "out").read_text()
    assert "Comparison</h2>" not in page
    assert not list((tmp_path / "out").glob("comparison*"))


def test_configuration_stands_once_and_other_runs_show_what_differs(report: Path, study: Runs):
    page = (report / "report.html").read_text()
    assert len(page) < 1_500_000
    assert page.count("<summary>Configuration</summary>") == 1
    assert page.count("<code>shaping.name = &#34;ppl&#34;</code>") == 3
    runs = {run["run_id"]: run for run in _provenance(study)["runs"]}
    assert runs["none-seed1"]["changes"] == []
    assert runs["ppl-seed2"]["changes"] == [("shaping.name", '"ppl"')]
    assert runs["broken-seed0"]["changes"] == []


def test_long_tables_are_folded(tmp_path: Path):
    def page(num_runs: int) -> str:
        for seed in range(num_runs):
            write_failed(tmp_path / str(num_runs) / f"broken-seed{seed}")
        return write_report(open_runs(tmp_path / str(num_runs)), tmp_path / f"out{num_runs}").read_text()

    assert "<summary>12 rows</summary>" not in page(12)
    long = page(13)
    assert "<details><summary>13 rows</summary>" in long
    assert long.count("<details") == long.count("</details>")


def test_report_of_a_run_without_data(tmp_path: Path):
    page = write_report(open_runs(write_failed(tmp_path / "broken")), tmp_path / "out").read_text()
    remedy = "train with record.after_update_every from 1 to the number of steps"
    assert f"Not drawn: no after-update values were recorded; {remedy}." in page
    assert "step 3: loss is nan" in page
    assert not list((tmp_path / "out").glob("*.png"))


@pytest.mark.parametrize("cell", ["=1+1", "+1", "-1", "@x", "\tx"])
def test_text_cells_do_not_run_as_formulas(cell: str):
    lines = to_report_csv(pl.DataFrame({"text": [cell, "plain"], "number": [-1.23456789, 2.0]})).splitlines()
    assert lines[1].strip('"').startswith("'")
    assert lines[1].endswith("-1.23457")
    assert lines[2] == "plain,2.0"


def test_formats_for_scripts_keep_values():
    frame = pl.DataFrame({"a": [1, 2], "names": [["x", "y"], []], "b": [0.1, None]})
    assert written(frame, "csv").decode().splitlines() == ["a,names,b", "1,x;y,0.1", '2,"",']
    assert json.loads(written(frame, "json")) == frame.to_dicts()
    assert pl.read_parquet(written(frame, "parquet")).equals(frame)
    assert "| 1 " in written(frame, "table").decode()


def test_long_table_says_how_much_is_missing():
    assert "250 rows in all" in written(pl.DataFrame({"a": range(250)}), "table").decode()


@pytest.mark.parametrize("steps", slow_after(1, [(1, 2), (1,), (1, 100), (1, 100, 200)]), ids=str)
def test_runs_of_a_few_steps_have_a_report(steps: tuple[int, ...], tmp_path: Path):
    write_report(open_runs(write_steps(tmp_path / "few", steps)), tmp_path / "report")
    assert (tmp_path / "report" / "exchange_law.png").exists()
    verdicts = json.loads((tmp_path / "report" / "claims.json").read_text())["verdicts"]
    assert {verdict["verdict"] for verdict in verdicts if verdict["claim"] != "S1"} == {"not recorded"}
    assert f"the run has {count(steps, 'step')}; a trend needs 20" in verdicts[0]["why"]


def test_what_cannot_be_known_is_said_with_its_reason(tmp_path: Path):
    unknown = {"interventions": "an imported trace has no <checkpoint>", "steps.loss": "not among the rows"}
    manifest = {"run_id": "r", "imported": {"rows": 2}, "unknown": unknown}
    writer = TraceWriter.create(tmp_path / "r", manifest, ["a"])
    for step in (3, 20):
        writer.append("steps", step_row(step, entropy=1.0, accuracy=0.5) | {"loss": None})
    writer.flush(20)
    writer.finish()
    runs = open_runs(tmp_path / "r")
    assert runs.notes["r"] == "2 recorded quantities are unknown; see `unknown` in run.json"
    page = write_report(runs, tmp_path / "report").read_text()
    assert "Not drawn: an imported trace has no &lt;checkpoint&gt;" in page
    assert "steps.loss: not among the rows" in page
    # Of runs that differ in what they lack, the general hint is all that holds for both.
    TraceWriter.create(tmp_path / "s", {"run_id": "s"}, ["a"]).finish()
    assert "entrace intervene" in open_runs([tmp_path / "r", tmp_path / "s"]).why_empty("impact_by_position")


@pytest.mark.parametrize(
    ("plateau_step", "text"),
    [
        (25, "while training, the plateau was detected at step 25, within the interval of the boundary"),
        (55, "while training, the plateau was detected at step 55, outside the interval of the boundary"),
        (None, "while training, no plateau was detected"),
    ],
)
def test_page_shows_the_plateau_that_was_detected_while_training(plateau_step: int | None, text: str, tmp_path: Path):
    path = write_run(tmp_path / "run")
    manifest = json.loads((path / "run.json").read_text())
    write_manifest(path, {**manifest, "plateau_step": plateau_step})
    [run] = _provenance(open_runs(path))["runs"]
    assert run["online"] == text
