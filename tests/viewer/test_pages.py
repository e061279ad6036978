"""Test the pages of the viewer in a browser."""

from __future__ import annotations

import io
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image

from entrace.analysis import figures
from entrace.analysis.trace import Recorder, TraceWriter, Vocabulary
from entrace.analysis.viewer import responses
from tests.analysis.conftest import step_row
from tests.patience import HANG_S
from tests.slow import slow_after
from tests.viewer.conftest import FROZEN, Client, Tab

PAGES = (
    "/",
    # One step, since the audit of a page takes time proportional to its rows.
    "/responses?step=2",
    "/response?run=none-seed0&id=5",
    "/compare?r=none-seed0:5&r=none-seed0:6",
    "/compare",
    "/sql",
)


# The overview draws every figure near the view, each in a second. Tests name these; test_server.py asks for all.
SHOWN = ["stage_dynamics", "entropy_by_sample_sign", "ablation_final", "high_entropy_words", "engine_mismatch"]


@pytest.fixture(autouse=True)
def shown_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the overview show the figures that the tests name."""
    monkeypatch.setattr(figures, "STEMS", SHOWN)


def assert_accessible(page: Any) -> None:
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


@pytest.mark.parametrize("theme", slow_after(1, ["light", "dark"]))
@pytest.mark.parametrize("path", PAGES)
def test_pages_are_accessible(tab: Tab, frozen: Client, path: str, theme: str):
    tab.page.emulate_media(color_scheme=theme)
    page = tab.open(frozen.url + path)
    if path == "/":
        page.wait_for_selector(".plot img")
    assert page.locator("html").get_attribute("data-theme") == theme
    assert page.title().endswith("· entrace")
    assert_accessible(page)


@pytest.mark.parametrize("path", slow_after(3, PAGES))
def test_pages_fit_a_phone(tab: Tab, frozen: Client, path: str):
    tab.page.set_viewport_size({"width": 375, "height": 700})
    page = tab.open(frozen.url + path)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_mark_shows_its_row_and_opens_the_responses_behind_it(tab: Tab, frozen: Client):
    page = tab.open(frozen.url + "/")
    figure = page.locator("#entropy_by_sample_sign .hit")
    figure.scroll_into_view_if_needed()
    figure.wait_for()
    found = frozen.get("/api/figure/entropy_by_sample_sign")
    group = next(group for group in found["marks"] if group["y"] == "entropy")
    i = len(group["left"]) // 2
    row = {name: values[i] for name, values in group["columns"].items()}
    box = figure.bounding_box()
    page.mouse.move(box["x"] + group["left"][i] * box["width"], box["y"] + group["top"][i] * box["height"])
    tip = page.locator("#tip")
    tip.wait_for()
    text = tip.inner_text()
    for expected in (str(row["step"]), f"{row['entropy']:.4g}".rstrip("0"), "n ("):
        assert expected in text
    page.mouse.down()
    page.mouse.up()
    page.wait_for_url("**/responses?**")
    tab.settle()
    address = page.url
    assert f"step={row['step']}" in address
    assert f"sample_sign={row['sample_sign']}" in address
    steps = page.locator("tbody tr td:nth-child(2)").all_inner_texts()
    assert set(steps) == {str(row["step"])}
    # The way back, and the same view from its address.
    page.go_back()
    page.wait_for_selector("#entropy_by_sample_sign")
    page.go_forward()
    tab.settle()
    page.reload()
    tab.settle()
    assert page.url == address
    assert page.locator("tbody tr td:nth-child(2)").all_inner_texts() == steps


def test_figures_answer_to_the_keyboard(tab: Tab, frozen: Client):
    page = tab.open(frozen.url + "/")
    figure = page.locator("#stage_dynamics .hit")
    figure.wait_for()
    figure.focus()
    page.keyboard.press("ArrowRight")
    assert "step" in page.locator("#tip").inner_text()
    page.keyboard.press("Enter")
    page.wait_for_url("**/responses?**")


def test_the_scorecard_is_that_of_the_command(tab: Tab, frozen: Client):
    page = tab.open(frozen.url + "/")
    page.get_by_text("Scorecard: what these runs say").click()
    page.wait_for_selector("details table")
    verdicts = frozen.get("/api/scorecard")["verdicts"]
    # A link is the short name of a verdict; its statistic may be a formula.
    assert page.locator("details tbody a").all_inner_texts() == [verdict["part"] for verdict in verdicts]
    assert page.locator("details tbody tr:not(.group)").count() == len(verdicts)


def test_a_condition_is_checked_while_it_is_typed(tab: Tab, frozen: Client):
    page = tab.open(frozen.url + "/responses")
    condition = page.get_by_label("Condition in SQL")
    condition.fill("nothing > 1")
    problem = page.locator("#where-problem")
    tab.until(lambda: "nothing" in problem.inner_text())
    condition.fill("'abc'")
    tab.until(lambda: "true or false" in problem.inner_text())
    condition.fill("ppl > 1.1")
    tab.until(lambda: not problem.inner_text())
    page.keyboard.press("Enter")
    page.wait_for_url("**where=ppl**")
    tab.settle()
    total = frozen.get("/api/responses?where=ppl%20%3E%201.1")["num_rows"]
    assert f"{total:,}".replace(",", "") in page.locator("[role=status]").all_inner_texts()[-1].replace(",", "")
    page.get_by_role("button", name="Entropy").click()
    page.wait_for_url("**sort=entropy_mean**")
    tab.settle()
    shown = [float(text.replace("–", "inf")) for text in page.locator("tbody tr td:nth-child(9)").all_inner_texts()]
    assert shown == sorted(shown)


def test_a_search_for_text_is_shown_as_it_goes_and_stopped(tab: Tab, frozen: Client, monkeypatch: pytest.MonkeyPatch):
    search, stopped = responses._search, threading.Event()

    def hold(*args: Any, **options: Any) -> Iterator[Any]:
        """Wait before the third part until the page has stopped the search."""
        for part, found in enumerate(search(*args, **options)):
            if part == 2:
                stopped.wait(HANG_S)
            yield found

    monkeypatch.setattr(responses, "SEARCHED_ROWS", 1)
    monkeypatch.setattr(responses, "_search", hold)
    page = tab.page
    page.goto(f"{frozen.url}/responses?text=a&sort=-step")
    status = page.locator(".list [role=status]")
    tab.until(lambda: "searched so far" in status.inner_text())
    assert page.get_by_role("progressbar").is_visible()
    page.get_by_role("button", name="Stop").click()
    tab.until(lambda: "searched before the stop" in status.inner_text())
    stopped.set()
    assert page.locator("tbody tr").count() > 0
    assert not page.get_by_role("progressbar").is_visible()
    monkeypatch.undo()
    page.reload()
    tab.settle()
    total = frozen.get("/api/responses?text=a")["num_rows"]
    assert status.inner_text().replace(",", "") == f"{total} responses"


def test_a_slow_condition_is_stopped_before_its_first_rows(tab: Tab, frozen: Client, monkeypatch: pytest.MonkeyPatch):
    find, stopped = responses.find_responses, threading.Event()

    def hold(*args: Any, **options: Any) -> Iterator[Any]:
        stopped.wait(HANG_S)
        yield from find(*args, **options)

    monkeypatch.setattr(responses, "find_responses", hold)
    page = tab.page
    page.goto(f"{frozen.url}/responses?where=length(completion)>0")
    status = page.locator(".list [role=status]")
    tab.until(lambda: status.count() and status.inner_text() == "Searching…")
    page.get_by_role("button", name="Stop").click()
    tab.until(lambda: status.inner_text() == "Stopped.")
    stopped.set()
    assert not page.get_by_role("button", name="Stop").is_visible()
    assert not page.get_by_role("button", name="Compare").is_visible()


def test_the_way_back_to_the_list_restores_its_place(tab: Tab, frozen: Client):
    page = tab.open(frozen.url + "/responses?sort=-ppl&page=2")
    row = page.locator("tbody tr").nth(40)
    for way in ("link", "nav", "button"):
        row.scroll_into_view_if_needed()
        page.evaluate("scrollBy({ top: 37, behavior: 'instant' })")
        top = page.evaluate("scrollY")
        assert top > 300
        row.locator("td.text a").click()
        page.wait_for_url("**/response?**")
        tab.settle()
        page.locator(".tokens").focus()
        page.keyboard.press("n")
        tab.settle()
        if way == "link":
            page.get_by_role("link", name="Back to the list").click()
        elif way == "nav":
            page.get_by_role("link", name="Responses", exact=True).click()
        else:
            page.go_back()
            page.go_back()
        page.wait_for_url("**/responses?sort=-ppl&page=2")
        tab.settle()
        tab.until(lambda top=top: page.evaluate("scrollY") == top)


def test_a_wrong_response_is_compared_with_a_correct_one_in_one_click(tab: Tab, frozen: Client):
    columns = frozen.get("/api/responses?is_correct=false&sort=-step")["columns"]
    wrong = next(
        rollout
        for rollout in columns["rollout_id"]
        if frozen.get(f"/api/response?run=none-seed0&id={rollout}")["neighbors"]["opposite"] is not None
    )
    page = tab.open(f"{frozen.url}/response?run=none-seed0&id={wrong}")
    page.get_by_role("button", name="Compare with a correct response").click()
    page.wait_for_url("**/compare?**")
    tab.settle()
    assert page.locator(".columns .chip").all_inner_texts() == ["wrong", "correct"]
    first = page.url.split("&color")[0]
    page = tab.open(f"{frozen.url}/responses?is_correct=false&sort=-step")
    i = columns["rollout_id"].index(wrong)
    page.locator("tbody tr").nth(i).get_by_role("link", name="vs correct").click()
    page.wait_for_url("**/compare?r=**")
    tab.settle()
    assert page.url == first
    page.reload()
    tab.settle()
    assert page.locator(".columns .chip").all_inner_texts() == ["wrong", "correct"]


def test_a_misspelled_parameter_is_named_on_the_page(tab: Tab, frozen: Client):
    page = tab.open(frozen.url + "/response?run=none-seed0&id=5&collor=category")
    notice = page.locator("#mistake")
    assert notice.inner_text() == 'unknown parameter "collor" in the address; did you mean "color"?'
    page.get_by_role("link", name="Overview").click()
    tab.settle()
    assert not notice.is_visible()


def test_positions_and_steps_have_no_halves(tab: Tab, frozen: Client):
    page = tab.open(frozen.url + "/response?run=none-seed0&id=5")
    whole, free = (
        page.evaluate(f"axes({x}, 'x', 'y')[0].incrs?.every(Number.isInteger)") for x in ("[0, 1, 2]", "[0, 0.5]")
    )
    assert whole
    assert free is None


def test_a_dark_figure_stands_on_the_color_of_its_card(tab: Tab, frozen: Client):
    tab.page.emulate_media(color_scheme="dark")
    page = tab.open(frozen.url + "/")
    image = page.locator("#stage_dynamics .plot")
    image.locator("img").wait_for()
    page.wait_for_timeout(200)
    pixels = np.asarray(Image.open(io.BytesIO(image.screenshot())).convert("RGB"))
    card = page.locator("#stage_dynamics").evaluate("node => getComputedStyle(node).backgroundColor")
    expected = tuple(map(int, re.findall(r"\d+", card)))
    for corner in (pixels[2, 2], pixels[2, -3], pixels[-3, 2], pixels[-3, -3]):
        assert tuple(corner) == expected


def test_a_malformed_deep_link_says_why_and_the_rest_keeps_working(tab: Tab, frozen: Client):
    for path, expected in (
        ("/response?run=nobody&id=1", "no run"),
        ("/response?run=none-seed0", "not an integer"),
        ("/responses?where=1)%20or%20(1", "where"),
        ("/compare?r=a&r=b", "no run"),
    ):
        page = tab.open(frozen.url + path)
        assert expected in page.locator("#content .error[role=alert]").inner_text()
        # The browser logs the refusal, which is expected here.
        tab.problems[:] = [text for text in tab.problems if "status of 400" not in text]
        page.get_by_role("link", name="Overview", exact=True).click()
        page.wait_for_selector("h2")


def test_tokens_show_color_text_and_every_column(tab: Tab, frozen: Client):
    page = tab.open(frozen.url + "/response?run=none-seed0&id=5")
    tokens = frozen.get("/api/response?run=none-seed0&id=5")["tokens"]
    last = len(tokens["token_id"]) - 1
    assert page.locator(".tokens i").count() == len(tokens["token_id"])
    strongest = int(np.argmax(tokens["entropy"]))
    assert "p5" in page.locator(f".tokens i[data-i='{strongest}']").get_attribute("class")
    page.locator(".tokens").focus()
    page.keyboard.press("Home")
    for _ in range(strongest):
        page.keyboard.press("ArrowRight")
    panel = page.locator(".side").inner_text()
    for name in ("entropy", "log-probability", "advantage", "gradient norm", "category"):
        assert name in panel
    assert f"Token at position {strongest}," in panel
    page.wait_for_url(f"**position={strongest}**")
    page.keyboard.press("End")
    page.wait_for_url(f"**position={last}**")
    page.get_by_label("Color tokens by").select_option("category")
    page.wait_for_url("**color=category**")
    category = tokens["category"][0]
    assert f"c-{category}" in page.locator(".tokens i[data-i='0']").get_attribute("class")
    page.reload()
    tab.settle()
    assert page.get_by_label("Color tokens by").input_value() == "category"
    assert "here" in page.locator(f".tokens i[data-i='{last}']").get_attribute("class")
    page.keyboard.press("n")
    page.wait_for_url("**id=6**")


ODD = ["<eos>", " so", "\n\n", "  ", "<0xF0>", "שלום", " עולם", "\u202e", "<script>alert(1)</script>", "\t", ""]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a trace with unusual tokens and mostly unknown values.

    It has two turns and tool output.
    """
    folder = tmp_path_factory.mktemp("odd") / "odd"
    special = [True, *[False] * (len(ODD) - 1)]
    with Recorder(folder, Vocabulary(ODD, special), temperature=1.0) as recorder:
        for step in (1, 2):
            ids = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0], [1, 5, 0]]
            masks = [[i not in (2, 3) for i in range(11)], [True] * 3]
            turns = [[int(i > 3) for i in range(11)], [0] * 3]
            entropy = [[0.1 * i for i in range(11)], [0.5, 0.2, 0.1]]
            recorder.record(
                step,
                prompt=["q", "q"],
                response_ids=ids,
                loss_mask=masks,
                turn=turns,
                entropy=entropy,
                reward=[1.0, 0.0],
            )
    return folder


