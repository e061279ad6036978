"""Translate one DuckDB query into Spark's SQL, inlining macros and parameters.

sqlglot parses and writes; the rules below are what it does not know: where both engines accept the same text and
compute different values. ``_RULES`` has one function per kind of expression.

- Numbers with a point are doubles; Spark's decimals would round quotients. Compared with a float, they are floats.
- ``x / 0`` and ``ln(0)`` are infinite or NaN, as in IEEE 754; Spark raises an error or returns null.
- A cast from a real number to an integer rounds; Spark truncates.
- ``log(x)`` has base 10, a list index begins with 1, and an aggregated list keeps nulls and is null without rows.
- ``QUALIFY`` and the statement ``UNPIVOT`` become subqueries.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, cast

from sqlglot import exp, parse
from sqlglot.dialects.duckdb import DuckDB
from sqlglot.dialects.spark import Spark
from sqlglot.errors import ErrorLevel, SqlglotError

from entrace.analysis import queries
from entrace.analysis.spark.allowed import CONTAINERS, TYPES, check
from entrace.analysis.trace.errors import InputError, in_one_line
from entrace.analysis.trace.schema import TABLES

# SQL that sqlglot cannot parse is an error here, and needs no warning beside it.
logging.getLogger("sqlglot").setLevel(logging.ERROR)
LARGEST_INT = 2**31 - 1
REALS = ("float", "double")
# Columns that hold lists; a type is known only to the engines.
LIST_COLUMNS = {
    column.name for table in TABLES.values() for column in table.columns if str(column.type).startswith("list")
}
COMPARISONS = (exp.EQ, exp.NEQ, exp.GT, exp.GTE, exp.LT, exp.LTE)


class _DuckDB(DuckDB):
    """DuckDB's SQL with list indexes as they are written."""

    INDEX_OFFSET = 0


class _Spark(Spark):
    """Spark's SQL with WITH in subqueries.

    sqlglot would move WITH to the top, where names may be taken.
    """

    class Generator(Spark.Generator):
        EXPRESSIONS_WITHOUT_NESTED_CTES: ClassVar[set[type[exp.Expr]]] = set()


@dataclass(frozen=True)
class Shared:
    """Hold the views and macros of sql/staging, parsed.

    Attributes:
        views: Query of each view, by name, in the order in which they build on each other.
        scalars: Parameters and body of each scalar macro, by name.
        tables: Parameters and query of each table macro, by name.
    """

    views: dict[str, exp.Expr]
    scalars: dict[str, tuple[list[str], exp.Expr]]
    tables: dict[str, tuple[list[str], exp.Expr]]


@cache
def shared() -> Shared:
    """Return the views and macros of sql/staging."""
    found = Shared({}, {}, {})
    for statement in (statement for text in queries.staging() for statement in _parse(text)):
        if isinstance(statement.this, exp.UserDefinedFunction):
            macros = found.tables if isinstance(statement.expression, exp.Query) else found.scalars
            names = [parameter.name for parameter in statement.this.expressions]
            macros[statement.this.this.name] = names, statement.expression
        else:
            found.views[statement.this.name] = statement.expression
    return found


def translate(text: str, params: Mapping[str, Any], tables: Collection[str], functions: Collection[str]) -> str:
    """Return Spark's SQL for one query in the SQL of DuckDB.

    Args:
        text: One query that DuckDB has parsed.
        params: Values of all ``$name`` parameters.
        tables: Names of the registered tables and views.
        functions: Names of the registered functions.

    Raises:
        InputError: the query uses what Spark lacks, a table that is not registered, or a value of an unknown type.
    """
    macros = shared()
    try:
        tree, *others = _parse(text)
        if others:
            raise InputError(f"sql: expected one query, found {1 + len(others)}")
        check(tree, {*tables, *macros.tables}, {*functions, *macros.scalars})
        return _to_spark(tree, params)
    except SqlglotError as error:
        raise InputError(f"sql: cannot be translated to Spark's SQL: {in_one_line(error)}") from None


def translate_own(text: str) -> str:
    """Return Spark's SQL for a query of this package, which need not be checked."""
    [tree] = _parse(text)
    return _to_spark(tree, {})


