"""Read rollouts of any trainer from files, check them, and sort them by step."""

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

from entrace.analysis.trace import InputError, nearest, reason_of
from entrace.analysis.trace.errors import TEMPORARY, faults_at
from entrace.trainer.external.rollout_rows import ImportSettings, Rollout, RowReader
from entrace.trainer.tasks.rows import NUM_NAMED, BadRowError, name_some, read_rows

if TYPE_CHECKING:
    from entrace.trainer.model.policy import Policy

PICKLE = "a pickle, which can run code when it is loaded; if you trust it, load it yourself and write JSONL"
# Other formats, by the first bytes of a file and by its suffix.
SIGNATURES = {
    b"PK\x03\x04": f"a zip archive; one that torch.save wrote is {PICKLE}",
    b"\x80": PICKLE,
    b"PAR1": "Parquet; rename the file to .parquet",
    b"\x1f\x8b": "gzip; decompress the file",
    b"\x28\xb5\x2f\xfd": "zstd; decompress the file",
    b"ARROW1": "an Arrow file; write Parquet",
    b"\x93NUMPY": "a NumPy array; write Parquet",
    b"\xff\xfe": "text in UTF-16; write UTF-8",
}
SUFFIXES = {
    **dict.fromkeys((".pt", ".pth", ".pkl", ".pickle"), PICKLE),
    **dict.fromkeys((".csv", ".tsv"), "a table of text; write Parquet"),
}
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
        ("loss_mask", pa.list_(pa.bool_())),
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
    """Counts of the rows that were read.

    Attributes:
        rows: Rows of all files.
        bad_rows: Malformed rows, which are skipped.
        correct: Correct responses.
        tokens: Tokens of all responses.
        masked: Tokens outside loss_mask.
        groups: Groups of responses to one prompt at one step.
        known: Number of rows that have a field, by field.
        steps: Distinct steps.
    """

    rows: int = 0
    bad_rows: int = 0
    correct: int = 0
    tokens: int = 0
    masked: int = 0
    groups: int = 0
    known: Counter[str] = field(default_factory=Counter)
    steps: set[int] = field(default_factory=set)

    @property
    def rollouts(self) -> int:
        """Return the number of rows to import."""
        return self.rows - self.bad_rows

    def add(self, rollout: Rollout, fields: Mapping[str, str]) -> None:
        """Count one response and the fields of its row."""
        self.correct += rollout.is_correct
        self.tokens += len(rollout.response_ids)
        self.masked += rollout.is_generated.count(False)
        self.known.update(fields.keys())
        self.steps.add(rollout.step)


@dataclass(frozen=True)
class PlainRollouts:
    """Rollouts of all files, in a temporary file, and their counts.

    Attributes:
        path: The temporary file.
        counts: Counts of the rows.
        fields: Key of each field.
        correct_at: Lowest reward of a correct response.
    """

    path: Path
    counts: Counts
    fields: Mapping[str, str]
    correct_at: float

    def remarks(self) -> list[str]:
        """Return remarks, one line each: keys read as other fields, and likely mistakes."""
        counts = self.counts
        renamed = [f"{name} from {key}" for name, key in self.fields.items() if key != name]
        lines = [f"read {', '.join(renamed)}"] if renamed else []
        if counts.correct in (0, counts.rollouts):
            judge = self.fields.get("is_correct")
            remedy = f"by {judge}" if judge else f"by {self.fields['reward']} >= {self.correct_at:g}; see --correct-at"
            lines.append(f"{'all' if counts.correct else 'no'} responses count as right {remedy}")
        if counts.groups == counts.rollouts and "advantage" not in self.fields:
            group = self.fields.get("group")
            shared = f"{group}; --field group= groups by prompt and step" if group else "prompt and step"
            lines.append(f"all advantages are 0: no two responses share {shared}")
        if counts.masked:
            lines.append(f"{self.fields['loss_mask']} excludes {counts.masked} of {counts.tokens} tokens")
        return lines

    def in_order(self) -> Iterator[Rollout]:
        """Yield all rollouts by step, with groups adjacent, in constant memory."""
        import duckdb

        config: dict[str, Any] = {"memory_limit": SORT_MEMORY, "temp_directory": str(self.path.parent)}
        with faults_at(self.path.parent), duckdb.connect(config=config) as con:
            rows = con.execute(
                "select * exclude (row) from (select *, file_row_number as row from "
                "read_parquet(?, file_row_number=true)) order by step, group_id, row",
                [str(self.path)],
            )
            while batch := rows.fetchmany(ROWS_AT_ONCE):
                yield from (Rollout(*values[: len(SPILL)]) for values in batch)


