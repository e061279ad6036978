"""Options and manners that several commands share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from entrace.analysis.cli import say
from entrace.analysis.trace import InputError

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Override single keys.", show_default=False)
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what --out already holds.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="As --resume, and try failed runs once more.")]


def require_train_extra() -> None:
    """Raises ``InputError`` where the trainer's packages are not installed."""
    from importlib.util import find_spec

    if find_spec("torch") is None or find_spec("transformers") is None:
        raise InputError("this command needs the train extra: pip install 'entrace[train]'")


@contextmanager
def stoppable(how: str) -> Iterator[None]:
    """Ctrl-C ends the command with a line that says what the same command does later."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"entrace: stopped; the same command {how}", err=True)
        raise typer.Exit(130) from None
