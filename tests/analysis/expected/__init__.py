"""Rows that each query must give on the trace of conftest: stem -> (params, columns, rows)."""

from math import exp

# Half a 95 % interval, in standard errors.
SE = 1.96

# Lower edges of the bins, 0.1 % wide, that movements of 0.1 and 0.2 fall into.
Q_01, Q_02 = exp(-2.303), exp(-1.610)
