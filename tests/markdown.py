"""Write tables of generated pages."""

from collections.abc import Container, Iterable, Sequence
from typing import Any


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Container[int] = ()) -> list[str]:
    """Return the lines of a Markdown table.

    Columns whose indices are in ``numbers`` are aligned to the right.
    """
    rule = ["---:" if column in numbers else "---" for column in range(len(header))]
    return [f"| {' | '.join(map(str, row))} |" for row in (header, rule, *rows)]
