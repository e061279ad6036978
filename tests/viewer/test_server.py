"""Test the data that the viewer serves, its limits, and whom it refuses."""

from __future__ import annotations

import json
import math
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote

import polars as pl
import pytest

from entrace.analysis import figures
from entrace.analysis.runs import open_runs
from entrace.analysis.trace import InputError, TraceWriter
from entrace.analysis.viewer import console, responses, server
from entrace.analysis.viewer.responses import align
from entrace.analysis.viewer.session import Session
from tests.analysis.conftest import step_row, write_tiny
from tests.analysis.synthetic import write_run
from tests.patience import HANG_S
from tests.slow import slow, slow_after
from tests.test_hostile import rewrite
from tests.viewer.conftest import FROZEN, Client

ENDLESS = "select count(*) from range(100000000000) a(i), range(100000) b(j) where hash(i + j) = 3"


def test_runs_and_figures_are_those_of_the_report(tiny: Client):
    found = tiny.get("/api/runs")
    assert [(run["run_id"], run["arm"], run["steps"]) for run in found["runs"]] == [("tiny", "none", 24)]
    assert found["runs"][0]["stages"][0]["stage"] == "rising"
    assert [figure["stem"] for figure in tiny.get("/api/figures")] == figures.STEMS
    verdicts = tiny.get("/api/scorecard")
    assert {verdict["claim"] for verdict in verdicts["verdicts"]} == set(verdicts["overall"])


@pytest.mark.parametrize("stem", slow_after(4, figures.STEMS))
def test_every_figure_tells_what_is_under_the_pointer(frozen: Client, stem: str):
    found = frozen.get(f"/api/figure/{stem}")
    runs = open_runs(FROZEN)
    if figures.is_drawable(figures.query(runs, stem)):
        assert found["svg"].lstrip().startswith("<?xml")
        assert found["marks"]
        for group in found["marks"]:
            assert all(0 <= share <= 1 for share in group["left"] + group["top"])
            assert {len(values) for values in group["columns"].values()} == {len(group["left"])}
            assert {group["x"], group["y"]} <= group["columns"].keys()
    else:
        assert found["lacks"]


def test_marks_are_where_their_values_are(tiny: Client):
    found = tiny.get("/api/figure/stage_dynamics")
    group = next(group for group in found["marks"] if group["y"] == "entropy_token_mean")
    steps, entropy = group["columns"]["step"], group["columns"]["entropy_token_mean"]
    assert steps == list(range(1, 25))
    # Both axes are linear: places are proportional to differences of the values, and upward is a smaller share.
    assert [
        (left - group["left"][0]) / (group["left"][-1] - group["left"][0]) for left in group["left"]
    ] == pytest.approx([(step - 1) / 23 for step in steps], abs=1e-3)
    fall = [(top - group["top"][0]) / (group["top"][-1] - group["top"][0]) for top in group["top"]]
    assert fall == pytest.approx([(value - entropy[0]) / (entropy[-1] - entropy[0]) for value in entropy], abs=1e-3)


# Conditions of a category, a range, and a text; of the other figures, conditions have the same forms or are absent.
WITH_CONDITIONS = ["category_shares", "word_changes", "accuracy_by_ppl_decile", "high_entropy_words"]


@pytest.mark.parametrize("stems", [WITH_CONDITIONS, slow(figures.STEMS)], ids=["some", "all"])
def test_every_bin_that_names_a_condition_selects_responses(frozen: Client, stems: list[str]):
    conditions = 0
    for stem in stems:
        found = frozen.get(f"/api/figure/{stem}")
        for where in {where for group in found.get("marks", []) for where in group["where"][:3] if where}:
            quoted = quote(where)
            assert frozen.get(f"/api/check?where={quoted}")["problem"] is None, (stem, where)
            conditions += 1
    assert conditions > 5


