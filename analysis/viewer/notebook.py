"""Show the viewer inside a notebook."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from entrace.analysis.trace.errors import InputError

if TYPE_CHECKING:
    from entrace.analysis.runs import Runs


@dataclass(frozen=True)
class Frame:
    """The viewer as notebooks display it; ``url`` opens it in a tab of its own."""

    url: str
    height: int

    def _repr_html_(self) -> str:
        return f'<iframe src="{escape(self.url)}" width="100%" height="{self.height}" style="border:0"></iframe>'


def show(runs: Runs, height: int) -> Frame:
    """Serve the pages of these runs, and return a frame that a notebook displays.

    The server runs in this process.

    Raises:
        InputError: the extra ``view`` is missing.
    """
    try:
        from entrace.analysis.viewer.server import start
    except ModuleNotFoundError as error:
        raise InputError(f"view: {error.name} is missing; install it with pip install 'entrace[view]'") from None
    from entrace.analysis.viewer.session import Session

    session = Session([manifest["path"] for manifest in runs.manifests.values()], runs.questions.folder)
    return Frame(start(session).url, height)