def test_unusual_tokens_are_shown_for_what_they_are(tab: Tab, odd: Path, served: Callable[..., Client]):
    client = served(odd)
    rollout = client.get("/api/responses?sort=step")["columns"]["rollout_id"][0]
    page = tab.open(f"{client.url}/response?run=odd&id={rollout}")
    texts = page.locator(".tokens i").evaluate_all("nodes => nodes.map((node) => node.textContent)")
    assert texts[:3] == [" so", "↵\n↵\n", "␣␣"]
    assert texts[3:10] == ["<0xF0>", "שלום", " עולם", "\\u202e", "<script>alert(1)</script>", "⇥\t", "␀"]

    def classes(i: int) -> set[str]:
        return set(page.locator(f".tokens i[data-i='{i}']").get_attribute("class").split())

    assert "special" in classes(10)
    # Tool output is context, and its entropy is unknown.
    assert {"context", "none"} <= classes(2) & classes(3)
    assert not {"context", "none"} & classes(4)
    assert page.get_by_text("Not recorded").count() == 1
    page.get_by_label("Color tokens by").select_option("turn")
    assert "t0" in classes(0)
    assert "t1" in classes(5)
    assert_accessible(page)
    found = client.get("/api/responses?turns=1")
    assert found["num_rows"] == 2


