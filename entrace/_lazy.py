"""Public names that are imported on first use, so that no command waits for libraries it does not use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def names_from(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Returns a module-level ``__getattr__`` for ``package``.

    Args:
        package: Name of the package.
        homes: Module of each public name; a name that equals the end of its module stands for the module itself.
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = import_module(homes[name])
        return module if homes[name].endswith(f".{name}") else getattr(module, name)

    return load
