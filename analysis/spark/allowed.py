"""Accept only SQL that Spark computes as DuckDB does, over registered tables.

The check is an allow list over the parsed query, so that nothing reaches Spark unless it is named here: no file
(``'x.parquet'``, ``read_csv``, parquet.`x`), no call of Java (``reflect``), no function of the session or of chance.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Collection, Iterator

from sqlglot import exp

from entrace.analysis.trace.errors import InputError, nearest

OTHERWISE = 'leave out engine="spark" (--engine spark) to run it on DuckDB'
SYNTAX = {
    *(exp.Select, exp.Union, exp.Intersect, exp.Except, exp.With, exp.CTE, exp.Subquery, exp.Values, exp.Tuple),
    *(exp.From, exp.Join, exp.Where, exp.Group, exp.GroupingSets, exp.Having, exp.Qualify, exp.Order, exp.Ordered),
    *(exp.Limit, exp.Offset, exp.Distinct, exp.Table, exp.TableAlias, exp.Alias, exp.Column, exp.Identifier),
    *(exp.Star, exp.Literal, exp.Null, exp.Boolean, exp.Placeholder, exp.Paren, exp.DataType, exp.DataTypeParam),
    *(exp.Window, exp.WindowSpec, exp.IgnoreNulls, exp.Filter, exp.Lambda, exp.PropertyEQ, exp.Bracket),
    *(exp.Pivot, exp.UnpivotColumns, exp.Var),
    *(exp.And, exp.Or, exp.Not, exp.Is, exp.In, exp.Between, exp.Exists, exp.Like, exp.ILike, exp.DPipe),
    *(exp.EQ, exp.NEQ, exp.GT, exp.GTE, exp.LT, exp.LTE, exp.NullSafeEQ, exp.NullSafeNEQ),
    *(exp.Add, exp.Sub, exp.Mul, exp.Div, exp.IntDiv, exp.Mod, exp.Neg),
}
FUNCTIONS = {
    *(exp.Cast, exp.TryCast, exp.Case, exp.If, exp.Coalesce, exp.Nullif, exp.Greatest, exp.Least),
    *(exp.Abs, exp.Sign, exp.Floor, exp.Ceil, exp.Round, exp.Exp, exp.Ln, exp.Log, exp.Sqrt, exp.Pow),
    *(exp.Count, exp.CountIf, exp.Sum, exp.Avg, exp.Min, exp.Max, exp.AnyValue, exp.ArrayAgg, exp.ArgMax, exp.ArgMin),
    *(exp.LogicalAnd, exp.LogicalOr, exp.Stddev, exp.StddevSamp, exp.StddevPop, exp.Variance, exp.VariancePop),
    *(exp.Corr, exp.CovarPop, exp.CovarSamp, exp.RegrSlope, exp.RegrIntercept, exp.RegrR2, exp.RegrCount),
    *(exp.PercentileCont, exp.PercentileDisc, exp.Median),
    *(exp.RowNumber, exp.Rank, exp.DenseRank, exp.PercentRank, exp.CumeDist, exp.Ntile),
    *(exp.Lag, exp.Lead, exp.FirstValue, exp.LastValue),
    *(exp.Lower, exp.Upper, exp.Length, exp.Trim, exp.ConcatWs, exp.Chr, exp.RegexpLike),
    *(exp.Array, exp.Struct, exp.ArrayContains, exp.ArraySize, exp.Transform, exp.GenerateSeries),
    *(exp.Explode, exp.Unnest),
}
# Functions that sqlglot has no class for.
NAMED = {"isfinite", "list_product", "map_extract_value"}
TYPES = {
    **{exp.DType.BOOLEAN: "BOOLEAN", exp.DType.TINYINT: "TINYINT", exp.DType.SMALLINT: "SMALLINT"},
    **{exp.DType.INT: "INT", exp.DType.BIGINT: "BIGINT", exp.DType.INT128: "DECIMAL(38, 0)"},
    **{exp.DType.UTINYINT: "SMALLINT", exp.DType.USMALLINT: "INT", exp.DType.UINT: "BIGINT"},
    **{exp.DType.FLOAT: "FLOAT", exp.DType.DOUBLE: "DOUBLE"},
    **dict.fromkeys((exp.DType.TEXT, exp.DType.VARCHAR), "STRING"),
}
CONTAINERS = {exp.DType.ARRAY, exp.DType.LIST, exp.DType.MAP}
JOINS = {"", "INNER", "CROSS", "OUTER", "SEMI", "ANTI"}


def check(tree: exp.Expr, tables: Collection[str], functions: Collection[str]) -> None:
    """Check that a parsed query uses only what this module lists.

    Args:
        tree: The query.
        tables: Names of the tables, views, and table macros.
        functions: Names of the scalar macros and of the functions that Python computes.

    Raises:
        InputError: the query uses anything else.
    """
    if not isinstance(tree, exp.Query | exp.Pivot):
        raise _rejected(tree.key.upper())
    for node in tree.walk():
        if isinstance(node, exp.Anonymous):
            if node.name.lower() not in {*NAMED, *functions, *(tables if _is_source(node) else ())}:
                raise _rejected(f"{node.name}()")
        elif type(node) not in SYNTAX | FUNCTIONS:
            raise _rejected(f"{node.sql_name().lower()}()" if isinstance(node, exp.Func) else node.key.upper())
        elif found := _variant(node):
            raise _rejected(found)
        elif isinstance(node, exp.Table):
            _check_table(node, tables)


def _check_table(node: exp.Table, tables: Collection[str]) -> None:
    if node.args.get("db") or node.args.get("catalog"):
        raise InputError(f'sql: "{node.sql("duckdb")}" names a database or a file; name the table alone')
    if isinstance(node.this, exp.Identifier) and (name := node.name).lower() not in {*tables, *_ctes_around(node)}:
        raise InputError(f'sql: "{name}" is not a table of the trace, and Spark reads no file{nearest(name, tables)}')


def _ctes_around(node: exp.Expr) -> Iterator[str]:
    """Yield names of the common table expressions in the scope of a node.

    A table may refer to these names, which are in lower case.
    """
    while node := node.parent:  # pyright: ignore[reportAssignmentType]
        yield from (cte.alias.lower() for cte in getattr(node.args.get("with_"), "expressions", ()))


def _is_source(node: exp.Expr) -> bool:
    return isinstance(node.parent, exp.Table)


def _variant(node: exp.Expr) -> str | None:
    """Return the name of an unsupported variant of accepted syntax, or None.

    Spark lacks the variant or understands it differently.
    """
    match node:
        case exp.Join() if node.method or node.kind not in JOINS:
            return f"{node.method or node.kind} JOIN"
        case exp.Pivot() if not node.args.get("unpivot") or node.args.get("include_nulls"):
            return "UNPIVOT INCLUDE NULLS" if node.args.get("unpivot") else "PIVOT"
        case exp.SetOperation() if node.args.get("by_name"):
            return "UNION BY NAME"
        case exp.SetOperation() if _lists_in_another_order(node):
            return "a set operation on * with JOIN USING (name the columns, or join with ON)"
        case exp.Distinct() if node.args.get("on"):
            return "DISTINCT ON"
        case exp.With() if node.recursive:
            return "WITH RECURSIVE"
        case exp.Star() if node.args.get("replace") or node.args.get("rename"):
            return "* REPLACE or RENAME"
        case exp.Table() if node.args.get("sample"):
            return "TABLESAMPLE"
        case exp.Var() if node.name.upper() != "ALL":
            return node.name
        case exp.DataType() if node.this not in TYPES.keys() | CONTAINERS:
            return f"the type {node.sql('duckdb')}"
        case exp.GenerateSeries() if node.args.get("step"):
            return "range() with a step"
        case exp.Placeholder() if not node.name:
            return "a parameter without a name"
    return None


def _lists_in_another_order(node: exp.SetOperation) -> bool:
    """Return whether a set operation may match columns in another order.

    Columns match by position. Of a join with USING, Spark lists the keys first, so that a star has another order.
    """
    sides = [side.unnest() for side in (node.this, node.expression)]
    if not any(map(_has_star, sides)):
        return False
    return any(
        _has_star(select) and any(join.args.get("using") for join in select.args.get("joins") or ())
        for select in _selects_behind(sides, node.root())
    )


def _has_star(query: exp.Expr) -> bool:
    return isinstance(query, exp.Select) and any(column.is_star for column in query.expressions)


def _selects_behind(queries: list[exp.Expr], root: exp.Expr) -> Iterator[exp.Select]:
    """Yield every SELECT in queries and in common table expressions behind them."""
    ctes = list(root.find_all(exp.CTE))
    names = {table.name.lower() for query in queries for table in query.find_all(exp.Table)}
    while found := [cte for cte in ctes if cte.alias.lower() in names and cte.this not in queries]:
        queries = [*queries, *(cte.this for cte in found)]
        names = {table.name.lower() for query in queries for table in query.find_all(exp.Table)}
    for query in queries:
        yield from query.find_all(exp.Select)


def _rejected(found: str) -> InputError:
    return InputError(f"sql: {found} is not supported on Spark; {OTHERWISE}")
