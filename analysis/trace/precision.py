"""How exactly measured values are kept: float32 with fewer bits of mantissa take less room."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from analysis.trace.schema import Table

# Key of run.json and of the metadata of fields.
MANTISSA_BITS = "mantissa_bits"
# Explicit mantissa bits of float32.
EXACT_BITS = 23


def round_mantissa(values: np.ndarray, bits: int) -> np.ndarray:
    """Rounds to the nearest number that ``bits`` explicit mantissa bits can state, ties to the even one.

    This is rounding to nearest of IEEE 754 in a format with the exponents of float32, its subnormal range included,
    but finite numbers stay finite: beyond the largest of the format they become that one. So the relative error of
    normal numbers is at most 2^-(bits + 1), and order is kept, though what differs may become equal.

    Args:
        values: float32 of any shape. NaN with its payload, infinities, and the sign of zero stay as they are.
        bits: 1 to 23; 23 changes nothing.

    Returns:
        float32 of the same shape, a copy.
    """
    codes = values.view(np.uint32)
    shift = EXACT_BITS - bits
    dropped = np.uint32((1 << shift) - 1)
    # Add just under half of what the last bit kept is worth, and the rest where that bit is odd. A carry out of the
    # mantissa rightly raises the exponent.
    rounded = codes >> shift
    rounded &= dropped & 1
    rounded += dropped >> 1
    rounded += codes
    rounded &= ~dropped
    result = rounded.view(np.float32)
    np.copyto(rounded, codes & ~dropped, where=np.isinf(result))
    np.copyto(result, values, where=~np.isfinite(values))
    return result


def round_measured(rows: pa.Table, table: Table, bits: int) -> pa.Table:
    """Rounds the measured columns of ``rows``, as they are declared in ``table``, and states it in their metadata."""
    columns, fields = rows.columns, list(rows.schema)
    for i, column in enumerate(table.columns):
        if column.is_measured:
            fields[i] = fields[i].with_metadata({**(fields[i].metadata or {}), MANTISSA_BITS: str(bits)})
            if bits < EXACT_BITS:
                exact = columns[i]
                columns[i] = pa.array(round_mantissa(exact.to_numpy(), bits), mask=exact.is_null().to_numpy())
    return pa.Table.from_arrays(columns, schema=pa.schema(fields, rows.schema.metadata))
