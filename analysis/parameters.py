"""Check the values of a question's parameters against its header ``-- params:``.

The header lists ``$name: KIND, meaning (default ...)``, separated by semicolons. The kinds are:

- ``rising or plateau``: one of these words;
- ``one COLUMN``: a value of this column of the traces;
- ``list of COLUMN``: such values; a single one counts as a list;
- ``map of COLUMN to COLUMN``: a dictionary of such values;
- ``integer in [1, 1000]`` or ``number in (0, 1]``: a number; a round bracket excludes the bound.

Any other description, and a column that no table has, accepts every value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from entrace.analysis.trace.errors import InputError, choices

NAMED = re.compile(r"\$(\w+):?\s*(.*)")
WORDS = re.compile(r"(\w+(?:, \w+)*),? or (\w+)(?=,| \(|$)")
ONE = re.compile(r"one (\w+)")
LIST = re.compile(r"list of (\w+)")
MAP = re.compile(r"map of (\w+) to (\w+)")
NUMBER = re.compile(r"(?P<type>integer|number) in (?P<open>[\[(])(?P<low>[^,]+), (?P<high>[^\])]+)(?P<close>[\])])")

# Distinct values of a column of the traces; None if no table has the column.
ValuesOf = Callable[[str], list[Any] | None]


@dataclass(frozen=True)
class Parameter:
    """Hold the name and the description of one parameter of a question.

    The description is that of the header and begins with the parameter's kind.
    """

    name: str
    description: str

    @property
    def column(self) -> str:
        """Return the column whose values the parameter selects.

        A column of that name need not exist.
        """
        found = LIST.match(self.description) or ONE.match(self.description)
        return found[1] if found else self.name

    def takes_text(self, text_columns: Iterable[str]) -> bool:
        """Return True if a single value is text.

        A command line must not read such a value as a number.
        """
        if found := LIST.match(self.description) or ONE.match(self.description):
            return found[1] in text_columns
        return not (MAP.match(self.description) or NUMBER.match(self.description)) and bool(
            WORDS.match(self.description)
        )

    def check(self, value: Any, values_of: ValuesOf) -> Any:
        """Return the value as the query expects it; None omits the parameter.

        Raises:
            InputError: the value is not of the parameter's kind.
        """
        value = to_plain(value)
        if value is None:
            return None
        if found := LIST.match(self.description):
            items = [value] if isinstance(value, str) or not isinstance(value, Iterable) else list(value)
            return [self._one_of(item, values_of(found[1]), found[1]) for item in items]
        if found := MAP.match(self.description):
            return self._map(value, values_of, *found.groups())
        if found := ONE.match(self.description):
            return self._one_of(value, values_of(found[1]), found[1])
        if found := NUMBER.match(self.description):
            return self._number(value, found)
        if found := WORDS.match(self.description):
            return self._one_of(value, [*found[1].split(", "), found[2]], "value")
        return value

    def _one_of(self, value: Any, options: list[Any] | None, noun: str) -> Any:
        if options is not None and value not in options:
            raise InputError(f"{self.name}: unknown {noun} {shown(value)}{choices(str(value), map(str, options))}")
        return value

    def _map(self, value: Any, values_of: ValuesOf, key: str, mapped: str) -> dict[str, list[Any]]:
        if not isinstance(value, Mapping):
            raise InputError(f"{self.name}: expected a dictionary from {key} to {mapped}, found {shown(value)}")
        # DuckDB reads a dictionary with these two keys as a map, and any other one as a struct.
        is_map = value.keys() == {"key", "value"} and all(isinstance(names, list) for names in value.values())
        keys, values = (value["key"], value["value"]) if is_map else (list(value), list(value.values()))
        return {
            "key": [self._one_of(name, values_of(key), key) for name in keys],
            "value": [self._one_of(name, values_of(mapped), mapped) for name in values],
        }

    def _number(self, value: Any, found: re.Match[str]) -> int | float:
        low, high = float(found["low"]), float(found["high"])
        types = int if found["type"] == "integer" else (int, float)
        if isinstance(value, types) and not isinstance(value, bool):
            above = value >= low if found["open"] == "[" else value > low
            below = value <= high if found["close"] == "]" else value < high
            if above and below:
                return value
        article = "an" if found["type"] == "integer" else "a"
        raise InputError(f"{self.name}: expected {article} {found[0]}, found {shown(value)}")


def parameters(header: str) -> dict[str, Parameter]:
    """Return the parameters that a header ``params`` describes, by name."""
    found = (NAMED.match(part.strip()) for part in header.split(";"))
    return {match[1]: Parameter(match[1], match[2]) for match in found if match}


def to_plain(value: Any) -> Any:
    """Return a value without numpy or polars types, which DuckDB does not accept."""
    for convert in ("tolist", "to_list"):
        if hasattr(value, convert):
            return getattr(value, convert)()
    return [to_plain(item) for item in value] if isinstance(value, list | tuple) else value


def shown(value: Any) -> str:
    """Return a value as it is written in a call of ``Runs.query``.

    Text is in double quotes; the items of a list are separated by commas.
    """
    if isinstance(value, str):
        return f'"{value}"'
    return f"[{', '.join(map(shown, value))}]" if isinstance(value, list | tuple) else str(value)
