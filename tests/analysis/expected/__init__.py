"""Rows that each query must give on the trace of conftest: stem -> (params, columns, rows)."""

# Half a 95 % interval, in standard errors.
SE = 1.96
