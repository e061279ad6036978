"""Measure the viewer on a large trace.

The measures are first figure, pages of responses, tokens of a long response, and memory.

Usage: python -m tests.benchmarks.bench_view [--tokens 50000000] [--trace DIR] [--out reports/view_benchmarks.json]

A browser asks a server in a process of its own. The time to the first figure begins when the address is opened and
includes opening the trace, which the server does before it prints its address; starting Python is reported apart.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from playwright.sync_api import sync_playwright

from entrace.analysis.runs import open_runs
from entrace.analysis.trace import Recorder
from tests.benchmarks.simulated_trace import write_trace

LONG = 10_000
ROUNDS = 7
ADDRESSES = (
    "sort=step",
    "sort=-ppl",
    "where=ppl%20%3E%201.5&sort=-entropy_mean",
    "stage=plateau&is_correct=true&page=7",
    "text=wait&sort=-reward",
)
# Scrolls through the tokens and changes their color, and returns all tasks longer than 50 ms.
PAUSES = """async () => {
  const pauses = [];
  const note = (list) => pauses.push(...list.getEntries().map((entry) => entry.duration));
  new PerformanceObserver(note).observe({ type: "longtask" });
  const box = document.querySelector(".tokens");
  const wait = (ms) => new Promise((done) => setTimeout(done, ms));
  for (let i = 0; i <= 60; i++) { box.scrollTop = (box.scrollHeight * i) / 60; await wait(16); }
  const picker = document.querySelector("[aria-label='Color tokens by']");
  for (const name of ["logprob", "advantage", "entropy"]) {
    picker.value = name;
    picker.dispatchEvent(new Event("change"));
    await wait(400);
  }
  return pauses;
}"""


def write_long(folder: Path) -> None:
    """Write a trace with one response of ``LONG`` tokens."""
    rng = np.random.default_rng(0)
    with Recorder(folder, [f" w{i}" for i in range(500)], temperature=1.0) as recorder:
        measured = {name: [rng.random(LONG)] for name in ("entropy", "advantage")}
        ids = [rng.integers(0, 500, LONG)]
        recorder.record(1, prompt=["q"], response_ids=ids, logprob=[-rng.random(LONG)], reward=[1.0], **measured)


class Server:
    """The command ``entrace view`` in a process of its own."""

    def __init__(self, *paths: Path) -> None:
        started = time.monotonic()
        command = [sys.executable, "-m", "entrace", "view", *map(str, paths), "--no-browser", "--port", "0"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().removeprefix("view: ").strip().rstrip("/")
        self.start_s = time.monotonic() - started

    @property
    def memory_mib(self) -> float:
        """Return the memory of the server and its query processes, MiB.

        Shared pages count in proportion.
        """
        process = psutil.Process(self._process.pid)
        return sum(one.memory_full_info().pss for one in [process, *process.children(recursive=True)]) / 2**20

    def stop(self) -> None:
        """End the server."""
        self._process.terminate()
        self._process.wait()


def additions_s() -> float:
    """Return the CPU seconds of five million additions in Python.

    Times on two machines compare by this number.
    """
    started, total = time.process_time(), 0
    for i in range(5_000_000):
        total += i
    return time.process_time() - started


def tab_memory_mib() -> float:
    """Return the memory of the largest process of our browser that draws a page."""
    found = [process for process in psutil.Process().children(recursive=True) if "--type=renderer" in process.cmdline()]
    return max((process.memory_full_info().pss for process in found), default=0) / 2**20


def measure(large: Path, long: Path) -> dict[str, Any]:
    """Return all measurements."""
    started = time.monotonic()
    runs = open_runs(large)
    open_s = time.monotonic() - started
    tokens = runs.sql("select sum(tokens) from steps").item()
    del runs
    firsts, pages, peaks = [], [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for _ in range(3):
            server = Server(large)
            page = browser.new_page()
            started = time.monotonic()
            page.goto(server.url)
            page.locator("#stage_dynamics .plot img").wait_for()
            firsts.append(time.monotonic() - started + open_s)
            peaks.append(server.memory_mib)
            page.close()
            if len(firsts) < 3:
                server.stop()
        page = browser.new_page()
        for address in ADDRESSES:
            times = []
            for _ in range(ROUNDS):
                page.goto(f"{server.url}/responses?{address}")
                # The rows come first; their texts, and further rows of a search, follow.
                page.locator("#content:not([aria-busy]) tbody tr").first.wait_for()
                rows = page.evaluate("performance.now()")
                page.locator("#content:not(:has(.list[aria-busy])) tbody tr").first.wait_for()
                times.append((rows, page.evaluate("performance.now()")))
            pages.append((address, *map(float, np.median(times[1:], axis=0)), times[0][0]))
            peaks.append(server.memory_mib)
        page.goto(server.url)
        page.locator("#performance_profile").scroll_into_view_if_needed()
        for card in page.locator("section.card").all():
            card.scroll_into_view_if_needed()
            card.locator(":scope:not([aria-busy])").wait_for(timeout=600_000)
            peaks.append(server.memory_mib)
        tab = tab_memory_mib()
        page.close()
        server.stop()
        server = Server(long)
        page = browser.new_page()
        rollout = open_runs(long).sql("select rollout_id from rollouts").item()
        page.goto(f"{server.url}/response?run={long.name}&id={rollout}")
        page.locator(".tokens i").first.wait_for()
        page.wait_for_timeout(1500)
        pauses = [page.evaluate(PAUSES) for _ in range(5)]
        server.stop()
        browser.close()
    return {
        "tokens": int(tokens),
        "open_s": open_s,
        "first_figure_s": float(np.median(firsts)),
        "responses_ms": {address: rows for address, rows, _, _ in pages},
        "responses_whole_ms": {address: whole for address, _, whole, _ in pages},
        "responses_first_ms": {address: first for address, _, _, first in pages},
        "server_mib": max(peaks),
        "tab_mib": tab,
        "longest_pause_ms": float(np.median([max(found, default=0.0) for found in pauses])),
        "cores": os.cpu_count(),
        "additions_s": additions_s(),
    }


def main() -> None:
    """Write missing traces, measure, and print or write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=50_000_000, help="token rows of the trace (default %(default)s)")
    parser.add_argument("--trace", type=Path, help="folder in which to keep the traces (default: temporary)")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: none)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = asked.trace or Path(folder)
        large, long = root / f"tokens-{asked.tokens}", root / "long"
        if not large.exists():
            write_trace(large, asked.tokens)
        if not long.exists():
            write_long(long)
        result = json.dumps(measure(large, long), indent=2)
    print(result)
    if asked.out:
        asked.out.write_text(result + "\n")


if __name__ == "__main__":
    main()