def test_responses_are_filtered_and_sorted_as_sql_does(frozen: Client):
    runs = open_runs(FROZEN)
    expected = runs.sql(
        "select rollout_id from staged_responses where ppl > 1.1 and stage = 'rising' "
        "order by entropy_mean desc, rollout_id limit 50"
    )
    found = frozen.get("/api/responses?where=ppl%20%3E%201.1&stage=rising&sort=-entropy_mean")
    assert found["columns"]["rollout_id"] == expected["rollout_id"].to_list()
    total = runs.sql("select count(*) from staged_responses where ppl > 1.1 and stage = 'rising'").item()
    assert found["num_rows"] == total


@pytest.mark.parametrize(
    "where",
    [
        *("1) or (1", "true); drop table runs; --", "nothing = 1", "ppl > $x", "select", "ppl >", "'", "ppl > 1 /*"),
        *("'abc'", "1 + 1", "count(*) > 1"),
    ],
)
def test_a_condition_that_is_none_is_refused_in_one_line(frozen: Client, where: str):
    quoted = quote(where)
    assert frozen.get(f"/api/check?where={quoted}")["problem"]
    assert frozen.error(f"/api/responses?where={quoted}")


def test_a_condition_must_be_true_or_false(frozen: Client):
    found = frozen.get("/api/check?where=%27abc%27")["problem"]
    assert found == "where: expected a condition that is true or false, such as ppl > 1.5; found VARCHAR"
    assert frozen.error("/api/responses?where=%27abc%27") == found
    assert frozen.get("/api/check?where=ppl%20%3E%201%20--%20why")["problem"] is None


def test_rows_come_before_their_texts(frozen: Client):
    first, last = frozen.states("/api/responses?sort=-ppl")
    assert "completion" not in first["columns"]
    texts = last["columns"].pop("completion")
    assert first == last
    runs = open_runs(FROZEN)
    whole = dict(runs.sql("select rollout_id, completion from rollouts").iter_rows())
    assert texts == [whole[rollout][:280] for rollout in last["columns"]["rollout_id"]]


