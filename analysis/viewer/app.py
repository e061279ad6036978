"""Define the addresses of the viewer: pages, their JSON data, and saved files."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import secrets
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from functools import cache, partial
from html import escape
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from entrace.analysis import claims, figures
from entrace.analysis.runs import Runs
from entrace.analysis.sandbox.connection import BESIDE_TRACE
from entrace.analysis.trace.errors import TEMPORARY, InputError, with_kind
from entrace.analysis.trace.plain import plain
from entrace.analysis.trace.schema import RESPONSE_TOKENS, TABLES
from entrace.analysis.viewer import pictures, responses, saved
from entrace.analysis.viewer.cells import to_json
from entrace.analysis.viewer.console import DEFAULT_ROWS, Console
from entrace.analysis.viewer.security import LOOPBACK, Guard
from entrace.analysis.viewer.session import Session

log = logging.getLogger("entrace")
Found = TypeVar("Found")

FOLDER = Path(__file__).parent
# Pages, all of which are the same document with another script in charge, and the parameters of their addresses.
PAGES = {
    "/": (),
    "/responses": responses.NAMES,
    "/response": ("run", "id", "color", "position", "at"),
    "/compare": ("r", "opposite", "prompt_id", "run", "color"),
    "/sql": ("q", "limit"),
}
# Folders of scripts and styles.
ASSETS = ("static", "vendor")
# Seconds between looks at the runs, and between looks whether the server is to stop.
REFRESH_S, CLOSING_S = 2.0, 0.2
# Most bytes of a query, and of a view that is saved.
MOST_SQL, MOST_SAVED = 1 << 20, 1 << 26
TYPES = {"csv": "text/csv; charset=utf-8", "parquet": "application/vnd.apache.parquet", "json": "application/json"}


def create_app(session: Session, *, hosts: tuple[str, ...] | None = LOOPBACK, token: str | None = None) -> Starlette:
    """Return the application.

    Args:
        session: The opened runs.
        hosts: Host names under which it may be addressed; None for any.
        token: Secret that the first address must hold; None for none.
    """
    nonce = secrets.token_urlsafe(16)
    viewer = _Viewer(session, nonce)
    data: dict[str, Callable[[Request], Any]] = {
        "/api/runs": viewer.runs,
        "/api/figures": viewer.figures,
        "/api/figure/{stem}": viewer.figure,
        "/api/scorecard": viewer.scorecard,
        "/api/check": viewer.check,
        "/api/response": viewer.response,
        "/api/band": viewer.band,
        "/api/prompt": viewer.prompt,
        "/api/compare": viewer.compare,
        "/api/dictionary": viewer.dictionary,
        "/api/questions": viewer.questions,
        "/api/progress": viewer.progress,
    }
    routes = [
        *(Route(path, viewer.page) for path in PAGES),
        *(Route(path, partial(_answer, get)) for path, get in data.items()),
        Route("/api/responses", viewer.responses),
        Route("/api/events", viewer.events),
        Route("/api/sql", viewer.run_sql, methods=["POST"]),
        Route("/api/stop", viewer.stop_sql, methods=["POST"]),
        Route("/api/export", viewer.export, methods=["POST"]),
        Route("/api/save", viewer.save, methods=["POST"]),
        *(Mount(f"/{name}", _Assets(directory=FOLDER / name)) for name in ASSETS),
        Route("/favicon.ico", lambda request: RedirectResponse("/static/icon.svg")),
        Route("/{path}", viewer.page),
    ]
    guard = Middleware(Guard, hosts=hosts, token=token, nonce=nonce)
    app = Starlette(routes=routes, middleware=[guard], exception_handlers={Exception: _fail})
    app.state.viewer = viewer
    return app


class _Assets(StaticFiles):
    """Serve scripts and styles, which a browser keeps.

    Their addresses change with their content.
    """

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Return a file."""
        response = await super().get_response(path, scope)
        response.headers["cache-control"] = "private, max-age=31536000, immutable"
        return response


@cache
def _version() -> str:
    """Return a name of the content of all assets."""
    texts = (path.read_bytes() for name in ASSETS for path in sorted((FOLDER / name).iterdir()))
    return hashlib.sha256(b"".join(texts)).hexdigest()[:12]