def translate_view(name: str) -> str:
    """Return Spark's SQL for the query of a view of sql/staging."""
    return _to_spark(shared().views[name], {})


def _parse(text: str) -> list[exp.Expr]:
    # A comment after the last semicolon counts as a statement.
    return [found for found in parse(text, read=_DuckDB) if found and not isinstance(found, exp.Semicolon)]


def _to_spark(tree: exp.Expr, params: Mapping[str, Any]) -> str:
    # A root can be replaced only inside another expression.
    root = exp.Tuple(expressions=[tree.copy()])
    _inline(root)
    for node in reversed(list(root.walk())):
        if isinstance(node, exp.Placeholder):
            node.replace(_literal(node.name, params[node.name]))
        elif rule := _RULES.get(node.name.lower() if isinstance(node, exp.Anonymous) else type(node)):
            rule(node)
    [query] = root.expressions
    # Quotes let a name be a keyword of Spark.
    return query.sql(dialect=_Spark, identify=True, comments=False, unsupported_level=ErrorLevel.RAISE)


def _inline(root: exp.Expr) -> None:
    """Replace every call of a macro by its body, also inside bodies."""
    macros = shared()
    while calls := [n for n in root.find_all(exp.Anonymous) if n.name.lower() in macros.scalars.keys() | macros.tables]:
        # An outer call copies its arguments, so that inner ones are replaced first.
        for call in reversed(calls):
            name = call.name.lower()
            if name in macros.scalars:
                call.replace(exp.Paren(this=_body(*macros.scalars[name], call.expressions)))
            else:
                source = cast("exp.Table", call.parent)
                alias = source.args.get("alias") or exp.TableAlias(this=exp.to_identifier(name))
                joins = source.args.get("joins")
                body = _body(*macros.tables[name], call.expressions)
                source.replace(exp.Subquery(this=body, alias=alias.copy(), joins=joins))


def _body(names: list[str], body: exp.Expr, arguments: list[exp.Expr]) -> exp.Expr:
    root = exp.Tuple(expressions=[body.copy()])
    given = dict(zip(names, arguments, strict=True))
    for column in list(root.find_all(exp.Column)):
        if not column.table and column.name in given:
            column.replace(exp.Paren(this=given[column.name].copy()))
        elif column.table in given:
            # A field of a parameter looks like a column of a table.
            struct = exp.Paren(this=given[column.table].copy())
            column.replace(exp.Dot(this=struct, expression=column.this.copy()))
    return root.expressions[0]


def _literal(name: str, value: Any) -> exp.Expr:
    match value:
        case None:
            return exp.null()
        case bool():
            return exp.Boolean(this=value)
        case int():
            return _integer(value)
        case float():
            return _double(repr(value))
        case str():
            return exp.Literal.string(value)
        case {"key": list(keys), "value": list(values)}:
            return exp.func("MAP_FROM_ARRAYS", _literal(name, keys), _literal(name, values))
        case list() if value:
            return exp.Array(expressions=[_literal(name, item) for item in value])
        case list():
            return _cast(exp.Array(expressions=[]), "ARRAY<STRING>")
    raise InputError(f"{name}: expected a number, text, or a list of them on Spark, found {type(value).__name__}")


def _cast(value: exp.Expr, kind: str) -> exp.Cast:
    return exp.Cast(this=value, to=exp.DataType.build(kind, dialect="spark"))


def _integer(value: int) -> exp.Expr:
    return exp.Literal.number(value) if abs(value) <= LARGEST_INT else _cast(exp.Literal.string(str(value)), "BIGINT")


def _double(text: str) -> exp.Cast:
    return _cast(exp.Literal.string(text), "DOUBLE")


def _type_in(value: exp.Expr, kinds: Collection[str]) -> exp.Expr:
    """Return a test of a type, which Spark evaluates before it reads a row."""
    return exp.func("TYPEOF", value.copy()).isin(*map(exp.Literal.string, kinds))


def _if(condition: exp.Expr, then: exp.Expr, otherwise: exp.Expr) -> exp.If:
    return exp.If(this=condition, true=then, false=otherwise)


