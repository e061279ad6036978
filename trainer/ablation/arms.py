"""All methods that an arm can be, by name: presets of settings, advantage shaping, and loss variants."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

# Importing these registers their methods.
import entrace.trainer.ablation.presets
import entrace.trainer.algorithm.objectives
import entrace.trainer.algorithm.shaping  # noqa: F401
from entrace.analysis.trace import InputError, flatten, nearest
from entrace.trainer.algorithm.method import OWN, REGISTRY, MethodSpec, Settings, find_method, own_kind
from entrace.trainer.settings import merge

# The baseline of all others, listed as the preset "none".
PLAIN = "grpo"


def find_arm(name: str) -> MethodSpec:
    """Return the method of any kind that ``name`` stands for; ``module:function`` is imported.

    Raises:
        InputError: no such method, or a function that cannot be one.
    """
    if OWN.fullmatch(name):
        return find_method(name, own_kind(name))
    known = {key: spec for specs in REGISTRY.values() for key, spec in specs.items() if key != PLAIN}
    if name not in known:
        raise InputError(f'unknown method "{name}"{nearest(name, known)}; see `entrace methods`')
    return known[name]


def method_settings(method: str | Sequence[str]) -> Settings:
    """Return the nested config values that select a method.

    Args:
        method: A name, or shaping methods in order of application: a list, or names joined by ``+``.

    Raises:
        InputError: no such method, or methods that cannot be combined.
    """
    names = method.split("+") if isinstance(method, str) else list(method)
    specs = [find_arm(name) for name in names]
    if all(spec.kind == "shaping" for spec in specs):
        return {"shaping": {"method": "+".join(names)}}
    if len(names) > 1:
        raise InputError(f'method "{"+".join(names)}": only shaping methods can be joined by +')
    if specs[0].kind == "preset":
        return specs[0].function()
    return {"loss": merge(specs[0].settings, {"method": names[0]})}


def list_methods(more: Iterable[str] = ()) -> dict[str, MethodSpec]:
    """Return every built-in method by name, then those in ``more``."""
    found = {name: spec for specs in REGISTRY.values() for name, spec in specs.items()}
    found.pop(PLAIN)
    return {**found, **{name: find_arm(name) for name in more}}


def describe_methods(more: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """Return kind, equation, summary, source, parameters, section, and the overrides that select it, per method."""
    return {
        name: {
            "kind": spec.kind,
            **spec.describe(),
            "section": f"{spec.kind}.{spec.section}" if spec.section else "",
            "settings": [f"{key}={json.dumps(value)}" for key, value in flatten(method_settings(name)).items()],
        }
        for name, spec in list_methods(more).items()
    }
