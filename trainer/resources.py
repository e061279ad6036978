"""Finds what ships with the code: the base policy, configs and recipes; in a wheel and in a checkout alike."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).parent
CONFIGS = PACKAGE / "configs"
EMBEDDED = "embedded"


def find_base_policy() -> Path:
    """Folder of the embedded base policy: inside the wheel, or ``data/base-policy`` of a checkout."""
    packaged = PACKAGE / "base-policy"
    return packaged if packaged.is_dir() else PACKAGE.parent / "data" / "base-policy"


def resolve_config(name: str) -> Path:
    """A path as given, or else the shipped config of that name: ``tiny`` and ``tiny.toml`` both find it."""
    path = Path(name)
    shipped = CONFIGS / f"{path.stem}.toml"
    return path if os.path.exists(path) or path.parent != Path() or not os.path.exists(shipped) else shipped