def test_a_trace_with_nulls_has_every_page(tab: Tab, odd: Path, served: Callable[..., Client]):
    client = served(odd)
    columns = client.get("/api/responses")["columns"]
    keys = [f"odd:{rollout}" for rollout in columns["rollout_id"][:2]]
    for path in (
        "/",
        "/responses",
        f"/compare?r={keys[0]}&r={keys[1]}",
        f"/compare?prompt_id={columns['prompt_id'][0]}",
    ):
        page = tab.open(client.url + path)
        if path == "/":
            page.locator("#engine_mismatch").scroll_into_view_if_needed()
            page.locator("#engine_mismatch").get_by_text("Not drawn").wait_for()
        assert not page.locator(".error:not(:empty)").count()


def test_responses_are_compared_where_they_diverge(tab: Tab, frozen: Client):
    columns = frozen.get("/api/responses?sort=prompt_id")["columns"]
    prompt = columns["prompt_id"][0]
    page = tab.open(f"{frozen.url}/compare?prompt_id={prompt}")
    boxes = page.get_by_role("checkbox")
    boxes.nth(0).check()
    assert page.get_by_role("button", name="Compare 1").is_disabled()
    boxes.nth(1).check()
    page.get_by_role("button", name="Compare 2").click()
    page.wait_for_url("**/compare?r=**")
    tab.settle()
    page.wait_for_selector(".columns .tokens")
    keys = re.findall(r"r=([^&]+)", page.url)
    first, second = (
        frozen.get(f"/api/response?run={run}&id={rollout}")["tokens"]["token_id"]
        for run, rollout in (key.replace("%3A", ":").split(":") for key in keys)
    )
    shared = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    if first != second:
        assert f"They share {shared} tokens" in page.locator("#content").inner_text()
    # Every token is shown once.
    assert page.locator(".columns .tokens i").count() == len(first) + len(second)


