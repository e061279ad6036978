"""Read rollouts of open-instruct: ``{run}_rollouts_{shard}.jsonl``.

The files are written with ``--save_traces``. ``logprobs`` are those of vLLM. The masks of tool output are not saved.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from entrace.analysis.importers.formats.base import Format, Row, has_keys, stateless

NAMES = {
    "step": "step",
    "group": "prompt_idx",
    "prompt_ids": "prompt_tokens",
    "response_ids": "response_tokens",
    "reward": "reward",
    "advantage": "advantage",
    "finish_reason": "finish_reason",
    "task": "dataset",
    "ground_truth": "ground_truth",
    "sampling_logprob": "logprobs",
}
MARK = "_rollouts_"


def _convert(row: Row, path: Path) -> Iterable[Row]:
    del path
    # Rows are saved for the batch that is trained on.
    found: Row = {name: row[key] for name, key in NAMES.items() if key in row}
    yield {**found, "id": f"{row.get('step')}/{row.get('sample_idx')}", "is_kept": True}


def _run_of(path: Path) -> str | None:
    return str(path.parent / path.name.partition(MARK)[0]) if MARK in path.name else None


FORMAT = Format(
    "open-instruct",
    "open-instruct traces",
    (f"**/*{MARK}*.jsonl",),
    has_keys("prompt_tokens", "response_tokens"),
    stateless(_convert),
    run_of=_run_of,
)
