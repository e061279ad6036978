"""Answer the same SQL on Spark: translate one DuckDB query at a time, and run it over the same files."""
