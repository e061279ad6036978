"""Define the addresses of the viewer: pages, their data in JSON, and files that are saved."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import tempfile
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from entrace.analysis import claims, figures
from entrace.analysis.runs import Runs
from entrace.analysis.sandbox.connection import BESIDE_TRACE
from entrace.analysis.terminal.export import write
from entrace.analysis.trace.errors import TEMPORARY, InputError, with_kind
from entrace.analysis.trace.plain import plain
from entrace.analysis.trace.schema import RESPONSE_TOKENS, TABLES
from entrace.analysis.viewer import pictures, responses, saved
from entrace.analysis.viewer.cells import to_json
from entrace.analysis.viewer.console import DEFAULT_ROWS, MEMORY, TIMEOUT_S, Console
from entrace.analysis.viewer.security import LOOPBACK, Guard
from entrace.analysis.viewer.session import Session

log = logging.getLogger("entrace")

FOLDER = Path(__file__).parent
# Pages, all of which are the same document with another script in charge.
PAGES = ("/", "/responses", "/response", "/compare", "/sql")
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
        "/api/responses": viewer.responses,
        "/api/check": viewer.check,
        "/api/response": viewer.response,
        "/api/band": viewer.band,
        "/api/prompt": viewer.prompt,
        "/api/compare": viewer.compare,
        "/api/dictionary": viewer.dictionary,
        "/api/questions": viewer.questions,
    }
    routes = [
        *(Route(path, viewer.page) for path in PAGES),
        *(Route(path, partial(_answer, get)) for path, get in data.items()),
        Route("/api/events", viewer.events),
        Route("/api/sql", viewer.run_sql, methods=["POST"]),
        Route("/api/stop", viewer.stop_sql, methods=["POST"]),
        Route("/api/export", viewer.export, methods=["POST"]),
        Route("/api/save", viewer.save, methods=["POST"]),
        Mount("/static", StaticFiles(directory=FOLDER / "static")),
        Mount("/vendor", StaticFiles(directory=FOLDER / "vendor")),
        Route("/favicon.ico", lambda request: RedirectResponse("/static/icon.svg")),
        Route("/{path}", viewer.page),
    ]
    guard = Middleware(Guard, hosts=hosts, token=token, nonce=nonce)
    app = Starlette(routes=routes, middleware=[guard], exception_handlers={Exception: _fail})
    app.state.viewer = viewer
    return app


async def _answer(get: Callable[[Request], Any], request: Request) -> Response:
    """Answer with JSON that ``get`` computes in a thread; bad input is one line with status 400."""
    try:
        return _json(await run_in_threadpool(get, request))
    except InputError as error:
        return _refuse(error)


async def _fail(request: Request, error: Exception) -> Response:
    """Log a failure of the server with its traceback, and say on the page that there was one."""
    log.error("view: %s failed", request.url.path, exc_info=error)
    return _json({"error": f"the server failed: {with_kind(error)}"}, 500)


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
        """Draw the first figure, and start the process of queries, before a page asks for them."""
        try:
            first = figures.stems(self._session.runs)[0]
            self._session.once(("figure", first), lambda runs: pictures.draw(runs, first))
            self._session.runs.read("select 1")
        except (InputError, OSError):
            # The page that needs it will say what is wrong; or the server is stopping.
            return

    async def page(self, request: Request) -> Response:
        """Return the document of all pages; its script reads the address."""
        if "token" in request.query_params:
            # The cookie holds the token from now on, and an address that is shared must not.
            return RedirectResponse(request.url.remove_query_params("token"))
        text = (FOLDER / "static" / "index.html").read_text(encoding="utf-8")
        return HTMLResponse(text.replace("{nonce}", self._nonce), 200 if request.url.path in PAGES else 404)

    def runs(self, request: Request) -> Any:
        """Return the runs, what is missing from them, and their stages."""
        session = self._session
        runs = session.runs

        def fits(opened: Runs) -> dict[str, list[dict[str, Any]]]:
            return {run: fit.segments() for run, fit in opened.stage_fits.items()}

        stages = session.once("stages", fits)
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
        return self._session.once(("figure", stem), lambda runs: pictures.draw(runs, stem))

    def scorecard(self, request: Request) -> Any:
        """Return the verdicts of the scorecard, as ``entrace claims --json``."""
        return self._session.once("scorecard", lambda runs: claims.scorecard(claims.judge(runs)))

    def responses(self, request: Request) -> Any:
        """Return a page of responses."""
        return responses.find_responses(self._session.runs, request.query_params)

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
        return self._session.cached(("band", *key), lambda runs: responses.read_band(runs, *key))

    def prompt(self, request: Request) -> Any:
        """Return all responses to a prompt."""
        asked = request.query_params
        return responses.read_prompts(self._session.runs, asked.get("prompt_id", ""), asked.get("run") or None)

    def compare(self, request: Request) -> Any:
        """Return several responses, aligned with the first."""
        keys = [_split_key(key) for key in request.query_params.getlist("r")]
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
        """Run the query of the console; it ends when its page is gone."""
        try:
            asked = await _read_body(request)
            name = str(asked.get("name") or secrets.token_hex(8))
            limit = responses.to_integer("row limit", str(asked.get("limit") or DEFAULT_ROWS))
            text = str(asked.get("sql") or "")
            task = asyncio.ensure_future(run_in_threadpool(self._console.run, self._session.runs, name, text, limit))
            while not task.done():
                await asyncio.wait([task], timeout=0.5)
                if not task.done() and (self.is_closing() or await request.is_disconnected()):
                    self._console.stop(name)
            return _json(task.result())
        except InputError as error:
            return _refuse(error)

    async def stop_sql(self, request: Request) -> Response:
        """Stop a query of the console."""
        try:
            asked = await _read_body(request)
        except InputError as error:
            return _refuse(error)
        return _json({"was_running": self._console.stop(str(asked.get("name")))})

    async def export(self, request: Request) -> Response:
        """Return all rows of a query as a file."""
        try:
            asked = await _read_body(request)
            form = str(asked.get("format"))
            if form not in TYPES:
                raise InputError(f'format: unknown value "{form}", expected one of {", ".join(TYPES)}')
            path = await run_in_threadpool(_export, self._session.runs, str(asked.get("sql") or ""), form)
        except InputError as error:
            return _refuse(error)
        remove = BackgroundTask(path.unlink, missing_ok=True)
        return FileResponse(path, media_type=TYPES[form], filename=f"rows.{form}", background=remove)

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


def _export(runs: Runs, text: str, form: str) -> Path:
    """Write all rows of a query to a temporary file, which may be larger than memory."""
    descriptor, name = tempfile.mkstemp(prefix=TEMPORARY, suffix=f".{form}")
    try:
        with open(descriptor, "wb") as out:
            write(runs.stream(text, memory=MEMORY, timeout=TIMEOUT_S), form, out, is_safe=True)
    except BaseException:
        Path(name).unlink()
        raise
    return Path(name)


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
