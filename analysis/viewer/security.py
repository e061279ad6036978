"""Answer only the pages of this server.

Requests with another host name, from another site, or without the token are refused.
"""

from __future__ import annotations

import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "entrace_token_{port}"
# Scripts and style sheets are files of this server, figures are images in the page, the editor sets style attributes,
# and notebooks on this machine may frame the pages.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'nonce-{nonce}'; style-src-attr 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'self' http://localhost:* http://127.0.0.1:*"
)
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


class Guard:
    """Check every request, and add security headers to every response.

    Host, Origin, and the token are checked. A web page elsewhere can make a browser send requests to this server: under
    a name that it resolves to 127.0.0.1 (DNS rebinding, seen in Host) or from its own origin (seen in Origin and
    Sec-Fetch-Site).
    """

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...] | None, token: str | None, nonce: str) -> None:
        """Guard ``app``.

        Args:
            app: The application.
            hosts: Host names without port under which the server may be addressed; None for any, with a token.
            token: Secret that a first address must hold as ``?token=``; a cookie then holds it. None for no token.
            nonce: Value that marks the editor's own style sheet.
        """
        self._app = app
        self._hosts = hosts
        self._token = token
        self._policy = POLICY.format(nonce=nonce)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it with status 403."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = QueryParams(scope["query_string"]).get("token")
        # Cookies do not tell ports apart.
        cookie = COOKIE.format(port=(scope.get("server") or ("", 0))[1])
        is_link = scope["method"] == "GET" and headers.get("sec-fetch-mode") == "navigate"
        refusal = self._refuse(headers, given, cookie, is_link=is_link)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    added.setdefault(name, value)
                added.setdefault("content-security-policy", self._policy)
                if self._token and given and not refusal:
                    added.append("set-cookie", f"{cookie}={self._token}; HttpOnly; SameSite=Strict; Path=/")
            await send(message)

        app = PlainTextResponse(f"entrace view: {refusal}\n", status_code=403) if refusal else self._app
        await app(scope, receive, send_guarded)

    def _refuse(self, headers: Headers, given: str | None, cookie: str, *, is_link: bool) -> str | None:
        """Return why a request is refused, or None.

        A link or frame elsewhere may lead to a page.
        """
        host = headers.get("host", "")
        if self._hosts is not None and urlsplit(f"//{host}").hostname not in {name.strip("[]") for name in self._hosts}:
            return "this host name is not served; open the address that the command printed"
        origin = headers.get("origin")
        if origin not in (None, f"http://{host}") or (headers.get("sec-fetch-site") == "cross-site" and not is_link):
            return "a request from another site"
        if self._token:
            held = given or cookie_parser(headers.get("cookie", "")).get(cookie) or ""
            if not hmac.compare_digest(held.encode(), self._token.encode()):
                return "the address needs ?token=..., as the command printed it"
        return None
