"""All methods that an arm can be, by name: shaping of advantages, loss-level methods, and recipes of settings."""

from __future__ import annotations

import json
from typing import Any

from analysis.trace import InputError, flatten, nearest
from trainer import objectives, recipes, shaping
from trainer.config import merge
from trainer.method import Method, Settings

KINDS: dict[str, dict[str, Method]] = {
    "recipe": recipes.METHODS,
    "shaping": shaping.METHODS,
    "loss": {name: method for name, method in objectives.METHODS.items() if name != "grpo"},
}
METHODS: dict[str, Method] = {name: method for found in KINDS.values() for name, method in found.items()}


def method_settings(name: str) -> Settings:
    """Nested config values that select a method; shaping methods joined by ``+`` are applied in that order.

    Raises:
        InputError: no such method.
    """
    for part in name.split("+"):
        if part not in METHODS:
            raise InputError(f'unknown method "{part}"{nearest(part, METHODS)}')
    if all(part in shaping.METHODS for part in name.split("+")):
        return {"shaping": {"method": name}}
    if "+" in name:
        raise InputError(f'method "{name}": only shaping methods can be joined by +')
    method = METHODS[name]
    if name in recipes.METHODS:
        return method.function()
    return {"loss": merge(method.settings, {"method": name})}


def describe_methods() -> dict[str, dict[str, Any]]:
    """Kind, equation, summary, source, parameters, their section, and the overrides that select it, by method."""
    return {
        name: {
            "kind": kind,
            **method.describe(),
            "section": f"{kind}.{method.section}" if method.section else "",
            "settings": [f"{key}={json.dumps(value)}" for key, value in flatten(method_settings(name)).items()],
        }
        for kind, found in KINDS.items()
        for name, method in found.items()
    }