def _bare(value: exp.Expr) -> exp.Expr:
    while isinstance(value, exp.Paren | exp.Neg):
        value = value.this
    return value


def _number(node: exp.Literal) -> None:
    if node.is_string:
        return
    if node.is_int:
        node.replace(_integer(int(node.this)))
        return
    value = _double(node.this)
    # In DuckDB, a number with an exponent is a double, and any other one with a point is a decimal.
    value.meta["is_decimal"] = "e" not in node.this.lower()
    node.replace(value)


def _comparison(node: exp.Binary) -> None:
    for side, other in (("this", "expression"), ("expression", "this")):
        literal, value = node.args[side], node.args[other]
        if _bare(literal).meta.get("is_decimal"):
            as_float = _cast(_cast(literal.copy(), "FLOAT"), "DOUBLE")
            node.set(side, _if(_type_in(value, ["float"]), as_float, literal.copy()))


def _division(node: exp.Div) -> None:
    divisor = _bare(node.expression)
    divisor = divisor.this if isinstance(divisor, exp.Cast) else divisor
    if isinstance(divisor, exp.Literal) and float(divisor.this):
        return
    a, b = (exp.Paren(this=side.copy()) for side in (node.this, node.expression))
    infinite = exp.Mul(this=a.copy(), expression=_double("Infinity"))
    node.replace(exp.Paren(this=_if(exp.EQ(this=b.copy(), expression=_integer(0)), infinite, a / b)))


def _logarithm(node: exp.Ln | exp.Log) -> None:
    name, x = "LN", node.this
    if isinstance(node, exp.Log):
        base, x = (node.this, node.expression) if node.expression else (exp.Literal.number(10), node.this)
        base = _bare(base)
        if not (isinstance(base, exp.Literal) and base.name in ("2", "10")):
            raise InputError("sql: a logarithm on Spark has base 2, 10, or e; divide by ln(base) for another base")
        name = f"LOG{base.name}"
    logarithm = exp.Anonymous(this=name, expressions=[x.copy()])
    case = exp.Case().when(exp.GT(this=x.copy(), expression=_integer(0)), logarithm)
    case = case.when(exp.EQ(this=x.copy(), expression=_integer(0)), _double("-Infinity"))
    node.replace(case.when(exp.LT(this=x.copy(), expression=_integer(0)), _double("NaN")))


def _rounding_cast(node: exp.Cast) -> None:
    kind = node.to.this
    if kind not in TYPES and kind not in CONTAINERS:
        raise InputError(f"sql: the type {node.to.sql('duckdb')} is not supported on Spark")
    if kind in TYPES:
        node.set("to", exp.DataType.build(TYPES[kind], dialect="spark"))
    if kind in exp.DataType.INTEGER_TYPES and not _is_integer(_bare(node.this)):
        rounded = node.copy()
        # Halves of doubles go to the even integer, and those of decimals away from zero.
        name = "ROUND" if _bare(node.this).meta.get("is_decimal") else "RINT"
        rounded.set("this", exp.Anonymous(this=name, expressions=[_cast(node.this.copy(), "DOUBLE")]))
        node.replace(_if(_type_in(node.this, REALS), rounded, node.copy()))


def _is_integer(value: exp.Expr) -> bool:
    if isinstance(value, exp.Coalesce):
        return all(map(_is_integer, [value.this, *value.expressions]))
    return isinstance(value, exp.Literal | exp.Null | exp.Floor | exp.Ceil | exp.Predicate | exp.Count)


def _series(node: exp.GenerateSeries) -> None:
    start, end = (_cast(exp.Paren(this=node.args[name].copy()), "BIGINT") for name in ("start", "end"))
    if node.args.get("is_end_exclusive"):
        end = exp.Paren(this=exp.Sub(this=end, expression=_integer(1)))
    empty = _cast(exp.Array(expressions=[]), "ARRAY<BIGINT>")
    name = "range" if node.args.get("is_end_exclusive") else "generate_series"
    is_empty = exp.LT(this=end.copy(), expression=start.copy())
    values = _if(is_empty, empty, exp.Anonymous(this="SEQUENCE", expressions=[start, end]))
    if isinstance(node.parent, exp.Table):
        _exploded(node.parent, values, name)
    else:
        node.replace(values)


