"""Read training data of NeMo-RL: ``train_data_step{N}.jsonl``.

The files are in the log folder, with one batch entry of one sequence per line. Sequences are padded to the longest of
the step; ``input_lengths`` has their lengths. ``generation_logprobs`` are those of the engine, ``prev_logprobs`` those
of the policy before the update. Entropies are not logged.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from entrace.analysis.importers.formats.base import (
    Format,
    Row,
    folder_of,
    has_keys,
    listed,
    split_at_response,
    stateless,
    step_in,
)
from entrace.analysis.importers.row_files import BadRowError

ALIGNED = {"prev_logprobs": "logprob", "generation_logprobs": "sampling_logprob", "advantages": "advantage"}
REWARD = ("rewards", "reward")


def _convert(row: Row, path: Path) -> Iterable[Row]:
    entry = {key: _first(value, key) for key, value in row.items()}
    padded = len(listed(entry, "token_ids"))
    length = entry.get("input_lengths", padded)
    if type(length) is not int or not 0 < length <= padded:
        raise BadRowError(f'"input_lengths" is {length!r}, expected a length up to {padded}')
    ids = entry["token_ids"][:length]
    mask = [bool(mark) for mark in listed(entry, "token_loss_mask", padded)[:length]]
    start = split_at_response(mask, "token_loss_mask")
    step = step_in(path)
    found: Row = {
        "id": f"{step}/{entry.get('idx')}",
        "step": step,
        "prompt_ids": ids[:start],
        "response_ids": ids[start:],
        "loss_mask": mask[start:],
        "reward": next((entry[key] for key in REWARD if entry.get(key) is not None), None),
        "checked_text": entry.get("content"),
    }
    if entry.get("sample_loss_mask") is not None:
        found["is_kept"] = bool(entry["sample_loss_mask"])
    for key, name in ALIGNED.items():
        if isinstance(entry.get(key), list):
            found[name] = listed(entry, key, padded)[start:length]
        elif entry.get(key) is not None:
            found[name] = entry[key]
    yield found


def _first(value: Any, key: str) -> Any:
    """Return the only entry of a batch; the index of the row is not batched."""
    if key == "idx" or not isinstance(value, list):
        return value
    if len(value) != 1:
        raise BadRowError(f'"{key}" has {len(value)} entries, expected one sequence per line')
    return value[0]


FORMAT = Format(
    "nemo-rl",
    "NeMo-RL training data",
    ("**/train_data_step*.jsonl",),
    has_keys("token_ids", "token_loss_mask"),
    stateless(_convert),
    run_of=folder_of,
)
