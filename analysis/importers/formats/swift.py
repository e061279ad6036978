"""Read completions of ms-swift: ``completions.jsonl``.

The file is written with ``--log_completions true``, with one table per line. Prompts are templated texts with their
special tokens. ``entropy`` is the mean over the tokens of a response. The Megatron trainers name the step ``gen_step``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from entrace.analysis.importers.formats.base import Convert, Format, Row, Session, folder_of
from entrace.analysis.importers.formats.trl import with_rewards
from entrace.analysis.importers.row_files import BadRowError

KNOWN = (
    *("step", "gen_step", "prompt", "completion", "advantages", "entropy", "image", "images", "solution"),
    *("num_turns", "rollout_infos", "request_id", "is_truncated", "truncated"),
)
# Columns under the names that rows have.
NAMES = {"gen_step": "step", "advantages": "advantage", "entropy": "entropy_mean"}


def _is_row(row: Mapping[str, Any], path: Path) -> bool:
    del path
    return isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list) and _has_steps(row)


def _has_steps(row: Mapping[str, Any]) -> bool:
    return any(isinstance(row.get(key), list) for key in ("step", "gen_step"))


def _open(session: Session) -> Convert:
    return lambda table, path: _convert(table, session)


def _convert(table: Row, session: Session) -> Iterable[Row]:
    columns = {name: value for name, value in table.items() if isinstance(value, list)}
    length = len(columns.get("prompt", []))
    for name, values in columns.items():
        if len(values) != length:
            raise BadRowError(f'"{name}" has {len(values)} entries, "prompt" has {length}')
    for place in range(length):
        row = {name: values[place] for name, values in columns.items()}
        found = with_rewards(row, KNOWN, session)
        yield {NAMES.get(name, name): value for name, value in found.items()}


FORMAT = Format(
    "ms-swift",
    "ms-swift completions",
    ("**/completions.jsonl",),
    _is_row,
    _open,
    prompts="whole",
    run_of=folder_of,
)
