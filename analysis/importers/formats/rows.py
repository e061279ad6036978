"""Read rows of prompt and response in JSONL or Parquet.

Fields have the names of ``columns.ALIASES``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entrace.analysis.importers.columns import ALIASES, NEEDED, look_up
from entrace.analysis.importers.formats.base import Format, unchanged

# One of these fields makes a row a rollout.
TELLING = ("prompt", "prompt_ids", "response", "response_ids")


def _is_row(row: Mapping[str, Any], path: Path) -> bool:
    del path
    return any(look_up(row, key) is not None for name in TELLING for key in (name, *ALIASES[name]))


FORMAT = Format(
    "rows",
    "rows of prompt and response",
    ("*.jsonl", "*.parquet"),
    _is_row,
    unchanged,
    needed={**NEEDED, "reward": "a number"},
)
