"""Serve the viewer: choose a port, open a browser, and stop with Ctrl-C."""

from __future__ import annotations

import atexit
import errno
import os
import secrets
import socket
import sys
import threading
import time
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from entrace.analysis.trace.errors import InputError, reason_of
from entrace.analysis.viewer.app import create_app
from entrace.analysis.viewer.security import LOOPBACK
from entrace.analysis.viewer.session import Session

if TYPE_CHECKING:
    import uvicorn

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8765
# Ports that are tried after the first.
TRIED_PORTS = 20
START_S = 10.0
# Bytes of an address and the other headers of a request; conditions on responses may be long.
LONGEST_ADDRESS = 1 << 20
# Errors after which the next port is tried.
TRY_NEXT = (errno.EADDRINUSE, errno.EACCES)


@dataclass(frozen=True)
class Served:
    """A server that is ready to run.

    Attributes:
        url: Address of the first page, with the token if one is needed.
        port: Port that it listens on, which differs from the one asked for if that was in use.
    """

    url: str
    port: int
    server: uvicorn.Server
    listening: socket.socket
    warm_up: Callable[[], None]

    def run(self) -> None:
        """Serve until Ctrl-C."""
        threading.Thread(target=self.warm_up, daemon=True).start()
        self.server.run(sockets=[self.listening])


def prepare(session: Session, host: str = DEFAULT_HOST, port: int = DEFAULT_PORT) -> Served:
    """Listen on a port, the next free one if it is in use.

    Args:
        session: The opened runs.
        host: Address to bind to. Beyond loopback, the address of the pages holds a secret token.
        port: First port to try; 0 for any free one.

    Raises:
        InputError: the address cannot be bound to.
    """
    # Loading polars takes a third of a second, for which the first page would wait.
    import polars  # noqa: F401
    import uvicorn

    listening = _listen(host, port)
    found = listening.getsockname()[1]
    is_loopback = host in ("127.0.0.1", "localhost", "::1")
    token = None if is_loopback else secrets.token_urlsafe(24)
    app = create_app(session, hosts=LOOPBACK if is_loopback else None, token=token)
    # The application reports its failures itself; uvicorn would add those of connections that Ctrl-C cuts off.
    config = uvicorn.Config(
        app,
        log_level="critical",
        timeout_graceful_shutdown=1,
        access_log=False,
        lifespan="off",
        h11_max_incomplete_event_size=LONGEST_ADDRESS,
    )
    server = uvicorn.Server(config)
    app.state.viewer.is_closing = lambda: server.should_exit
    shown = f"[{host}]" if ":" in host else host
    if host in ("0.0.0.0", "::"):
        shown = socket.gethostname()
    return Served(
        f"http://{shown}:{found}/{f'?token={token}' if token else ''}",
        found,
        server,
        listening,
        app.state.viewer.warm_up,
    )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    error: OSError | None = None
    for tried in range(port, port + TRIED_PORTS) if port else [0]:
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, tried))
            listening.listen()
            return listening
        except OverflowError:
            listening.close()
            raise InputError(f"port {tried}: expected 0 to 65535") from None
        except OSError as found:
            listening.close()
            error = found
            if isinstance(found, socket.gaierror) or found.errno not in TRY_NEXT:
                break
    assert error is not None
    raise InputError(f"{host}, port {port}: {reason_of(error)}") from None


def start(session: Session) -> Served:
    """Serve from a thread of this process, for notebooks.

    Raises:
        InputError: the server does not start.
    """
    served = prepare(session, port=0)

    def run() -> None:
        served.run()
        session.close()
        atexit.unregister(end)

    def end() -> None:
        # A thread that still runs while Python ends would make DuckDB print what it holds.
        served.server.should_exit = True
        running.join(timeout=START_S)

    running = threading.Thread(target=run, daemon=True)
    atexit.register(end)
    running.start()
    started = time.monotonic()
    while not served.server.started:
        if time.monotonic() - started > START_S:
            raise InputError("view: the server does not start")
        time.sleep(0.02)
    return served


def open_browser(url: str) -> bool:
    """Open an address in a browser; return whether one was found.

    Text browsers, which would take over the terminal, do not count.
    """
    has_display = sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return bool((has_display or os.environ.get("BROWSER")) and webbrowser.open(url))
