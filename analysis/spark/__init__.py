"""Answer the same SQL on Spark.

Each DuckDB query is translated and runs over the same files.
"""