@contextmanager
def read_rollouts(paths: Sequence[Path], settings: ImportSettings, policy: Policy) -> Iterator[PlainRollouts]:
    """Read all files, and keep the rollouts in a temporary file while the context lasts.

    Raises:
        InputError: a file is unreadable, or a row is malformed and must not be skipped.
    """
    for path in paths:
        if found := _other_format(path):
            raise InputError(f"{path}: expected JSONL or Parquet, one response per row; found {found}")
    with tempfile.TemporaryDirectory(prefix=TEMPORARY) as folder:
        spill = Path(folder) / "rollouts.parquet"
        reader = RowReader(settings, policy)
        counts = Counts()
        with faults_at(folder), pq.ParquetWriter(spill, SPILL, compression="zstd") as writer:
            batch: list[dict[str, Any]] = []
            for rollout, fields in _read_files(paths, settings, reader, counts):
                counts.add(rollout, fields)
                batch.append(asdict(rollout))
                if len(batch) == ROWS_AT_ONCE:
                    writer.write_table(pa.Table.from_pylist(batch, SPILL))
                    batch = []
            writer.write_table(pa.Table.from_pylist(batch, SPILL))
        counts.groups = reader.num_groups
        for name, key in settings.fields.items():
            if key and reader.keys.get(name) != key:
                raise InputError(f'--field {name}={key}: no row has a value at "{key}"{nearest(key, reader.columns)}')
        yield PlainRollouts(spill, counts, reader.keys, settings.correct_at)


def _other_format(path: Path) -> str | None:
    """Return the format and remedy of a file that is neither JSONL nor Parquet; None if it may be either."""
    # A pipe can be read only once.
    if path.suffix.lower() == ".parquet" or not path.is_file():
        return None
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise InputError(f"{path}: {reason_of(error)}") from None
    if path.suffix.lower() == ".json" and start.lstrip().startswith(b"["):
        return "a JSON array; write one object per line, as jq -c '.[]' does"
    found = (kind for signature, kind in SIGNATURES.items() if start.startswith(signature))
    return SUFFIXES.get(path.suffix.lower()) or next(found, None)


def _read_files(
    paths: Sequence[Path], settings: ImportSettings, reader: RowReader, counts: Counts
) -> Iterator[tuple[Rollout, dict[str, str]]]:
    # The first row of each distinct fault, so that a fault of all rows is reported once.
    faults: dict[str, str] = {}
    for path in paths:
        for place, row in read_rows(path):
            counts.rows += 1
            try:
                yield reader.read(row, f"{path}, {place}", path.stem)
            except BadRowError as fault:
                counts.bad_rows += 1
                if len(faults) < NUM_NAMED:
                    faults.setdefault(str(fault), f"{path}, {place}: {fault}")
    affected = f"{counts.bad_rows} of {counts.rows} rows"
    named = name_some(list(faults.values()), counts.bad_rows)
    if counts.bad_rows and not settings.skip_bad_rows:
        raise InputError(f"{affected} are malformed ({named}); fix them, or skip them with --skip-bad-rows")
    if not counts.rollouts:
        reason = f"all {counts.rows} rows are malformed ({named})" if named else "no rows"
        raise InputError(f"{', '.join(map(str, paths))}: {reason}")
    if counts.bad_rows:
        logger.warning("entrace: %s skipped (%s)", affected, named)
