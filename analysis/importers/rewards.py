"""Join rewards from another file by the id of the response."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from entrace.analysis.importers.columns import ALIASES, look_up
from entrace.analysis.importers.row_files import BadRowError, read_rows
from entrace.analysis.importers.values import number_of
from entrace.analysis.trace.errors import InputError

# Fields that a row of rewards may hold besides its id.
JOINED = ("reward", "is_correct", "answer", "ground_truth", "reward_components", "group")


class Rewards:
    """Rewards by id.

    Attributes:
        path: The file.
    """

    def __init__(self, path: Path, key: str | None = None) -> None:
        """Read rows of id and reward.

        Args:
            path: JSONL or Parquet.
            key: Key of the id in the rows of the dump (default: ``id`` or one of its other names).

        Raises:
            InputError: a row has no id or no reward, or two rows have one id.
        """
        self.path = path
        self._keys = (key,) if key else ("id", *ALIASES["id"])
        self._facts: dict[str, dict[str, Any]] = {}
        self._used: set[str] = set()
        self._missed: list[str] = []
        for place, row in read_rows(path):
            try:
                key, facts = _facts(row)
            except BadRowError as fault:
                raise InputError(f"{path}, {place}: {fault}") from None
            if key in self._facts:
                raise InputError(f"{path}, {place}: id {key!r} occurs twice; keep one row per response")
            self._facts[key] = facts
        if not self._facts:
            raise InputError(f"{path}: no rows; expected rows of id and reward")

    def join(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a row of the dump with its reward, unchanged if there is none.

        Raises:
            BadRowError: the row has no id.
        """
        key = next((found for name in self._keys if (found := look_up(row, name)) is not None), None)
        if key is None:
            raise BadRowError('no "id" to join rewards by; --field id=KEY names the key')
        facts = self._facts.get(str(key))
        if facts is None:
            self._missed = self._missed or [str(key)]
            return row
        self._used.add(str(key))
        return {**{name: value for name, value in row.items() if not _is_joined(name, facts)}, **facts}

    def check(self) -> None:
        """Refuse rewards of which none was used.

        Raises:
            InputError: no row of the dump has one of the ids.
        """
        if not self._used:
            missed = self._missed[0] if self._missed else "none"
            raise InputError(f"{self.path}: no id matches; it has {next(iter(self._facts))!r}, the dump has {missed!r}")

    def remarks(self) -> list[str]:
        """Return remarks about rows without a partner."""
        unused = len(self._facts) - len(self._used)
        lines = [f"{unused} of {len(self._facts)} rewards belong to no response"] if unused else []
        return [*lines, f"responses without a reward, such as {self._missed[0]}"] if self._missed else lines


def _facts(row: dict[str, Any] | BadRowError) -> tuple[str, dict[str, Any]]:
    if isinstance(row, BadRowError):
        raise row
    if (key := row.get("id")) is None:
        raise BadRowError('no "id"; expected rows of id and reward')
    facts = {}
    for name in JOINED:
        keys = (name, *ALIASES[name])
        value = next((found for alias in keys if (found := look_up(row, alias)) is not None), None)
        if value is not None:
            facts[name] = value
    if "reward" not in facts:
        raise BadRowError(f'id {key!r} has no "reward"')
    return str(key), {**facts, "reward": number_of(facts["reward"], "reward")}


def _is_joined(name: str, facts: dict[str, Any]) -> bool:
    return any(name in (field, *ALIASES[field]) for field in facts)