def _exploded(source: exp.Expr, values: exp.Expr, name: str) -> None:
    """Replace a source of rows by a subquery with one row per item of a list."""
    alias = source.args.get("alias") or exp.TableAlias(this=exp.to_identifier(name))
    column = alias.columns[0] if alias.columns else exp.to_identifier(name)
    rows = exp.select(exp.alias_(exp.Explode(this=values.copy()), column.copy()))
    source.replace(exp.Subquery(this=rows, alias=exp.TableAlias(this=alias.this.copy())))


def _unnest(node: exp.Unnest) -> None:
    _exploded(node, node.expressions[0], "unnest")


def _length(node: exp.Length) -> None:
    value = _bare(node.this)
    if value.name in LIST_COLUMNS or isinstance(value, exp.Array | exp.Transform):
        node.replace(exp.ArraySize(this=node.this.copy()))


def _condition(node: exp.If) -> None:
    if isinstance(_bare(node.this), exp.Null):
        node.set("this", _cast(exp.null(), "BOOLEAN"))


def _contains(node: exp.ArrayContains) -> None:
    if isinstance(_bare(node.this), exp.Null):
        node.replace(_cast(exp.null(), "BOOLEAN"))


def _index(node: exp.Bracket) -> None:
    node.replace(exp.Anonymous(this="TRY_ELEMENT_AT", expressions=[node.this.copy(), *node.expressions]))


def _element(node: exp.Anonymous) -> None:
    node.set("this", "TRY_ELEMENT_AT")


def _hash(node: exp.Anonymous) -> None:
    # The functions of intervals compute DuckDB's hash.
    node.replace(node.expressions[0].copy())


def _isfinite(node: exp.Anonymous) -> None:
    node.replace(exp.Paren(this=exp.LT(this=exp.Abs(this=node.expressions[0].copy()), expression=_double("Infinity"))))


def _product(node: exp.Anonymous) -> None:
    [values] = node.expressions
    factor = exp.Coalesce(this=exp.to_identifier("x"), expressions=[_double("1")])
    step = exp.Mul(this=exp.to_identifier("product"), expression=factor)
    names = [exp.to_identifier("product"), exp.to_identifier("x")]
    product = exp.func("AGGREGATE", values.copy(), _double("1"), exp.Lambda(this=step, expressions=names))
    node.replace(_if(exp.GT(this=exp.ArraySize(this=values.copy()), expression=_integer(0)), product, exp.null()))


def _quantile(node: exp.PercentileCont) -> None:
    def finish(found: exp.Expr) -> exp.Expr:
        # DuckDB interpolates floats to a float. The minimum has the type of the values.
        twin = exp.Paren(this=found.copy())
        for percentile in [n for n in twin.find_all(exp.Anonymous) if n.name == name]:
            percentile.replace(exp.Min(this=values.copy()))
        return _if(_type_in(twin.this, ["float"]), _cast(_cast(found, "FLOAT"), "DOUBLE"), found.copy())

    name, values = "PERCENTILE", node.this
    value = exp.Anonymous(this=name, expressions=[values.copy(), node.expression.copy()])
    _outer(node, value, (lambda found: found) if isinstance(node.expression, exp.Array) else finish)


def _discrete_quantile(node: exp.PercentileDisc) -> None:
    order = exp.Order(expressions=[exp.Ordered(this=node.this.copy(), nulls_first=True)])
    node.replace(exp.WithinGroup(this=exp.PercentileDisc(this=node.expression.copy()), expression=order))


