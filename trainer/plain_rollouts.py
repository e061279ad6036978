"""Rollouts of any trainer, read from files, checked, and put in the order of steps."""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from analysis.trace import InputError
from trainer.rollout_rows import Rollout, RowReader, ScoreSettings
from trainer.tasks.rows import NUM_NAMED, BadRowError, name_some, read_rows

if TYPE_CHECKING:
    from trainer.policy import Policy

ROWS_AT_ONCE = 1024
SORT_MEMORY = "1GiB"

SPILL = pa.schema(
    [
        ("place", pa.string()),
        ("step", pa.int32()),
        ("group_id", pa.int64()),
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion", pa.string()),
        ("response_ids", pa.list_(pa.int32())),
        ("reward", pa.float64()),
        ("advantage", pa.float64()),
        ("is_correct", pa.bool_()),
        ("is_truncated", pa.bool_()),
        ("answer", pa.string()),
        ("has_answer", pa.bool_()),
        ("ground_truth", pa.string()),
        ("task", pa.string()),
    ]
)

logger = logging.getLogger(__name__)


@dataclass
class Counts:
    """What was read.

    Attributes:
        rows: Rows of all files.
        bad_rows: Those left out as malformed.
        correct: Responses that count as right.
        tokens: Tokens of all responses.
        groups: Groups of responses to one prompt at one step.
        known: By field, the rows that have it.
        steps: Steps that occur.
    """

    rows: int = 0
    bad_rows: int = 0
    correct: int = 0
    tokens: int = 0
    groups: int = 0
    known: Counter[str] = field(default_factory=Counter)
    steps: set[int] = field(default_factory=set)

    @property
    def rollouts(self) -> int:
        """Rows that are scored."""
        return self.rows - self.bad_rows

    def add(self, rollout: Rollout, fields: Mapping[str, str]) -> None:
        """Counts one response, and the fields that its row has."""
        self.correct += rollout.is_correct
        self.tokens += len(rollout.response_ids)
        self.known.update(fields.keys())
        self.steps.add(rollout.step)


@dataclass(frozen=True)
class PlainRollouts:
    """Rollouts of all files on disk, and what is known of them.

    Attributes:
        counts: Of their rows.
        fields: Key that each field stands under.
    """

    path: Path
    counts: Counts
    fields: Mapping[str, str]

    def remarks(self) -> list[str]:
        """What it was read as, and what looks as if it was meant otherwise; one line each."""
        counts = self.counts
        renamed = [f"{name} from {key}" for name, key in self.fields.items() if key != name]
        lines = [f"read {', '.join(renamed)}"] if renamed else []
        if counts.correct in (0, counts.rollouts):
            lines.append(f"{'all' if counts.correct else 'no'} responses count as right; see --correct-at")
        if counts.groups == counts.rollouts and "advantage" not in self.fields:
            lines.append("no two responses share prompt and step, so that all advantages are 0")
        return lines

    def in_order(self) -> Iterator[Rollout]:
        """All rollouts by step, those of a group adjacent; memory does not depend on how many there are."""
        import duckdb

        con = duckdb.connect(config={"memory_limit": SORT_MEMORY, "temp_directory": str(self.path.parent)})
        try:
            rows = con.execute(
                "select * exclude (row) from (select *, file_row_number as row from "
                "read_parquet(?, file_row_number=true)) order by step, group_id, row",
                [str(self.path)],
            )
            while batch := rows.fetchmany(ROWS_AT_ONCE):
                yield from (Rollout(*values[: len(SPILL)]) for values in batch)
        finally:
            con.close()


@contextmanager
def read_rollouts(paths: Sequence[Path], settings: ScoreSettings, policy: Policy) -> Iterator[PlainRollouts]:
    """Reads all files, and keeps the rollouts in a temporary file as long as the context lasts.

    Raises:
        InputError: a file that cannot be read, or a malformed row that shall not be skipped.
    """
    with tempfile.TemporaryDirectory(prefix="entrace-") as folder:
        spill = Path(folder) / "rollouts.parquet"
        reader = RowReader(settings, policy)
        counts = Counts()
        with pq.ParquetWriter(spill, SPILL, compression="zstd") as writer:
            batch: list[dict[str, Any]] = []
            for rollout, fields in _read_files(paths, settings, reader, counts):
                counts.add(rollout, fields)
                batch.append(asdict(rollout))
                if len(batch) == ROWS_AT_ONCE:
                    writer.write_table(pa.Table.from_pylist(batch, SPILL))
                    batch = []
            writer.write_table(pa.Table.from_pylist(batch, SPILL))
        counts.groups = reader.num_groups
        yield PlainRollouts(spill, counts, reader.keys)


def _read_files(
    paths: Sequence[Path], settings: ScoreSettings, reader: RowReader, counts: Counts
) -> Iterator[tuple[Rollout, dict[str, str]]]:
    faults: list[str] = []
    for path in paths:
        for place, row in read_rows(path):
            counts.rows += 1
            try:
                yield reader.read(row, f"{path}, {place}", path.stem)
            except BadRowError as fault:
                counts.bad_rows += 1
                if len(faults) < NUM_NAMED:
                    faults.append(f"{path}, {place}: {fault}")
    left_out = f"{counts.bad_rows} of {counts.rows} rows"
    named = name_some(faults, counts.bad_rows)
    if counts.bad_rows and not settings.skip_bad_rows:
        raise InputError(f"{left_out} are malformed ({named}); mend them, or leave them out with --skip-bad-rows")
    if not counts.rollouts:
        raise InputError(f"{paths[0]}: no usable row ({named or 'empty'})")
    if counts.bad_rows:
        logger.warning("entrace: %s left out (%s)", left_out, named)