async def _answer(get: Callable[[Request], Any], request: Request) -> Response:
    """Answer with JSON that ``get`` computes in a thread.

    Bad input is answered with one line and status 400.
    """
    try:
        return _json(await run_in_threadpool(get, request))
    except InputError as error:
        return _refuse(error)


async def _fail(request: Request, error: Exception) -> Response:
    """Log a failure of the server with its traceback, and report it on the page."""
    log.error("view: %s failed", request.url.path, exc_info=error)
    return _json({"error": f"the server failed: {with_kind(error)}"}, 500)


def _lines(first: Any, parts: Iterator[Any]) -> Iterator[bytes]:
    """Yield one line of JSON per part.

    An error after the first part is the last line.
    """
    yield to_json(first) + b"\n"
    try:
        for part in parts:
            yield to_json(part) + b"\n"
    except InputError as error:
        yield to_json({"error": plain(str(error))}) + b"\n"


def _json(value: Any, status: int = 200) -> Response:
    return Response(to_json(value), status, media_type="application/json")


def _refuse(error: Exception) -> Response:
    return _json({"error": plain(str(error))}, 400)


class _Viewer:
    """Compute what the pages show."""

    def __init__(self, session: Session, nonce: str) -> None:
        self._session = session
        self._console = Console()
        self._nonce = nonce
        # The server replaces it: streams of events and queries end when it stops.
        self.is_closing: Callable[[], bool] = lambda: False

    def warm_up(self) -> None:
        """Compute common answers before a page asks for them.

        Fit the stages, draw the first figure, and start the query process.
        """
        try:
            self._session.once("stages", _segments)
            self._draw(figures.stems(self._session.runs)[0])
            self._session.once("process", lambda runs: responses.check_where(runs, "true"))
        except (InputError, OSError):
            # The page that needs it will say what is wrong; or the server is stopping.
            return

    async def page(self, request: Request) -> Response:
        """Return the document of all pages; its script reads the address."""
        if "token" in request.query_params:
            # The cookie holds the token from now on, and an address that is shared must not.
            return RedirectResponse(request.url.remove_query_params("token"))
        path = request.url.path
        text = (FOLDER / "static" / "index.html").read_text(encoding="utf-8")
        values = {
            "nonce": self._nonce,
            "version": _version(),
            "mistake": self._find_mistake(path, request),
            "preloads": "\n".join(
                f'<link rel="preload" as="fetch" crossorigin href="{escape(address)}">'
                for address in self._first_requests(path, request.url.query)
            ),
        }
        for name, value in values.items():
            text = text.replace(f"{{{name}}}", value)
        return HTMLResponse(text, 200 if path in PAGES else 404)

    def _find_mistake(self, path: str, request: Request) -> str:
        """Describe an unknown parameter in an address; empty if there is none.

        The list of responses reports its own unknown parameters.
        """
        if path not in PAGES or path == "/responses":
            return ""
        try:
            responses.check_names(request.query_params, PAGES[path])
        except InputError as error:
            return escape(plain(str(error)))
        return ""

    def _first_requests(self, path: str, query: str) -> list[str]:
        """Return the addresses that the script of a page requests first.

        The browser then need not wait for the script.
        """
        if path == "/":
            return ["/api/runs", "/api/figures", f"/api/figure/{figures.stems(self._session.runs)[0]}"]
        if path == "/responses":
            filters = "&".join(part for part in query.split("&") if part and not part.startswith("r="))
            return ["/api/runs", f"/api/responses?{filters}"]
        return []

    def runs(self, request: Request) -> Any:
        """Return the runs, what is missing from them, and their stages."""
        session = self._session
        runs = session.runs
        stages = session.once("stages", _segments)
        return {
            "generation": session.generation,
            "problem": session.problem,
            "baseline": runs.baseline,
            "runs": [
                {
                    **{
                        name: manifest.get(name)
                        for name in ("arm", "seed", "study", "status", "error", "model", "task")
                    },
                    "run_id": run,
                    "path": manifest["path"],
                    "steps": manifest.get("last_durable_step"),
                    "total_steps": manifest.get("total_steps"),
                    "note": runs.notes.get(run),
                    "stages": stages.get(run, []),
                }
                for run, manifest in runs.manifests.items()
            ],
        }

    def figures(self, request: Request) -> Any:
        """Return the figures of the report."""
        return pictures.list_figures(self._session.runs)

    def figure(self, request: Request) -> Any:
        """Return one figure with its marks."""
        stem = request.path_params["stem"]
        if stem not in figures.stems(self._session.runs):
            raise InputError(f'no figure "{stem}"')
        return self._draw(stem)

    def _draw(self, stem: str) -> Any:
        # The fit is computed once, and before threads that draw could compute it at the same time.
        self._session.once("stages", _segments)
        return self._session.once(("figure", stem), lambda runs: pictures.draw(runs, stem))

    def scorecard(self, request: Request) -> Any:
        """Return the verdicts of the scorecard, as ``entrace claims --json``."""
        return self._session.once("scorecard", lambda runs: claims.scorecard(claims.judge(runs)))

    async def responses(self, request: Request) -> Response:
        """Return a page of responses, one line for each state of the search.

        The search ends when its page is gone.
        """
        parts = responses.find_responses(self._session.runs, request.query_params)
        try:
            first = await run_in_threadpool(next, parts)
        except InputError as error:
            return _refuse(error)
        return StreamingResponse(_lines(first, parts), media_type="application/x-ndjson")

    def check(self, request: Request) -> Any:
        """Say what is wrong with a condition, if anything."""
        try:
            responses.check_where(self._session.runs, request.query_params.get("where", ""))
        except InputError as error:
            return {"problem": plain(str(error))}
        return {"problem": None}

    def response(self, request: Request) -> Any:
        """Return one response down to its tokens."""
        asked = request.query_params
        return responses.read_response(self._session.runs, asked.get("run", ""), asked.get("id", ""))

    def band(self, request: Request) -> Any:
        """Return what is usual for a quantity along the responses of a stage."""
        asked = request.query_params
        key = (asked.get("run", ""), asked.get("stage", ""), asked.get("quantity", ""))
        return self._session.once(("band", *key), lambda runs: responses.read_band(runs, *key))

    def prompt(self, request: Request) -> Any:
        """Return all responses to a prompt."""
        asked = request.query_params
        return responses.read_prompts(self._session.runs, asked.get("prompt_id", ""), asked.get("run") or None)

    def compare(self, request: Request) -> Any:
        """Return several responses, aligned with the first."""
        keys = [_split_key(key) for key in request.query_params.getlist("r")]
        if first := request.query_params.get("opposite"):
            keys = [_split_key(first), responses.find_opposite(self._session.runs, *_split_key(first))]
        if not 2 <= len(keys) <= 4:
            raise InputError(f"compare: expected 2 to 4 responses, found {len(keys)}")
        return responses.compare(self._session.runs, keys)

    def dictionary(self, request: Request) -> Any:
        """Return the tables and views that SQL can read, with their columns."""
        tables = {table.name: {"grain": table.grain, "columns": table.describe()} for table in TABLES.values()}
        described = {
            name: {
                "grain": "facts about each run" if name == "runs" else "",
                "columns": [_describe_column(*column) for column in columns.items()],
            }
            for name, columns in BESIDE_TRACE.items()
        }
        views = {RESPONSE_TOKENS: {**tables["tokens"], "grain": "one row per token of a response, context included"}}
        return {**tables, **views, **described, **self._session.once("views", _describe_views)}

    def questions(self, request: Request) -> Any:
        """Return the SQL of every question, as examples."""
        asked = self._session.runs.questions
        return [
            {"stem": stem, "level": asked[stem].level, "question": asked[stem].question, "sql": asked.read(stem)}
            for stem in asked
        ]

    async def events(self, request: Request) -> Response:
        """Report each time that the runs were opened again, as server-sent events."""

        async def stream() -> AsyncIterator[str]:
            seen = self._session.generation
            yield f"retry: 3000\ndata: {seen}\n\n"
            while not self.is_closing() and not await request.is_disconnected():
                await run_in_threadpool(self._session.refresh)
                if self._session.generation != seen:
                    seen = self._session.generation
                    yield f"data: {seen}\n\n"
                for _ in range(round(REFRESH_S / CLOSING_S)):
                    if not self.is_closing():
                        await asyncio.sleep(CLOSING_S)

        return StreamingResponse(stream(), media_type="text/event-stream")

    async def run_sql(self, request: Request) -> Response:
        """Run the query of the console."""

        def run(asked: dict[str, Any], name: str) -> dict[str, Any]:
            limit = responses.to_integer("row limit", str(asked.get("limit") or DEFAULT_ROWS))
            return self._console.run(self._session.runs, name, str(asked.get("sql") or ""), limit)

        try:
            return _json(await self._query(request, run))
        except InputError as error:
            return _refuse(error)

    async def export(self, request: Request) -> Response:
        """Return all rows of a query as a file."""

        def run(asked: dict[str, Any], name: str) -> tuple[str, Path]:
            form = str(asked.get("format"))
            if form not in TYPES:
                raise InputError(f'format: unknown value "{form}", expected one of {", ".join(TYPES)}')
            descriptor, path = tempfile.mkstemp(prefix=TEMPORARY, suffix=f".{form}")
            try:
                with open(descriptor, "wb") as out:
                    self._console.export(self._session.runs, name, str(asked.get("sql") or ""), form, out)
            except BaseException:
                Path(path).unlink()
                raise
            return form, Path(path)

        try:
            form, path = await self._query(request, run)
        except InputError as error:
            return _refuse(error)
        remove = BackgroundTask(path.unlink, missing_ok=True)
        return FileResponse(path, media_type=TYPES[form], filename=f"rows.{form}", background=remove)

    async def _query(self, request: Request, run: Callable[[dict[str, Any], str], Found]) -> Found:
        """Run a query in a thread, under the name that its page gave it.

        The query ends when the page is gone.
        """
        asked = await _read_body(request)
        name = str(asked.get("name") or secrets.token_hex(8))
        task = asyncio.ensure_future(run_in_threadpool(run, asked, name))
        while not task.done():
            await asyncio.wait([task], timeout=0.5)
            if not task.done() and (self.is_closing() or await request.is_disconnected()):
                self._console.stop(name)
        return task.result()

    def progress(self, request: Request) -> Any:
        """Return how far a query of the console is."""
        return self._console.progress(request.query_params.get("name", ""))

    async def stop_sql(self, request: Request) -> Response:
        """Stop a query of the console."""
        try:
            asked = await _read_body(request)
        except InputError as error:
            return _refuse(error)
        return _json({"was_running": self._console.stop(str(asked.get("name")))})

    async def save(self, request: Request) -> Response:
        """Return a view as one file that opens without this server."""
        try:
            asked = await _read_body(request, MOST_SAVED)
            page = await run_in_threadpool(saved.write, asked)
        except InputError as error:
            return _refuse(error)
        headers = {"content-disposition": 'attachment; filename="entrace.html"', "content-security-policy": "sandbox"}
        return HTMLResponse(page, headers=headers)


