"""Frames as text: for people, for scripts and for spreadsheets."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl

FORMATS = ("table", "csv", "json", "parquet")
TABLE_ROWS = 100
CSV_DIGITS = 6


def render(frame: pl.DataFrame, form: str) -> bytes:
    """Returns ``frame`` as one of ``FORMATS``, values unchanged."""
    if form == "parquet":
        buffer = io.BytesIO()
        frame.write_parquet(buffer)
        return buffer.getvalue()
    if form == "csv":
        return _flat(frame).write_csv().encode()
    if form == "json":
        return (json.dumps(frame.to_dicts(), indent=1, default=str) + "\n").encode()
    return (_table(frame) + "\n").encode()


def to_report_csv(frame: pl.DataFrame) -> str:
    """Returns CSV for reading in a spreadsheet: six significant digits, and no text that would run as a formula."""
    import polars as pl
    import polars.selectors as cs

    # A spreadsheet takes a cell that begins with one of these signs for a formula.
    text = pl.when(cs.string().str.contains(r"^[=+\-@\t\r]")).then("'" + cs.string()).otherwise(cs.string())
    return _flat(frame).with_columns(cs.float().round_sig_figs(CSV_DIGITS), text.name.keep()).write_csv()


def _flat(frame: pl.DataFrame) -> pl.DataFrame:
    import polars as pl

    lists = [name for name, kind in frame.schema.items() if isinstance(kind, pl.List)]
    return frame.with_columns(pl.col(name).cast(pl.List(pl.String)).list.join(";") for name in lists)


def _table(frame: pl.DataFrame) -> str:
    import polars as pl

    with pl.Config(
        tbl_rows=TABLE_ROWS,
        tbl_cols=-1,
        tbl_width_chars=-1,
        fmt_str_lengths=40,
        tbl_hide_dataframe_shape=True,
        tbl_hide_column_data_types=True,
        tbl_formatting="ASCII_MARKDOWN",
    ):
        text = str(frame)
    more = f"\n... {frame.height:,} rows in all; --format csv prints every one" if frame.height > TABLE_ROWS else ""
    return text + more
