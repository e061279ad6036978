"""Whatever a file holds, reading it gives a result or one line that says what is wrong with it."""

from __future__ import annotations

import json
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from analysis.trace import InputError
from trainer.config import load_config, read_toml
from trainer.grid import load_grid
from trainer.pretrain import load_recipe
from trainer.resources import CONFIGS

READERS: dict[str, Callable[[str], Any]] = {
    "tiny": load_config,
    "tiny-study": load_grid,
    "base-policy": lambda path: load_recipe(Path(path)),
}
SHIPPED = {name: (CONFIGS / f"{name}.toml").read_text() for name in READERS}
KEYS = sorted({key for text in SHIPPED.values() for key in __import__("re").findall(r"[a-z_]+", text)})
# Text that means something to TOML, more often than not.
SIGNS = st.text(st.sampled_from(list("[]{}=.,\"'#\n\\ 0123456789eE+-_:TZ") + list("abinf\x00\ud7ff\u202e")), max_size=12)
SCALARS = st.one_of(
    st.none().map(lambda _: "nan"),
    st.sampled_from(["inf", "-inf", "1979-05-27T07:32:00Z", "07:32:00", "true", "9" * 5000, "1e400", "''", "0x7fffffff"]),
    st.integers().map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8).map(json.dumps),
)
NAMES = st.one_of(st.sampled_from(KEYS), st.text(string.printable, max_size=6)).map(json.dumps)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]"),
        st.dictionaries(NAMES, inner, max_size=3).map(
            lambda table: "{" + ", ".join(f"{name} = {value}" for name, value in table.items()) + "}"
        ),
    ),
    max_leaves=6,
)
