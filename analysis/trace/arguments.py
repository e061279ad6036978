"""Check the arguments of public functions against their annotations."""

from __future__ import annotations

import builtins
import inspect
import os
import reprlib
from collections import ChainMap
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, wraps
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin

import numpy as np

from entrace.analysis.trace.errors import InputError

Checked = TypeVar("Checked", bound=Callable[..., Any])

# How to get an object that a function takes, by the name of its class.
SOURCES = {"Runs": "open runs with entrace.open_runs", "Config": "read a config with entrace.load_config"}
VALUES = (str, bytes, int, float, list, tuple, dict, set, Path, type(None))


def checked(function: Checked) -> Checked:
    """Let a function, or the constructor of a class, refuse arguments of wrong types.

    A parameter annotated ``Any`` or not at all takes every value. Numbers of numpy count as ``int`` and ``float``, and
    arrays as sequences. Text is not a sequence of texts, and empty text is not a path.

    Raises:
        InputError: an argument does not fit its annotation; raised by the function when it is called.
    """
    if isinstance(function, type):
        function.__init__ = checked(function.__init__)  # type: ignore[misc]
        return cast("Checked", function)
    signature = inspect.signature(function)
    place = function.__qualname__.removesuffix(".__init__")
    annotations = inspect.get_annotations(function)

    @cache
    def types() -> dict[str, Any]:
        # Names may be defined below the function, or only for type checkers.
        names = _Names(function.__globals__, dict(vars(builtins)))
        return {name: _evaluate(annotations.get(name, Any), names) for name in signature.parameters}

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind_partial(*args, **kwargs).arguments
        except TypeError:
            # Python's own error about a missing or unknown argument is clearer.
            return function(*args, **kwargs)
        for name, value in given.items():
            if signature.parameters[name].kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
                continue
            if not _fits(value, kind := types()[name]):
                expected = annotations[name]
                hint = _hint(value, kind, expected)
                raise InputError(f"{place}: {name}: expected {expected}, found {_shown(value)}{hint}")
        return function(*args, **kwargs)

    return cast("Checked", call)


class _Names(ChainMap[str, Any]):
    """The names of a module; a missing one stands for classes of this name."""

    def __missing__(self, key: str) -> Any:
        return _Named(key, (), {})


class _Named(type):
    """Stand for a class that is not imported, by the name of the class."""

    def __instancecheck__(cls, value: Any) -> bool:
        return any(kind.__name__ == cls.__name__ for kind in type(value).__mro__)


def _evaluate(annotation: Any, names: Mapping[str, Any]) -> Any:
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, {}, names)
    except (AttributeError, TypeError):
        # A member of a module, or a generic class, that is not imported.
        return Any


def _fits(value: Any, kind: Any) -> bool:
    """Return whether a value is of an annotated type."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        is_empty = isinstance(value, str) and not value
        return not (is_empty and Path in args) and any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return any(isinstance(value, type(arg)) and value == arg for arg in args)
    if kind is Any:
        return True
    if kind in (None, type(None)):
        return value is None
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if kind is bool:
        return isinstance(value, bool | np.bool_)
    if kind is Path:
        return isinstance(value, os.PathLike) or hasattr(value, "joinpath")
    if getattr(kind, "_is_protocol", False):
        # Unlike for isinstance since Python 3.12, a member may come from __getattr__.
        return all(hasattr(value, name) for name in vars(kind) if not name.startswith("_"))
    if isinstance(origin, type):
        return _is_collection(value, origin) and all(_fits(item, arg) for item, arg in _items(value, args))
    return isinstance(value, kind) if isinstance(kind, type) else True


def _is_collection(value: Any, kind: type) -> bool:
    if isinstance(value, str | bytes):
        return False
    is_array = kind is Sequence and hasattr(type(value), "__len__") and hasattr(type(value), "__getitem__")
    is_array = is_array and getattr(value, "ndim", 1) > 0
    return isinstance(value, kind) or (is_array and not isinstance(value, Mapping | set))


def _items(value: Any, args: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Return items of a collection, each with its annotated type.

    What can be read only once is left unread.
    """
    if isinstance(value, Mapping):
        return [pair for key, item in value.items() for pair in zip((key, item), args, strict=False)]
    if not isinstance(value, Collection) or not args:
        return []
    # One item of each type is enough, and a vocabulary is long.
    return [(item, args[0]) for item in {type(item): item for item in value}.values()]


def _shown(value: Any) -> str:
    return reprlib.repr(value) if isinstance(value, VALUES) else f"a value of type {type(value).__name__}"


def _hint(value: Any, kind: Any, expected: str) -> str:
    if _fits([value], kind) and not _fits([object()], kind):
        return f"; write [{_shown(value)}]"
    return "".join(f"; {hint}" for name, hint in SOURCES.items() if name in expected.split(" | "))
