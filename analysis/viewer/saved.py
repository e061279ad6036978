"""Write a view as one HTML file that opens without a server."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from entrace.analysis.trace.errors import InputError
from entrace.analysis.viewer.cells import to_json

FOLDER = Path(__file__).parent
SCRIPTS = (
    "vendor/uPlot.iife.min.js",
    *(f"static/{name}.js" for name in ("common", "plot", "table", "tokens", "overview", "responses", "response")),
    *(f"static/{name}.js" for name in ("compare", "sql", "main")),
)
STYLES = ("vendor/uPlot.min.css", "static/style.css")
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src {hashes}; \
style-src 'unsafe-inline'; img-src data: blob:">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header id="top"></header>
<p id="problem" class="notice" role="status" hidden></p>
<main id="content" tabindex="-1"></main>
<div id="tip" role="tooltip" hidden></div>
<script type="application/json" id="saved">{data}</script>
{scripts}
</body>
</html>
"""


def write(asked: Mapping[str, Any]) -> str:
    """Return the file.

    Args:
        asked: ``path`` and ``search`` of the address, and ``data``: the answers that the page showed, by address.

    Raises:
        InputError: one of these is missing.
    """
    path, search, data = (asked.get(name) for name in ("path", "search", "data"))
    if not isinstance(path, str) or not isinstance(search, str) or not isinstance(data, dict):
        raise InputError("save: expected path, search, and data")
    content = to_json({"path": path, "search": search, "data": data}).decode()
    texts = [(FOLDER / name).read_text(encoding="utf-8") for name in SCRIPTS]
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
    return PAGE.format(
        hashes=" ".join(f"'sha256-{value}'" for value in hashes),
        title=escape(f"entrace {path} {search}"),
        style="\n".join((FOLDER / name).read_text(encoding="utf-8") for name in STYLES),
        # Nothing in the data can end the element that holds it.
        data=content.replace("<", "\\u003c"),
        scripts="\n".join(f"<script>{text}</script>" for text in texts),
    )