def _list(node: exp.ArrayAgg) -> None:
    """Keep nulls, which Spark leaves out, and sort by the keys in ORDER BY."""
    value, keys = node.this, []
    if isinstance(value, exp.Order):
        value, keys = value.this, value.expressions
    if any(key.args.get("desc") for key in keys):
        raise InputError("sql: a list in descending order is not supported on Spark; order by the negated value")
    if isinstance(value, exp.Struct) and not keys:
        return
    fields = []
    for i, key in enumerate(keys):
        is_null = exp.Paren(this=exp.Is(this=key.this.copy(), expression=exp.null()))
        fields += [exp.alias_(is_null, f"is_null_{i}"), exp.alias_(key.this.copy(), f"key_{i}")]
    rows = exp.Anonymous(this="STRUCT", expressions=[*fields, exp.alias_(value.copy(), "value")])
    item = exp.Lambda(this=exp.Dot(this=exp.to_identifier("row"), expression=exp.to_identifier("value")))
    item.set("expressions", [exp.to_identifier("row")])

    def finish(found: exp.Expr) -> exp.Expr:
        found = exp.Anonymous(this="ARRAY_SORT", expressions=[found]) if keys else found
        values = exp.Transform(this=found, expression=item)
        return exp.func("NULLIF", values, exp.Array(expressions=[]))

    _outer(node, exp.Anonymous(this="COLLECT_LIST", expressions=[rows]), finish)


def _outer(node: exp.Expr, value: exp.Expr, finish: Callable[[exp.Expr], exp.Expr]) -> None:
    """Replace an aggregate, and apply ``finish`` to the whole expression.

    The whole includes the FILTER and OVER that follow the aggregate.
    """
    outer = node
    while isinstance(outer.parent, exp.Filter | exp.Window) and outer.arg_key == "this":
        outer = outer.parent
    is_inner = outer is not node
    if is_inner:
        node.replace(value)
    outer.replace(finish(outer.copy() if is_inner else value))


def _unordered(node: exp.AggFunc) -> None:
    """Drop the order of a sum, which changes no more than its rounding."""
    if isinstance(node.this, exp.Order):
        node.set("this", node.this.this)


def _inlined(node: exp.CTE) -> None:
    """Drop MATERIALIZED, which changes no value, and which Spark does not know."""
    node.set("materialized", None)


def _qualified(node: exp.Select) -> None:
    if not (qualify := node.args.get("qualify")):
        return
    if node.args.get("distinct") or node.args.get("limit") or node.args.get("offset"):
        raise InputError("sql: QUALIFY with DISTINCT or LIMIT is not supported on Spark; put the query into a subquery")
    condition, columns = qualify.this, exp.Star()
    inner = node.copy()
    inner.set("qualify", None)
    # The condition sees columns that the query does not return; without a window, it refers to a window's alias.
    if condition.find(exp.Window):
        inner.select(exp.alias_(exp.Paren(this=condition), "_qualify"), copy=False)
        condition, columns = exp.column("_qualify"), exp.Star(except_=[exp.to_identifier("_qualify")])
    node.replace(exp.select(columns).from_(exp.Subquery(this=inner)).where(condition))


def _unpivot(node: exp.Pivot) -> None:
    """Turn the statement UNPIVOT into a SELECT.

    The clause of the same name needs no change.
    """
    if not (into := node.args.get("into")):
        return
    [value] = into.expressions
    names = exp.In(this=into.this.this.copy(), expressions=[column.copy() for column in node.expressions])
    pivot = exp.Pivot(expressions=[value.this.copy()], fields=[names], unpivot=True)
    source = node.this.copy()
    source.set("pivots", [pivot])
    node.replace(exp.select(exp.Star()).from_(source, copy=False))


_RULES: dict[Any, Callable[[Any], None]] = {
    exp.Literal: _number,
    **dict.fromkeys(COMPARISONS, _comparison),
    exp.Div: _division,
    **dict.fromkeys((exp.Ln, exp.Log), _logarithm),
    **dict.fromkeys((exp.Cast, exp.TryCast), _rounding_cast),
    exp.GenerateSeries: _series,
    exp.Unnest: _unnest,
    exp.Length: _length,
    exp.If: _condition,
    exp.ArrayContains: _contains,
    exp.Bracket: _index,
    "map_extract_value": _element,
    "hash": _hash,
    "isfinite": _isfinite,
    "list_product": _product,
    exp.PercentileCont: _quantile,
    exp.PercentileDisc: _discrete_quantile,
    exp.ArrayAgg: _list,
    **dict.fromkeys((exp.Sum, exp.Avg, exp.Count, exp.Min, exp.Max), _unordered),
    exp.CTE: _inlined,
    exp.Select: _qualified,
    exp.Pivot: _unpivot,
}
