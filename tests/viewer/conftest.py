from __future__ import annotations

import json
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from entrace.analysis.viewer import server
from entrace.analysis.viewer.session import Session
from tests.analysis.conftest import write_tiny
from tests.analysis.synthetic import Planted, write_run
from tests.patience import HANG_S
from tests.test_hostile import poison

FROZEN = Path(__file__).parents[1] / "fixtures" / "frozen" / "none-seed0"


@contextmanager
def serving(*paths: Path) -> Iterator[server.Served]:
    """Serve runs until the block ends."""
    served = server.start(Session(paths))
    try:
        yield served
    finally:
        served.server.should_exit = True


class Client:
    """Ask a server for its data."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, bytes, Any]:
        """Return status, content, and headers."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers or {})
        try:
            with urllib.request.urlopen(request, timeout=HANG_S) as answer:
                return answer.status, answer.read(), answer.headers
        except urllib.error.HTTPError as error:
            return error.code, error.read(), error.headers

    def get(self, path: str) -> Any:
        """Return the data; for a search, its last and complete state."""
        return self.states(path)[-1]

    def states(self, path: str) -> list[Any]:
        status, content, _ = self.ask(path)
        assert status == 200, content
        return [json.loads(line) for line in content.splitlines()]

    def error(self, path: str, body: Any = None) -> str:
        """Return the one line that refuses bad input."""
        status, content, _ = self.ask(path, body)
        assert status == 400, content
        message = json.loads(content)["error"]
        assert "\n" not in message
        return message


@pytest.fixture(scope="package")
def frozen() -> Iterator[Client]:
    with serving(FROZEN) as served:
        yield Client(served.url)


@pytest.fixture(scope="package")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with serving(write_tiny(tmp_path_factory.mktemp("view") / "tiny")) as served:
        yield Client(served.url)


@pytest.fixture(scope="package")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    root = tmp_path_factory.mktemp("view") / "a[0]*'; -- <b>"
    for arm in ("none", "$ppl"):
        poison(write_run(root / f"{arm}-seed0", arm=arm, planted=Planted(), steps=12, groups=2), arm)
    with serving(root) as served:
        yield Client(served.url)


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        if os.environ.get("ENTRACE_NEEDS_BROWSER"):
            pytest.fail("no chromium was found")
        pytest.skip("no chromium was found; install it to test the pages of entrace view")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # A container has neither the privileges of the sandbox nor a large /dev/shm.
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield found
        found.close()


class Tab:
    """A tab of the browser that notes errors and requests that leave this machine."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.problems: list[str] = []
        page.on("console", lambda message: message.type == "error" and self.problems.append(message.text))
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("dialog", lambda dialog: (self.problems.append("dialog"), dialog.dismiss()))
        page.on("request", self._note)

    def _note(self, request: Any) -> None:
        if not request.url.startswith(("http://127.0.0.1:", "blob:", "data:", "file:")):
            self.problems.append(f"request to {request.url}")

    def open(self, url: str) -> Any:
        self.page.goto(url)
        self.settle()
        return self.page

    def settle(self) -> None:
        """Wait until the page shows its content."""
        self.page.locator("#content:not([aria-busy]):not(:has(.list[aria-busy])) h1").wait_for()

    def until(self, condition: Callable[[], Any]) -> None:
        """Wait until ``condition`` holds.

        The pages forbid Playwright's own wait_for_function, which evaluates text.
        """
        deadline = time.monotonic() + HANG_S
        while not condition():
            assert time.monotonic() < deadline
            self.page.wait_for_timeout(50)


@pytest.fixture(scope="package")
def window(browser: Any) -> Iterator[Any]:
    """Open one window for all tabs.

    A window takes three times as long to open as a tab.
    """
    context = browser.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True)
    # A window closes with its last tab.
    context.new_page()
    yield context
    context.close()


@pytest.fixture
def tab(window: Any) -> Iterator[Tab]:
    made = Tab(window.new_page())
    # What earlier tabs stored, such as the history of queries.
    everything = {"origin": "*", "storageTypes": "all"}
    window.new_cdp_session(made.page).send("Storage.clearDataForOrigin", everything)
    # Other work on the machine makes figures wait.
    made.page.set_default_timeout(120_000)
    yield made
    made.page.close()
    assert not made.problems


@pytest.fixture
def served() -> Iterator[Callable[..., Client]]:
    """Serve further runs until the test ends."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        yield lambda *paths: Client(stack.enter_context(serving(*paths)).url)
