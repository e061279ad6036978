"""Export frames as text for terminals, scripts, and spreadsheets."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable
from decimal import Decimal
from itertools import chain
from typing import TYPE_CHECKING, Any, BinaryIO

from entrace.analysis.trace.errors import InputError
from entrace.analysis.trace.plain import escape, plain

if TYPE_CHECKING:
    import polars as pl

FORMATS = ("table", "csv", "json", "parquet")
TABLE_ROWS = 100
# Rows that are converted to JSON at a time.
JSON_ROWS = 10_000
# Columns that EXPLAIN returns.
PLAN = ["explain_key", "explain_value"]
CSV_DIGITS = 6
# Spreadsheets run a cell that begins with one of these characters as a formula (OWASP, "CSV Injection"). Some of them
# first strip leading blanks and quotes.
FORMULA = r"""^[\s"']*[=+\-@＝＋－＠]|^[\t\r\n]"""


def write(parts: Iterable[pl.DataFrame], form: str, out: BinaryIO | io.RawIOBase, *, is_safe: bool = False) -> None:
    """Write frames, as they arrive, as one table in one of ``FORMATS``.

    Every format except ``table`` preserves the exact values. Memory does not grow with the number of rows.

    Args:
        parts: Frames with equal columns, of which the first may be empty; at least one.
        form: One of ``FORMATS``.
        out: File to write to; parquet needs no seeking.
        is_safe: In CSV, mark text that a spreadsheet would run as a formula with an apostrophe.

    Raises:
        InputError: CSV cannot represent the type of a column.
    """
    if form == "parquet":
        _write_parquet(parts, out)
    elif form == "csv":
        for number, frame in enumerate(parts):
            flat = _flat(frame)
            out.write(_csv(_without_formulas(flat) if is_safe else flat, has_header=number == 0).encode())
    elif form == "json":
        _write_json(parts, out)
    else:
        _write_table(parts, out)


def to_json(value: Any, default: Callable[[Any], str] | None = None) -> str:
    """Return standard JSON; NaN and infinity, which JSON lacks, become null.

    ``default`` converts a value of any other type to text.
    """
    return json.dumps(_json_value(value), indent=1, default=default, allow_nan=False)


def to_report_csv(frame: pl.DataFrame) -> str:
    """Return CSV that is safe in a spreadsheet.

    Numbers have six significant digits, and no text runs as a formula.
    """
    return _csv(readable(to_csv_digits(_without_formulas(_flat(frame)))))


def to_csv_digits(frame: pl.DataFrame) -> pl.DataFrame:
    """Round numbers to the significant digits of a report's CSV files."""
    import polars.selectors as cs

    return frame.with_columns(cs.float().round_sig_figs(CSV_DIGITS))


def readable(frame: pl.DataFrame) -> pl.DataFrame:
    """Shorten each text to one line without control characters."""
    import polars as pl
    import polars.selectors as cs

    text = frame.select(cs.string())
    cells = ([None if cell is None else plain(cell) for cell in column] for column in text)
    return frame.with_columns(
        pl.Series(name, column, pl.String) for name, column in zip(text.columns, cells, strict=True)
    )


def show(text: str) -> str:
    """Escape the control characters in ``text``, except for line breaks."""
    return "\n".join(map(escape, text.split("\n")))


class Visible(io.RawIOBase):
    """Binary file that escapes control characters, except for line breaks.

    The file holds text for a terminal.
    """

    def __init__(self, out: BinaryIO) -> None:
        """Write to ``out``."""
        self._out = out

    def write(self, data: Any) -> int:
        """Write whole characters in UTF-8."""
        self._out.write(show(bytes(data).decode()).encode())
        return len(data)


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


def _without_formulas(frame: pl.DataFrame) -> pl.DataFrame:
    import polars as pl
    import polars.selectors as cs

    text = pl.when(cs.string().str.contains(FORMULA)).then("'" + cs.string()).otherwise(cs.string())
    return frame.with_columns(text.name.keep())


def _csv(frame: pl.DataFrame, has_header: bool = True) -> str:
    import polars as pl

    try:
        return frame.write_csv(include_header=has_header)
    except pl.exceptions.ComputeError:
        lacking = {pl.Binary, pl.Duration, pl.Object}
        columns = [f"{name} {kind}" for name, kind in frame.schema.items() if kind.is_nested() or kind in lacking]
        raise InputError(
            f"csv cannot represent every column ({', '.join(columns)}); cast these columns to text, or write json"
        ) from None


def _write_parquet(parts: Iterable[pl.DataFrame], out: BinaryIO | io.RawIOBase) -> None:
    import polars as pl
    import pyarrow.parquet as pq

    tables = (frame.to_arrow(compat_level=pl.CompatLevel.oldest()) for frame in parts)
    first = next(tables)
    with pq.ParquetWriter(out, first.schema, compression="zstd", write_page_checksum=True) as writer:
        for table in chain([first], tables):
            if len(table):
                writer.write_table(table)


def _write_json(parts: Iterable[pl.DataFrame], out: BinaryIO | io.RawIOBase) -> None:
    """Write an array with one object per line."""
    separator = b"[\n"
    for frame in parts:
        for part in frame.iter_slices(JSON_ROWS):
            out.write(separator + _json_rows(part).removesuffix(b"\n").replace(b"\n", b",\n"))
            separator = b",\n"
    out.write(b"[]\n" if separator == b"[\n" else b"\n]\n")


def _json_rows(frame: pl.DataFrame) -> bytes:
    """Return one JSON object per line."""
    import polars as pl
    import polars.selectors as cs

    if all(map(_is_plain, frame.dtypes)):
        # Doubles print all digits of a 32-bit float.
        return frame.with_columns(cs.by_dtype(pl.Float32).cast(pl.Float64)).write_ndjson().encode()
    return "\n".join(json.dumps(_json_value(row), default=str) for row in frame.iter_rows(named=True)).encode()


def _is_plain(kind: pl.DataType) -> bool:
    """Return whether polars writes a type as Python's json module does.

    Polars is faster by a factor of ten.
    """
    import polars as pl

    return kind.is_integer() or kind in (pl.Float64, pl.Float32, pl.Boolean, pl.String)


def _write_table(parts: Iterable[pl.DataFrame], out: BinaryIO | io.RawIOBase) -> None:
    import polars as pl

    head: list[pl.DataFrame] = []
    held = num_rows = 0
    for frame in parts:
        if held < TABLE_ROWS or not head:
            head.append(frame.head(TABLE_ROWS - held))
            held += head[-1].height
        num_rows += frame.height
    shown = pl.concat(head)
    # EXPLAIN draws its own boxes.
    text = "\n".join(map(show, shown[PLAN[1]])) if shown.columns == PLAN else _table(shown)
    more = f"\n... {num_rows:,} rows in all; --format csv prints every one" if num_rows > TABLE_ROWS else ""
    out.write(f"{text}{more}\n".encode())


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
        return show(str(frame.with_columns(cs.string().str.replace_all("\n", r"\n", literal=True))))
