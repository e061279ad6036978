"""Find records of JSONL files by key without holding them in memory."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from entrace.analysis.importers.row_files import BadRowError, open_lines, parse_line


class Records:
    """Hold the offsets of the records of several files, by key.

    A compressed file is decompressed first.
    """

    def __init__(self, folder: Path) -> None:
        """Put decompressed files into ``folder``, which is temporary."""
        self._folder = folder
        self._places: dict[str, list[tuple[Path, int]]] = defaultdict(list)

    def add(self, path: Path, keys_of: Callable[[Mapping[str, Any]], Iterable[str]]) -> None:
        """Remember the records of a file, except an incomplete last line."""
        plain = path
        if path.suffix == ".zst":
            plain = self._folder / f"{sha256(str(path).encode()).hexdigest()[:16]}.jsonl"
            with open_lines(path) as lines, plain.open("wb") as file:
                file.writelines(lines)
        offset = 0
        with plain.open("rb") as file:
            for line in file:
                record = parse_line(line) if line.strip() else None
                if isinstance(record, dict):
                    for key in keys_of(record):
                        self._places[key].append((plain, offset))
                offset += len(line)

    def __bool__(self) -> bool:
        return bool(self._places)

    def get(self, key: str) -> Iterator[dict[str, Any]]:
        """Yield the records of a key in the order in which they were written."""
        for path, offset in self._places.get(key, ()):
            with path.open("rb") as file:
                file.seek(offset)
                record = parse_line(file.readline())
                if not isinstance(record, BadRowError):
                    yield record


def key_of_tokens(ids: Iterable[int]) -> str:
    """Return a key that identifies a sequence of tokens."""
    return sha256(json.dumps(list(ids)).encode()).hexdigest()[:32]
