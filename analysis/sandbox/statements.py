"""Check that SQL is one read-only query, and describe errors of DuckDB."""

from __future__ import annotations

import re
from functools import lru_cache

from entrace.analysis.trace.errors import InputError, quoted_input_error
from entrace.analysis.trace.plain import well_formed

# EXPLAIN ANALYZE executes the statement that follows, which must therefore be a query as well.
COMMENTS = r"(?:\s|--[^\n]*|/\*(?:(?!\*/).)*\*/)*"
EXPLAIN = re.compile(rf"{COMMENTS}explain\b\s*(\([^)]*\)|analyze\b)?", re.IGNORECASE | re.DOTALL)
FINAL_SEMICOLON = re.compile(rf";{COMMENTS}\Z", re.DOTALL)
# Readable names for statement types of DuckDB.
STATEMENT_NAMES = {"MULTI": "a PIVOT inside another statement"}
SQL_POSITION = re.compile(r"\s*\n\s*LINE \d+:.*", re.DOTALL)


def query_parameters(text: str) -> frozenset[str]:
    """Return ``parameter_names``; what DuckDB cannot parse is an error in one line.

    Raises:
        InputError: the text is not a single query, or cannot be parsed.
    """
    import duckdb

    try:
        return parameter_names(text)
    except duckdb.Error as error:
        raise InputError(one_line(error)) from None


# A question is parsed once, although it is asked about many times.
@lru_cache(maxsize=256)
def parameter_names(text: str) -> frozenset[str]:
    """Return the names of the ``$parameters`` of one query, or of EXPLAIN of one.

    Raises:
        InputError: the text is not a single query.
        duckdb.Error: the SQL cannot be parsed.
    """
    import duckdb

    if text != well_formed(text):
        raise InputError("sql: the query is not UTF-8")
    if explain := EXPLAIN.match(text):
        text = text[explain.end() :]
    statements = duckdb.extract_statements(text)
    is_select = len(statements) == 1 and statements[0].type == duckdb.StatementType.SELECT
    if not is_select and not _is_pivot(text):
        found = " and ".join(STATEMENT_NAMES.get(s.type.name, s.type.name) for s in statements) or "nothing"
        raise InputError(f"sql is read-only: expected one query, such as SELECT or PIVOT; found {found}")
    return frozenset(name for statement in statements for name in statement.named_parameters)


def _is_pivot(text: str) -> bool:
    """Return whether SQL is one query with a PIVOT.

    DuckDB expands such a query into several statements. EXISTS accepts exactly one query, and no other statement.
    """
    import duckdb

    try:
        duckdb.extract_statements(f"select exists ({FINAL_SEMICOLON.sub('', text)}\n)")
    except duckdb.Error:
        return False
    return True


def columns_of(text: str) -> str:
    """Return a query for the columns of another one, without its rows."""
    return f"select * from ({FINAL_SEMICOLON.sub('', text)}\n) limit 0"


def one_line(error: Exception) -> str:
    """Return an error of DuckDB without the position in the text."""
    if quoted := quoted_input_error(error):
        return quoted
    return f"sql: {' '.join(SQL_POSITION.sub('', str(error)).split())}"