def test_a_long_response_scrolls_and_recolors_without_a_pause(tab: Tab, tmp_path: Path, served: Callable[..., Client]):
    rng = np.random.default_rng(0)
    number = 10_000
    ids = rng.integers(0, 500, number)
    with Recorder(tmp_path / "long", [f" w{i}" for i in range(500)], temperature=1.0) as recorder:
        measured = {name: [rng.random(number)] for name in ("entropy", "advantage")}
        recorder.record(1, prompt=["q"], response_ids=[ids], logprob=[-rng.random(number)], reward=[1.0], **measured)
    client = served(tmp_path / "long")
    rollout = client.get("/api/responses")["columns"]["rollout_id"][0]
    page = tab.open(f"{client.url}/response?run=long&id={rollout}")
    # Only tokens in view are elements; the rest is text.
    assert 0 < page.locator(".tokens i").count() < number / 2
    assert page.locator(".tokens").evaluate("node => node.textContent.length") > 3 * number
    pauses = page.evaluate(
        """async () => {
          const pauses = [];
          new PerformanceObserver((list) => pauses.push(...list.getEntries().map((e) => e.duration)))
            .observe({ type: "longtask" });
          const box = document.querySelector(".tokens");
          const frame = () => new Promise(requestAnimationFrame);
          for (let i = 0; i <= 40; i++) { box.scrollTop = (box.scrollHeight * i) / 40; await frame(); await frame(); }
          const picker = document.querySelector("[aria-label='Color tokens by']");
          for (const name of ["logprob", "advantage", "entropy"]) {
            picker.value = name;
            picker.dispatchEvent(new Event("change"));
            await new Promise((done) => setTimeout(done, 200));
          }
          return pauses;
        }"""
    )
    # The target is 50 ms on a quiet machine; this one may be shared.
    assert np.median(pauses or [0]) < 150
    page.keyboard.press("End")
    page.locator(f".tokens i.here[data-i='{number - 1}']").wait_for()