@pytest.mark.parametrize("sort", slow_after(2, ["step", "-reward", "-step", "defects"]))
def test_a_search_for_text_tells_what_it_found_so_far(frozen: Client, sort: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(responses, "SEARCHED_ROWS", 100)
    rows = open_runs(FROZEN).sql("select rollout_id, step, completion from staged_responses where stage = 'rising'")
    word = rows["completion"][0].split()[0].upper() + " "
    expected = {row["rollout_id"] for row in rows.iter_rows(named=True) if word.lower() in row["completion"].lower()}
    assert 0 < len(expected) < rows.height
    states = frozen.states(f"/api/responses?stage=rising&sort={sort}&text={quote(word)}")
    assert len(states) > 3
    for before, after in pairwise(states):
        assert before["searched"] < after["searched"]
        assert before["num_rows"] <= after["num_rows"]
    assert states[-1]["searched"] == 1
    assert states[-1]["num_rows"] == len(expected)
    # The page is that of the same rows without a search, in the same order.
    column, order = sort.removeprefix("-"), "desc" if sort.startswith("-") else "asc"
    listed = ", ".join(map(str, expected))
    first = open_runs(FROZEN).sql(
        f"select rollout_id, left(completion, 280) from staged_responses where rollout_id in ({listed}) "
        f"order by {column} {order} nulls last, rollout_id limit 50"
    )
    columns = states[-1]["columns"]
    assert list(zip(columns["rollout_id"], columns["completion"], strict=True)) == first.rows()
    if sort == "-step":
        # The newest steps are searched first, so the page is final from the first rows on.
        early = states[0]["columns"]["rollout_id"]
        assert early == columns["rollout_id"][: len(early)]


def test_a_search_that_finds_nothing_ends(frozen: Client):
    for address in ("/api/responses?text=%24%5E.nothing", "/api/responses?text=a&step=99999"):
        last = frozen.get(address)
        assert (last["num_rows"], last["searched"], last["columns"]["run_id"]) == (0, 1, [])


def test_an_unknown_parameter_of_an_address_is_named(frozen: Client):
    assert frozen.error("/api/responses?stpe=3") == 'unknown parameter "stpe" in the address; did you mean "step"?'
    page = frozen.ask("/response?run=none-seed0&id=5&positon=3")[1].decode()
    assert "unknown parameter &quot;positon&quot; in the address; did you mean &quot;position&quot;?" in page
    assert "unknown parameter" not in frozen.ask("/response?run=none-seed0&id=5&position=3")[1].decode()


def test_the_opposite_is_the_nearest_response_with_the_other_verdict(frozen: Client):
    rows = open_runs(FROZEN).sql("select rollout_id, step, prompt_id, is_correct from rollouts order by rollout_id")
    records = rows.to_dicts()
    seen = set()
    for own in records[:12]:
        others = [
            (abs(row["step"] - own["step"]), abs(row["rollout_id"] - own["rollout_id"]), row["rollout_id"])
            for row in records
            if row["prompt_id"] == own["prompt_id"] and row["is_correct"] != own["is_correct"]
        ]
        expected = min(others)[2] if others else None
        rollout = own["rollout_id"]
        if expected in seen or (expected is None and None in seen):
            continue
        seen.add(expected)
        found = frozen.get(f"/api/response?run=none-seed0&id={rollout}")["neighbors"]["opposite"]
        assert found == expected
        address = f"/api/compare?opposite=none-seed0:{rollout}"
        if expected is None:
            assert "to the prompt of response" in frozen.error(address)
        else:
            parts = frozen.get(address)["responses"]
            assert [part["response"]["rollout_id"] for part in parts] == [rollout, expected]
    assert len(seen) > 2


@pytest.mark.parametrize(
    "address",
    [
        "/api/responses?sort=nothing",
        "/api/responses?page=0",
        "/api/responses?seed=x",
        "/api/responses?is_correct=perhaps",
        "/api/response?run=none&id=1",
        "/api/response?run=none-seed0&id=999999999",
        "/api/response?run=none-seed0&id=x",
        "/api/band?run=none-seed0&stage=rising&quantity=position",
        "/api/compare?r=none-seed0:1",
        "/api/compare?r=a&r=b",
        "/api/prompt?prompt_id=nothing",
        "/api/figure/nothing",
    ],
)
def test_a_malformed_address_is_one_line(frozen: Client, address: str):
    assert frozen.error(address)


def test_tokens_are_those_of_the_trace(tiny: Client, tmp_path: Path):
    found = tiny.get("/api/response?run=tiny&id=8")
    runs = open_runs(write_tiny(tmp_path / "tiny"))
    rows = runs.sql("select * from tokens where rollout_id = 8 order by position")
    tokens = found["tokens"]
    for name in ("position", "token_id", "category"):
        assert tokens[name] == rows[name].to_list()
    for name in ("entropy", "logprob", "advantage", "shaped_advantage", "grad_norm"):
        assert tokens[name] == pytest.approx(rows[name].to_list(), abs=1e-6)
    # From the definition of the trace: every token had probability 1/2 before the update.
    assert tokens["dp"] == pytest.approx([-0.2, 0, 0, 0, -0.1], abs=1e-6)
    assert tokens["mismatch"] == pytest.approx([0] * 5, abs=1e-6)
    assert tokens["surprisal"] == pytest.approx([math.log(2)] * 5, abs=1e-6)
    assert tokens["impact"] == [-0.25, None, None, None, None]
    assert found["response"]["is_correct"] is False
    assert found["neighbors"] == {"previous": 7, "next": 9, "earlier": 5, "later": None, "opposite": 7}


def test_the_band_is_the_quantile_of_the_stage(frozen: Client):
    rows = open_runs(FROZEN).sql("select * from staged_tokens where stage = 'rising'")
    rows = rows.with_columns(bin=(20 * rows["relative_position"]).floor().cast(pl.Int32))
    expected = (
        rows.drop_nulls("entropy")
        .group_by("bin")
        .agg(pl.col("entropy").cast(pl.Float64).mean().alias("mean"), pl.len().alias("n"))
        .sort("bin")
    )
    found = frozen.get("/api/band?run=none-seed0&stage=rising&quantity=entropy")
    assert found["bin"] == expected["bin"].to_list()
    assert found["num_tokens"] == expected["n"].to_list()
    assert found["mean"] == pytest.approx(expected["mean"].to_list(), rel=1e-5)


def test_alignment_covers_both_responses_and_finds_the_divergence():
    first, second = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [1, 2, 3, 99, 98, 5, 6, 7, 8, 10, 11]
    spans = align(first, second)
    assert spans == [(0, 3, 0, 3, True), (3, 4, 3, 5, False), (4, 8, 5, 9, True), (8, 10, 9, 11, False)]
    assert align(first, first) == [(0, 10, 0, 10, True)]
    assert align([], [1]) == [(0, 0, 0, 1, False)]
    long = list(range(7000))
    assert align(long, [*long[:10], -1]) == [(0, 10, 0, 10, True), (10, 7000, 10, 11, False)]


def test_sql_is_limited_and_exported_in_full(frozen: Client, tmp_path: Path):
    query = "select step, entropy from tokens order by step, rollout_id, position"
    status, content, _ = frozen.ask("/api/sql", {"sql": query, "limit": 7})
    found = json.loads(content)
    assert status == 200
    assert found["num_rows"] == 7 == len(found["columns"]["step"])
    assert found["has_more"]
    assert found["types"] == {"step": "Int32", "entropy": "Float32"}
    expected = open_runs(FROZEN).sql(query)
    status, content, headers = frozen.ask("/api/export", {"sql": query, "format": "parquet"})
    (tmp_path / "rows.parquet").write_bytes(content)
    assert pl.read_parquet(tmp_path / "rows.parquet").equals(expected)
    assert "rows.parquet" in headers["content-disposition"]
    status, content, _ = frozen.ask("/api/export", {"sql": query, "format": "csv"})
    assert pl.read_csv(content).height == expected.height


@pytest.mark.parametrize(
    "sql",
    [
        "drop table runs",
        "select * from read_parquet('/etc/passwd')",
        "copy runs to '/tmp/x.csv'",
        "select",
        "",
        "select 1; select 2",
        "attach 'x.db'",
        "select repeat('x', 1000000000) || i from range(1000) t(i) order by 1",
    ],
)
def test_sql_keeps_within_its_sandbox(frozen: Client, sql: str):
    assert frozen.error("/api/sql", {"sql": sql})


def test_a_query_that_never_ends_is_stopped_and_the_rest_keeps_working(frozen: Client):
    answers: list[str] = []
    asking = threading.Thread(target=lambda: answers.append(frozen.error("/api/sql", {"sql": ENDLESS, "name": "one"})))
    asking.start()
    deadline = time.monotonic() + HANG_S
    while not json.loads(frozen.ask("/api/stop", {"name": "one"})[1])["was_running"]:
        assert time.monotonic() < deadline
        assert frozen.get("/api/responses")["num_rows"]
        time.sleep(0.1)
    asking.join(timeout=HANG_S)
    assert answers == ["sql: stopped"]


def test_an_export_shows_its_progress_and_is_stopped(frozen: Client):
    query = "select i from range(100000000000) a(i)"
    answers: list[str] = []
    body = {"sql": query, "name": "two", "format": "csv"}
    asking = threading.Thread(target=lambda: answers.append(frozen.error("/api/export", body)))
    asking.start()
    deadline = time.monotonic() + HANG_S
    while not (frozen.get("/api/progress?name=two") or {}).get("num_rows"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert json.loads(frozen.ask("/api/stop", {"name": "two"})[1])["was_running"]
    asking.join(timeout=HANG_S)
    assert answers == ["sql: stopped"]
    assert frozen.get("/api/progress?name=two") is None


def test_limits_name_no_options_of_the_command_line(frozen: Client, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(console, "TIMEOUT_S", 0.2)
    expected = "sql: stopped after 0.2 s; filter or aggregate earlier, or add a LIMIT to the query"
    assert frozen.error("/api/sql", {"sql": ENDLESS}) == expected
    monkeypatch.setattr(responses, "TIMEOUT_S", 0.2)
    where = quote(f"ppl > ({ENDLESS})")
    assert frozen.error(f"/api/responses?where={where}") == "stopped after 0.2 s; narrow the filters or the condition"


def test_a_long_query_fits_into_an_address(frozen: Client):
    assert frozen.ask(f"/sql?q={'x' * 200_000}")[0] == 200


def test_values_are_computed_once_and_without_waiting_for_others():
    session = Session([FROZEN])
    entered, leave, calls = threading.Event(), threading.Event(), []

    def compute(_: object) -> int:
        calls.append(1)
        entered.set()
        assert leave.wait(HANG_S)
        return 7

    values: list[int] = []
    threads = [threading.Thread(target=lambda: values.append(session.once("slow", compute))) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert entered.wait(HANG_S)
    assert session.once("fast", lambda runs: len(runs.manifests)) == 1
    leave.set()
    for thread in threads:
        thread.join(timeout=HANG_S)
    assert (values, calls) == ([7, 7], [1])
    session.close()
    with pytest.raises(InputError, match="stopping"):
        session.once("late", compute)


def test_threads_that_need_one_computed_table_do_not_wait_for_each_other():
    runs = open_runs(FROZEN)
    asked = (lambda: runs.run_shipped("select count(*) from token_coverage"), lambda: runs.token_coverage)
    threads = [threading.Thread(target=ask, daemon=True) for ask in asked]
    with runs._connected:
        # Both wait for the connection, the question first.
        for thread in threads:
            thread.start()
            time.sleep(0.3)
    for thread in threads:
        thread.join(timeout=HANG_S)
        assert not thread.is_alive()


def test_the_viewer_leaves_memory_to_others(frozen: Client):
    limit = Session([FROZEN]).runs.run_shipped("select current_setting('memory_limit') as bytes").item()
    assert limit == "450.0 MiB"


@pytest.mark.parametrize("body", [[], {"sql": "select 1", "limit": "x"}, {"sql": "select 1", "limit": 10**9}])
def test_a_malformed_request_is_one_line(frozen: Client, body: object):
    assert frozen.error("/api/sql", body)


@pytest.mark.parametrize(
    ("headers", "path"),
    [
        ({"Host": "evil.example"}, "/"),
        ({"Host": "evil.example:80"}, "/api/runs"),
        ({"Origin": "http://evil.example"}, "/api/runs"),
        ({"Origin": "null"}, "/api/runs"),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"}, "/api/runs"),
    ],
)
def test_other_sites_are_refused(frozen: Client, headers: dict[str, str], path: str):
    assert frozen.ask(path, headers=headers)[0] == 403
    assert frozen.ask("/api/sql", {"sql": "select 1"}, headers)[0] == 403


def test_a_failure_of_the_server_is_logged_and_named(
    frozen: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail(*_: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("entrace.analysis.viewer.responses.find_responses", fail)
    status, content, _ = frozen.ask("/api/responses")
    assert status == 500
    assert json.loads(content) == {"error": "the server failed: ZeroDivisionError: oh"}
    assert "ZeroDivisionError: oh" in caplog.text


def test_pages_allow_only_their_own_scripts(frozen: Client):
    for path in ("/", "/responses", "/response", "/compare", "/sql", "/static/common.js"):
        status, content, headers = frozen.ask(path)
        assert status == 200
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert policy["script-src"] == "'self'"
        assert policy["default-src"] == "'none'"
        assert headers["x-content-type-options"] == "nosniff"
        if not path.endswith(".js"):
            # Scripts are files, and nothing in the document is an event handler.
            assert content.count(b"<script") == content.count(b"<script src=")
            assert b"onclick" not in content
    assert frozen.ask("/nothing")[0] == 404
    assert frozen.ask("/static/../app.py")[0] == 404


def test_beyond_this_machine_the_address_holds_a_token(tmp_path: Path):
    served = server.prepare(Session([FROZEN]), host="0.0.0.0", port=0)
    thread = threading.Thread(target=served.run, daemon=True)
    thread.start()
    while not served.server.started:
        time.sleep(0.01)
    token = served.url.partition("?token=")[2]
    assert len(token) > 20
    client = Client(f"http://127.0.0.1:{served.port}")
    assert client.ask("/api/runs")[0] == 403
    assert client.ask("/api/runs?token=wrong")[0] == 403
    status, _, headers = client.ask(f"/api/runs?token={token}")
    assert status == 200
    assert "HttpOnly" in headers["set-cookie"]
    assert client.ask("/api/runs", headers={"Cookie": f"entrace_token_{served.port}={token}"})[0] == 200
    served.server.should_exit = True
    thread.join(timeout=HANG_S)


def test_a_port_in_use_is_left_alone():
    session = Session([FROZEN])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        served = server.prepare(session, port=port)
        assert port < served.port < port + server.TRIED_PORTS
        served.listening.close()


@pytest.mark.parametrize(("host", "port"), [("no.such.host.invalid", 0), ("203.0.113.1", 0)])
def test_an_impossible_address_is_one_line(host: str, port: int):
    with pytest.raises(InputError):
        server.prepare(Session([FROZEN]), host=host, port=port)


def test_a_run_in_training_shows_durable_steps_only(tmp_path: Path, served: Callable[..., Client]):
    folder = tmp_path / "live"
    writer = TraceWriter.create(folder, {"run_id": "live", "arm": "none", "seed": 0, "total_steps": 30}, ["a"])

    def record(steps: range) -> None:
        for step in steps:
            writer.append("steps", step_row(step, entropy=1 / step, accuracy=0.5))
            writer.end_step(step)

    record(range(1, 6))
    writer.flush()
    client = served(folder)
    assert client.get("/api/runs")["runs"][0]["steps"] == 5
    with urllib.request.urlopen(f"{client.url}/api/events", timeout=HANG_S) as events:
        first = _next_event(events)
        record(range(6, 12))
        writer.flush()
        assert _next_event(events) != first
    assert client.get("/api/runs")["runs"][0]["steps"] == 11
    record(range(12, 14))
    assert client.get("/api/runs")["runs"][0]["steps"] == 11
    writer.flush()
    writer.finish()


def _next_event(events: object) -> bytes:
    for line in events:  # type: ignore[attr-defined]
        if line.startswith(b"data: "):
            return line
    raise AssertionError("the stream of events ended")


def test_a_link_or_frame_elsewhere_leads_to_a_page(frozen: Client):
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert frozen.ask("/responses", headers=headers)[0] == 200
    assert frozen.ask("/api/sql", {"sql": "select 1"}, headers)[0] == 403


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write two arms of two seeds.

    Prompts have equal ids, and different texts between seeds.
    """
    root = tmp_path_factory.mktemp("view") / "study"
    for seed in range(2):
        for arm in ("none", "ppl"):
            folder = write_run(root / f"{arm}-seed{seed}", arm=arm, seed=seed, steps=24, groups=3)
            rewrite(folder, lambda column, text: f"{text} [{seed}]" if column == "prompt" else text)  # noqa: B023
    return root


def test_a_mean_mark_opens_the_responses_that_it_counts(study: Path, served: Callable[..., Client]):
    client = served(study)
    for stem, sign in (("entropy_by_sample_sign", True), ("defects_over_steps", False)):
        found = client.get(f"/api/figure/{stem}")
        group = max(found["marks"], key=lambda group: max(group["columns"]["num_responses"]))
        i = 5
        row = {name: values[i] for name, values in group["columns"].items()}
        assert row.get("run_id") is None
        # The whole arm is shown, however many runs it has.
        assert group["where"][i].startswith("arm in ('none')")
        where = quote(group["where"][i])
        address = f"/api/responses?step={row['step']}&where={where}"
        address += f"&sample_sign={row['sample_sign']}" if sign else ""
        assert client.get(address)["num_rows"] == row["num_responses"]
        assert found["opens"]
    assert not client.get("/api/figure/ablation_curves")["opens"]


def test_a_prompt_is_its_text_and_not_its_id(study: Path, served: Callable[..., Client]):
    client = served(study)
    prompt = client.get("/api/responses?run_id=ppl-seed1")["columns"]["prompt_id"][0]
    found = client.get(f"/api/prompt?prompt_id={prompt}&run=ppl-seed1")
    assert found["prompt"]["prompt"].endswith("[1]")
    assert set(found["columns"]["run_id"]) <= {"none-seed1", "ppl-seed1"}
    assert found["num_other_runs"] == 2


def test_a_new_run_of_a_study_appears_and_a_lost_one_is_named(study: Path, tmp_path: Path):
    shutil.copytree(study, tmp_path / "study")
    shutil.move(tmp_path / "study" / "ppl-seed1", tmp_path / "later")
    session = Session([tmp_path / "study"])
    assert len(session.runs.manifests) == 3
    shutil.move(tmp_path / "later", tmp_path / "study" / "ppl-seed1")
    session.refresh()
    assert len(session.runs.manifests) == 4
    shutil.rmtree(tmp_path / "study" / "none-seed0")
    session.refresh()
    assert session.problem == "no longer there: none-seed0"
    assert len(session.runs.manifests) == 3
    shutil.rmtree(tmp_path / "study")
    session.refresh()
    assert session.problem == "none of the runs exists any longer"


def test_names_and_numbers_of_a_result_are_exact(frozen: Client):
    query = 'select \'x\' as name, 1 as "20", 2 as "3", 1000000000000000000000000000001::hugeint as big'
    found = json.loads(frozen.ask("/api/sql", {"sql": query})[1])
    assert found["names"] == ["name", "20", "3", "big"]
    assert found["columns"]["big"] == ["1000000000000000000000000000001"]
    assert found["sql"] == query


def test_a_run_that_disappears_is_reported_and_the_rest_keeps_working(tmp_path: Path, served: Callable[..., Client]):
    kept, gone = write_tiny(tmp_path / "kept"), write_tiny(tmp_path / "gone")
    client = served(kept, gone)
    assert len(client.get("/api/runs")["runs"]) == 2
    with urllib.request.urlopen(f"{client.url}/api/events", timeout=HANG_S) as events:
        first = _next_event(events)
        shutil.rmtree(gone)
        assert _next_event(events) != first
    found = client.get("/api/runs")
    assert "gone" in found["problem"]
    assert client.get("/api/response?run=kept&id=7")["response"]["step"] == 20


def test_two_servers_show_one_run(served: Callable[..., Client]):
    first, second = served(FROZEN), served(FROZEN)
    assert first.url != second.url
    assert first.get("/api/responses")["num_rows"] == second.get("/api/responses")["num_rows"]


def test_a_notebook_shows_the_page_in_a_frame():
    frame = open_runs(FROZEN).view(height=500)
    assert f'<iframe src="{frame.url}" width="100%" height="500"' in frame._repr_html_()
    assert Client(frame.url).get("/api/runs")["runs"][0]["run_id"] == "none-seed0"


def test_a_script_that_showed_the_page_ends_in_silence():
    script = f"import entrace; entrace.open_runs({str(FROZEN)!r}).view()"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=HANG_S, check=True)
    assert not ended.stdout + ended.stderr


def test_the_command_prints_its_address_and_ends_with_ctrl_c():
    command = [sys.executable, "-m", "entrace", "view", str(FROZEN), "--no-browser", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().removeprefix("view: ").strip()
        client = Client(url)
        deadline = time.monotonic() + HANG_S
        while True:
            try:
                assert client.get("/api/runs")["runs"]
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        # A page that is open keeps a stream of events.
        with urllib.request.urlopen(f"{client.url}/api/events", timeout=HANG_S) as events:
            assert _next_event(events)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=HANG_S)
        assert not err
        assert process.returncode == 0


def test_a_missing_extra_is_named(command: Callable[..., tuple[int, bytes, str]], monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.startswith("entrace.analysis.viewer")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    code, _, err = command("view", str(FROZEN))
    assert code == 2
    assert "entrace[view]" in err
