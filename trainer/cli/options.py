"""Options and conventions that several commands share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Annotated, Any

import typer

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
def named_by(option: str) -> Iterator[None]:
    """Name ``option`` in errors about the model that it holds.

    Raises:
        InputError: the model is not usable; the message names the option in place of ``policy.path``.
    """
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace("policy.path", option, 1)) from error


class _LazyModule(ModuleType):
    """A stand-in that imports the module of its name when an attribute is first used."""

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), name)


def import_lazily(name: str) -> None:
    """Let later imports of a top-level module load it on first use of an attribute."""
    sys.modules.setdefault(name, _LazyModule(name))