def test_the_console_completes_runs_plots_remembers_and_stops(tab: Tab, frozen: Client):
    page = tab.open(frozen.url + "/sql")
    editor = page.get_by_role("textbox", name="SQL query")
    editor.click()
    for typed, offered in (("select * from rollo", "rollouts"), (" where surpr", "surprisal_mean")):
        page.keyboard.type(typed, delay=20)
        page.locator(".cm-tooltip-autocomplete li", has_text=offered).first.wait_for()
        page.keyboard.press("Enter")
    page.keyboard.press("Control+a")
    page.keyboard.type("select step, avg(reward) as reward from rollouts group by all order by step")
    page.keyboard.press("Escape")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".rows tbody tr td")
    assert page.locator(".rows th").all_inner_texts() == ["step", "reward"]
    page.get_by_role("button", name="Plot").click()
    page.wait_for_selector(".uplot canvas")
    with page.expect_download() as download:
        page.get_by_role("button", name="Parquet").click()
    frame = pl.read_parquet(download.value.path())
    assert frame.columns == ["step", "reward"]
    page.reload()
    tab.settle()
    page.wait_for_selector(".rows tbody tr td")
    assert "avg(reward)" in page.get_by_label("History").inner_text()
    page.get_by_role("textbox", name="SQL query").click()
    page.keyboard.press("Control+a")
    page.keyboard.type("select count(*) from range(100000000000) a(i), range(100000) b(j) where hash(i + j) = 3")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Run").click()
    page.get_by_text("Running…").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("sql: stopped").wait_for()
    page.get_by_role("textbox", name="SQL query").click()
    page.keyboard.press("Control+a")
    page.keyboard.type("select i from range(100000000000) a(i)")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="CSV").click()
    tab.until(lambda: re.search(r"Exporting CSV… \d+ s.*, [\d,]+ rows", page.locator("#content").inner_text()))
    assert page.get_by_role("button", name="Run").is_disabled()
    page.get_by_role("button", name="Stop").click()
    # The browser reports both stopped requests, the second one perhaps later.
    tab.until(lambda: sum("status of 400" in text for text in tab.problems) == 2)
    tab.until(lambda: page.get_by_text("sql: stopped").count() == 2)
    tab.problems[:] = [text for text in tab.problems if "status of 400" not in text]


