"""Import public names on first use.

A command therefore loads only libraries that it uses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def names_from(
    package: str, homes: Mapping[str, str], modules: Mapping[str, str] | None = None
) -> Callable[[str], Any]:
    """Return a module-level ``__getattr__`` for a package.

    Args:
        package: Name of the package.
        homes: Module that defines each public name, or ``module:name`` if it has another name there.
        modules: Full name of each public module.
    """

    def load(name: str) -> Any:
        if modules and name in modules:
            return import_module(modules[name])
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, defined = homes[name].partition(":")
        return getattr(import_module(module), defined or name)

    return load
