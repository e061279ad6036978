"""Rollouts of verl: ``{step}.jsonl`` in ``trainer.rollout_data_dir``.

Both texts are decoded without special tokens. Up to version 0.8, ``uid`` names the prompt; from 0.9, it is the key of
the response, ``{sample}_{rollout}_{output}``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from entrace.analysis.importers.formats.base import Format, Row, folder_of, has_keys, stateless

KEY = re.compile(r"(.+)_\d+_\d+")


def _convert(row: Row, path: Path) -> Iterable[Row]:
    row = dict(row)
    if "step" not in row and path.stem.isdecimal():
        row["step"] = int(path.stem)
    if isinstance(row.get("uid"), str) and (key := KEY.fullmatch(row["uid"])):
        row["id"], row["uid"] = row["uid"], key[1]
    yield row


FORMAT = Format(
    "verl",
    "verl rollouts",
    ("**/[0-9]*.jsonl",),
    has_keys("input", "output", "score"),
    stateless(_convert),
    prompts="stripped",
    run_of=folder_of,
)
