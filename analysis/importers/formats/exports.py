"""Read token exports of prime-rl: ``token_exports/step_N/rank_R.jsonl``.

The files are written with ``enable_token_export``. A line is one sequence of a micro-batch: aligned lists of token ids,
mask, advantages, the trainer's logprobs and entropies, and the engine's logprobs. Rewards, groups, and texts are in
``rollouts/step_N/train/effective/traces.jsonl`` beside ``token_exports``, whose traces have the same tokens. Without
them, ``--rewards`` joins rewards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from entrace.analysis.importers.formats.annotated import Records, key_of_tokens
from entrace.analysis.importers.formats.base import Convert, Format, Row, Session, has_keys, listed, split_at_response
from entrace.analysis.importers.formats.traces import Reader
from entrace.analysis.trace.places import to_place

ALIGNED = {
    "advantages": "advantage",
    "trainer_logprobs": "logprob",
    "inference_logprobs": "sampling_logprob",
    "entropy": "entropy",
}
FOLDER = "token_exports"
# Marks the folder of a step whose ranks have all written their files.
STABLE = "STABLE"
# Fields that only the rollouts record.
JOINED = (
    *("group", "prompt", "reward", "reward_components", "ground_truth", "is_truncated"),
    *("temperature", "policy_version", "turn"),
)


def run_of(path: Path) -> str:
    """Return the folder of the run that a file belongs to."""
    inside = next((folder for folder in path.parents if folder.name == FOLDER), None)
    return str(inside.parent if inside else path.parent.parent)


def whole(files: list[Path]) -> tuple[list[Path], list[str]]:
    """Return the files of complete steps, and remarks about the others.

    Without any mark, all steps count as complete.
    """
    found = [path for path in files if (path.parent / STABLE).exists()]
    steps = {path.parent.name for path in files} - {path.parent.name for path in found}
    if not found or not steps:
        return files, []
    return found, [
        f"left out {', '.join(sorted(steps))}, which {'has' if len(steps) == 1 else 'have'} no {STABLE} file"
    ]


def _open(session: Session) -> Convert:
    rollouts = Records(session.folder)
    reader = Reader(Session(session.files, session.folder), Records(session.folder))
    for root in dict.fromkeys(to_place(run_of(path)) for path in session.files):
        for path in sorted(root.glob("rollouts/step_*/train/effective/traces.jsonl")):
            rollouts.add(path, lambda record, path=path: _keys(record, path, reader))
    joiner = _Joiner(session, rollouts, reader)
    return joiner.convert


def _keys(record: Mapping[str, Any], path: Path, reader: Reader) -> Iterator[str]:
    for row in reader.convert(dict(record), path):
        yield key_of_tokens([*row["prompt_ids"], *row["response_ids"]])


class _Joiner:
    """Join exported sequences with the traces that have their tokens."""

    def __init__(self, session: Session, rollouts: Records, reader: Reader) -> None:
        self._session, self._rollouts, self._reader = session, rollouts, reader
        self._lost = 0

    def convert(self, row: Row, path: Path) -> Iterable[Row]:
        ids = listed(row, "token_ids")
        mask = listed(row, "loss_mask", len(ids))
        start = split_at_response(mask, "loss_mask")
        found: Row = {
            "id": f"{row.get('step')}/{row.get('rank')}/{row.get('export_sequence_idx')}",
            "step": row.get("step"),
            "task": row.get("env_name"),
            "prompt_ids": ids[:start],
            "response_ids": ids[start:],
            "loss_mask": mask[start:],
            # An exported sequence was trained on.
            "is_kept": True,
        }
        for key, name in ALIGNED.items():
            if row.get(key) is not None:
                found[name] = listed(row, key, len(ids))[start:]
        facts = self._facts(ids, start, path)
        yield {**found, **facts}

    def _facts(self, ids: list[int], start: int, path: Path) -> Row:
        if not self._rollouts:
            return {}
        wanted = key_of_tokens(ids)
        for record in self._rollouts.get(wanted):
            for row in self._reader.convert(record, path):
                is_same = len(row["prompt_ids"]) == start and row["prompt_ids"] + row["response_ids"] == ids
                if is_same:
                    return {name: row[name] for name in JOINED if row.get(name) is not None}
        self._lost += 1
        self._session.remarks[:] = [f"{self._lost} exported sequences have no rollout with the same tokens"]
        return {}


FORMAT = Format(
    "prime-rl",
    "prime-rl token exports",
    (f"**/{FOLDER}/step_*/rank_*.jsonl", "step_*/rank_*.jsonl"),
    has_keys("token_ids", "loss_mask", "trainer_logprobs", "inference_logprobs"),
    _open,
    uniform=("step", "advantage"),
    run_of=run_of,
    whole=whole,
)