async def _read_body(request: Request, most: int = MOST_SQL) -> dict[str, Any]:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise InputError(f"the request is longer than {most >> 20} MiB")
    try:
        found = json.loads(body)
    except ValueError:
        raise InputError("expected a request in JSON") from None
    if not isinstance(found, dict):
        raise InputError("expected an object in JSON")
    return found


def _segments(runs: Runs) -> dict[str, list[dict[str, Any]]]:
    """Return the stages of each run."""
    return {run: fit.segments() for run, fit in runs.stage_fits.items()}


def _split_key(key: str) -> tuple[str, str]:
    """Return run and response of ``RUN:ID``."""
    run, _, rollout = key.rpartition(":")
    return run, rollout


def _describe_views(runs: Runs) -> dict[str, Any]:
    """Return the columns of the staging views."""
    found = runs.run_shipped(
        "select table_name, column_name, data_type from duckdb_columns() where not internal order by all"
    )
    described: dict[str, Any] = {}
    for view, column, kind in found.iter_rows():
        if view not in TABLES and view not in BESIDE_TRACE and view != RESPONSE_TOKENS:
            entry = described.setdefault(view, {"grain": "view of analysis/sql/staging", "columns": []})
            entry["columns"].append(_describe_column(column, kind))
    return described


def _describe_column(name: str, kind: str) -> dict[str, str]:
    return {"name": name, "type": kind, "unit": "", "meaning": ""}
