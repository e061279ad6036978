"""Convert frames to JSON that a page can show."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import polars as pl

# Longest text of a cell in a table, in characters.
CELL_LENGTH = 2000
# JavaScript's numbers are exact up to here.
LARGEST = 2**53


def columns_of(frame: pl.DataFrame, *, whole: bool = False) -> dict[str, list[Any]]:
    """Return the values of each column, as JSON holds them.

    Text is cut to ``CELL_LENGTH`` unless ``whole``.
    """
    import polars as pl

    found: dict[str, list[Any]] = {}
    for name in frame.columns:
        column = frame[name]
        if column.dtype == pl.Float32:
            # A single-precision number has seven digits, and a double would print its rounding.
            column = column.cast(pl.Float64).round_sig_figs(7)
        found[name] = [_cell(value, whole) for value in column.to_list()]
    return found


def _cell(value: Any, whole: bool) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if -LARGEST <= value <= LARGEST else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, str):
        return value if whole or len(value) <= CELL_LENGTH else f"{value[:CELL_LENGTH]}…"
    if isinstance(value, list):
        return [_cell(entry, whole) for entry in value]
    if isinstance(value, dict):
        return {str(name): _cell(entry, whole) for name, entry in value.items()}
    return str(value)


def to_json(value: Any) -> bytes:
    """Return compact JSON in UTF-8; lone surrogates, invalid there, stay escaped."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"), default=str).encode()
