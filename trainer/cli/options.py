"""Options and conventions that several commands share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Annotated, Any

import typer

from entrace.analysis.cli import say
from entrace.analysis.trace import InputError

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY.PATH=VALUE]...", help="Config keys to override, such as optim.lr=1e-5.", show_default=False
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue what --out already holds (default: refuse it).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Imply --resume and retry failed runs.")]


def require_train_extra() -> None:
    """Raise ``InputError`` if the packages of the trainer are not installed."""
    from importlib.util import find_spec

    if find_spec("torch") is None or find_spec("transformers") is None:
        raise InputError("this command needs the train extra: pip install 'entrace[train]'")


@contextmanager
def stoppable(how: str) -> Iterator[None]:
    """End the command on Ctrl-C with one line and exit code 130.

    Args:
        how: What the same command does when it is called again.
    """
    try:
        yield
    except KeyboardInterrupt:
        say(f"entrace: stopped; the same command {how}", err=True)
        raise typer.Exit(130) from None


class _LazyModule(ModuleType):
    """A stand-in that imports the module of its name when an attribute is first used."""

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), name)


def import_lazily(name: str) -> None:
    """Let later imports of a top-level module load it only if an attribute of it is used."""
    sys.modules.setdefault(name, _LazyModule(name))
