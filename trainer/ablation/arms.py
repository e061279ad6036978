"""List an arm's methods by name: presets, advantage shaping, loss variants."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

# Importing these registers their methods.
import entrace.trainer.ablation.presets
import entrace.trainer.algorithm.objectives
import entrace.trainer.algorithm.shaping  # noqa: F401
from entrace.analysis.trace import InputError, flatten, nearest
from entrace.trainer.algorithm.method import (
    OWN,
    REGISTRY,
    Kind,
    MethodSpec,
    Settings,
    find_method,
    own_kind,
    split_methods,
)
from entrace.trainer.resources import resolve_config
from entrace.trainer.settings import merge, read_toml

# The baseline of all others, listed as the preset "none".
PLAIN = "grpo"


def find_any_method(name: str, kind: Kind | None = None) -> MethodSpec:
    """Return the method called ``name``; ``module:function`` is imported.

    Args:
        name: Name of a method of any kind.
        kind: Kind of a user's own function (default: see ``own_kind``).

    Raises:
        InputError: the method is unknown, or the function cannot be a method.
    """
    if OWN.fullmatch(name):
        return find_method(name, kind or own_kind(name))
    known = {key: spec for specs in REGISTRY.values() for key, spec in specs.items() if key != PLAIN}
    if name not in known:
        raise InputError(f'unknown method "{name}"{nearest(name, known)} (see `entrace methods`)')
    return known[name]


def method_settings(method: str | Sequence[str]) -> Settings:
    """Return the nested config values that select a method.

    Args:
        method: A name, or shaping methods in order of application: a list, or names joined by ``+``.

    Raises:
        InputError: a method is unknown, or the methods cannot be combined.
    """
    names = split_methods(method)
    if not names:
        raise InputError("method: the list is empty; name at least one method, such as none")
    return _settings_of([find_any_method(name) for name in names], names)


def _settings_of(specs: Sequence[MethodSpec], names: Sequence[str]) -> Settings:
    if all(spec.kind == "shaping" for spec in specs):
        return {"shaping": {"method": "+".join(names)}}
    if len(names) > 1:
        raise InputError(f'method "{"+".join(names)}": only shaping methods can be joined by +')
    if specs[0].kind == "preset":
        return specs[0].function()
    return {"loss": merge(specs[0].settings, {"method": names[0]})}


def list_methods(more: Mapping[str, Kind | None] | Iterable[str] = ()) -> dict[str, MethodSpec]:
    """Return every built-in method by name, followed by those in ``more``.

    Args:
        more: Further methods; a mapping gives the kind of each, or None where ``own_kind`` decides.

    Raises:
        InputError: a method is unknown, or a function cannot be a method.
    """
    # Importing a module of the user's registers its methods too.
    package = __name__.partition(".")[0]
    built_in = {
        name: spec
        for specs in REGISTRY.values()
        for name, spec in specs.items()
        if name != PLAIN and spec.function.__module__.startswith(f"{package}.")
    }
    kinds = more if isinstance(more, Mapping) else dict.fromkeys(more)
    return {**built_in, **{name: find_any_method(name, kind) for name, kind in kinds.items()}}


def describe_methods(more: Mapping[str, Kind | None] | Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """Return a description of every method by name; ``more`` as for ``list_methods``.

    Returns:
        Kind, equation, summary, source, parameters, section, and the overrides that select the method.
    """
    return {
        name: {
            "kind": spec.kind,
            **spec.describe(),
            "section": f"{spec.kind}.{spec.section}" if spec.section else "",
            "settings": [f"{key}={json.dumps(value)}" for key, value in flatten(_settings_of([spec], [name])).items()],
        }
        for name, spec in list_methods(more).items()
    }


def named_methods(arguments: Iterable[str]) -> dict[str, Kind | None]:
    """Return the methods that command-line arguments name, with their kinds.

    The kind follows from the method's place in a file, and is None if unknown.

    Args:
        arguments: Method names, ``module:function``, or the TOML file of a run or of a grid.

    Raises:
        InputError: a file cannot be read.
    """
    found: dict[str, Kind | None] = {}
    for argument in arguments:
        path = resolve_config(argument)
        if path.suffix == ".toml":
            found |= _methods_in(read_toml(path))
        else:
            found |= dict.fromkeys(split_methods(argument))
    return found


def _methods_in(table: Mapping[str, Any]) -> dict[str, Kind | None]:
    """Return the user's own methods in a run config or a grid.

    In a grid, methods are in its arms, in ``[base]``, and in the config that it names.
    """
    found: dict[str, Kind | None] = {}
    arms = table.get("arms")
    grid_tables = [table.get("base"), *(arms.values() if isinstance(arms, Mapping) else [])]
    for part in [table, *grid_tables]:
        found |= dict(_own_methods(part)) if isinstance(part, Mapping) else {}
    for name in arms if isinstance(arms, Mapping) else []:
        found |= {own: None for own in split_methods(name) if OWN.fullmatch(own)}
    if isinstance(config := table.get("config"), str):
        found |= _methods_in(read_toml(resolve_config(config)))
    return found


def load_own(values: Mapping[str, Any]) -> list[MethodSpec]:
    """Return the user's own methods that nested config values name.

    Methods that cannot be loaded are left out; validation reports them.
    """
    specs = []
    for name, kind in _own_methods(values):
        with suppress(InputError):
            specs.append(find_any_method(name, kind))
    return specs


def _own_methods(table: Mapping[str, Any]) -> Iterator[tuple[str, Kind | None]]:
    """Yield the user's own methods that a config or an arm names, with their kind.

    The kind is None for the method of an arm.
    """
    kinds: dict[str, Kind] = {"shaping": "shaping", "loss": "loss"}
    places: list[tuple[Any, Kind | None]] = [(table.get("method"), None)]
    for key, kind in kinds.items():
        if isinstance(section := table.get(key), Mapping):
            places.append((section.get("method"), kind))
            if isinstance(matched := section.get("scale_matched"), Mapping):
                places.append((matched.get("mirrors"), kind))
    for method, kind in places:
        for name in split_methods(method):
            if OWN.fullmatch(name):
                yield name, kind
