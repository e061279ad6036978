"""Export frames as text for terminals, scripts, and spreadsheets."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from entrace.analysis.trace.errors import InputError
from entrace.analysis.trace.plain import escape, plain

if TYPE_CHECKING:
    import polars as pl

FORMATS = ("table", "csv", "json", "parquet")
TABLE_ROWS = 100
CSV_DIGITS = 6
# Spreadsheets run a cell that begins with one of these characters as a formula (OWASP, "CSV Injection"). Some of them
# first strip leading blanks and quotes.
FORMULA = r"""^[\s"']*[=+\-@＝＋－＠]|^[\t\r\n]"""


def render(frame: pl.DataFrame, form: str) -> bytes:
    """Return ``frame`` in one of ``FORMATS``; every format except ``table`` preserves the exact values.

    Raises:
        InputError: CSV cannot represent the type of a column.
    """
    if form == "parquet":
        buffer = io.BytesIO()
        frame.write_parquet(buffer)
        return buffer.getvalue()
    if form == "csv":
        return _csv(_flat(frame)).encode()
    if form == "json":
        return (to_json(frame.to_dicts(), default=str) + "\n").encode()
    return (_table(frame) + "\n").encode()


def to_json(value: Any, default: Callable[[Any], str] | None = None) -> str:
    """Return standard JSON; NaN and infinity, which JSON lacks, become null.

    ``default`` converts a value of any other type to text.
    """
    return json.dumps(_json_value(value), indent=1, default=default, allow_nan=False)


def to_report_csv(frame: pl.DataFrame) -> str:
    """Return CSV that is safe in a spreadsheet: six significant digits, and no text that runs as a formula."""
    import polars as pl
    import polars.selectors as cs

    frame = _flat(frame)
    text = pl.when(cs.string().str.contains(FORMULA)).then("'" + cs.string()).otherwise(cs.string())
    return _csv(readable(frame.with_columns(cs.float().round_sig_figs(CSV_DIGITS), text.name.keep())))


def readable(frame: pl.DataFrame) -> pl.DataFrame:
    """Return ``frame`` with each text shortened to one line without control characters."""
    import polars as pl
    import polars.selectors as cs

    text = frame.select(cs.string())
    cells = ([None if cell is None else plain(cell) for cell in column] for column in text)
    return frame.with_columns(
        pl.Series(name, column, pl.String) for name, column in zip(text.columns, cells, strict=True)
    )


def show(text: str) -> str:
    """Return ``text`` with its line breaks, and every other control character escaped."""
    return "\n".join(map(escape, text.split("\n")))


def _json_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _json_value(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return value


def _flat(frame: pl.DataFrame) -> pl.DataFrame:
    import polars as pl

    lists = [name for name, kind in frame.schema.items() if isinstance(kind, pl.List)]
    return frame.with_columns(pl.col(name).cast(pl.List(pl.String)).list.join(";") for name in lists)


def _csv(frame: pl.DataFrame) -> str:
    import polars as pl

    try:
        return frame.write_csv()
    except pl.exceptions.ComputeError:
        kinds = ", ".join(f"{name} {kind}" for name, kind in frame.schema.items() if kind.is_nested())
        raise InputError(
            f"csv cannot represent every column ({kinds or 'binary'}); use --format json, or cast these columns"
        ) from None


def _table(frame: pl.DataFrame) -> str:
    import polars as pl
    import polars.selectors as cs

    with pl.Config(
        tbl_rows=TABLE_ROWS,
        tbl_cols=-1,
        tbl_width_chars=-1,
        fmt_str_lengths=40,
        tbl_hide_dataframe_shape=True,
        tbl_hide_column_data_types=True,
        tbl_formatting="ASCII_MARKDOWN",
    ):
        text = show(str(frame.with_columns(cs.string().str.replace_all("\n", r"\n", literal=True))))
    more = f"\n... {frame.height:,} rows in all; --format csv prints every one" if frame.height > TABLE_ROWS else ""
    return text + more