def test_a_long_result_keeps_only_rows_in_view(tab: Tab, frozen: Client):
    query = "select range as i, 'x' || range as text from range(50000)".replace(" ", "%20")
    page = tab.open(f"{frozen.url}/sql?q={query}&limit=50000")
    page.wait_for_selector(".rows tbody tr td")
    assert page.locator(".rows tbody tr").count() < 300
    page.locator(".rows").evaluate("node => { node.scrollTop = node.scrollHeight; }")
    page.get_by_role("cell", name="x49999", exact=True).wait_for()


@pytest.mark.parametrize(
    "path",
    ["/response?run=none-seed0&id=5", "/compare?r=none-seed0:5&r=none-seed0:6", "/sql?q=select%20step%20from%20steps"],
)
def test_a_saved_view_opens_without_a_server(tab: Tab, frozen: Client, tmp_path: Path, path: str):
    page = tab.open(frozen.url + path)
    page.wait_for_selector(".tokens i, .rows td")
    page.wait_for_load_state("networkidle") if "sql" in path else page.wait_for_timeout(500)
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as HTML").click()
    saved = tmp_path / "saved.html"
    download.value.save_as(saved)
    text = page.locator(".tokens, .rows").first.inner_text()
    page = tab.open(saved.as_uri())
    assert page.locator(".tokens, .rows").first.inner_text() == text
    assert not page.locator("a[href^='http'], a[href^='/']").count()
    assert "script-src 'sha256-" in saved.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "path", slow_after(3, ["/", "/response", "/sql?q=select%20*%20from%20rollouts", "/responses", "/compare"])
)
def test_hostile_text_is_shown_and_never_acted_on(tab: Tab, hostile: Client, path: str, tmp_path: Path):
    columns = hostile.get("/api/responses")["columns"]
    run, rollout = columns["run_id"][0], columns["rollout_id"][0]
    quoted = json.dumps(run)
    if path == "/response":
        path += f"?run={_quote(run)}&id={rollout}"
    if path == "/compare":
        path += "?" + "&".join(f"r={_quote(run)}:{columns['rollout_id'][i]}" for i in (0, 1))
    page = tab.open(hostile.url + path)
    if path == "/":
        for stem in ("stage_dynamics", "ablation_final", "high_entropy_words"):
            page.locator(f"#{stem}").scroll_into_view_if_needed()
            page.locator(f"#{stem}:not([aria-busy])").wait_for()
    if path.startswith("/sql"):
        page.wait_for_selector(".rows td")
    assert "<script>alert(1)</script>" in page.locator("body").inner_text(), quoted
    # Nothing of the trace became an element or an attribute that runs.
    assert not page.locator(
        "#content script, #content iframe, #content [onload], #content [onerror], img[src='x']"
    ).count()
    if path.startswith(("/response?", "/sql")):
        with page.expect_download() as download:
            page.get_by_role("button", name="Save as HTML").click()
        saved = tmp_path / "saved.html"
        download.value.save_as(saved)
        page = tab.open(saved.as_uri())
        assert "<script>alert(1)</script>" in page.locator("body").inner_text()


def _quote(text: str) -> str:
    from urllib.parse import quote

    return quote(text, safe="")


def test_two_runs_are_side_by_side(tab: Tab, hostile: Client, odd: Path, served: Callable[..., Client]):
    page = tab.open(served(FROZEN, odd).url + "/")
    assert page.locator("main table").first.locator("tbody tr").count() == 2
    page = tab.open(page.url.rstrip("/") + "/responses?run_id=odd")
    assert set(page.locator("tbody tr td:nth-child(3)").all_inner_texts()) == {"odd"}


def test_a_run_in_training_updates_the_page(tab: Tab, tmp_path: Path, served: Callable[..., Client]):
    writer = TraceWriter.create(
        tmp_path / "live", {"run_id": "live", "arm": "none", "seed": 0, "total_steps": 30}, ["a"]
    )

    def record(steps: range) -> None:
        for step in steps:
            writer.append("steps", step_row(step, entropy=1 / step, accuracy=0.5))
            writer.end_step(step)
        writer.flush()

    record(range(1, 6))
    page = tab.open(served(tmp_path / "live").url + "/")
    page.get_by_role("cell", name="5 of 30", exact=True).wait_for()
    time.sleep(0.5)
    record(range(6, 12))
    page.get_by_role("cell", name="11 of 30", exact=True).wait_for()
    writer.finish()
