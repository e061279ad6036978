"""Read and check all rows of a dump once, and sort them by step.

Rows are sorted through a temporary file.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from entrace.analysis.importers.codec import Codec, DumpTexts
from entrace.analysis.importers.columns import Columns
from entrace.analysis.importers.dump import Dump
from entrace.analysis.importers.reader import RowReader
from entrace.analysis.importers.rewards import Rewards
from entrace.analysis.importers.rollout import SPILL, Rollout
from entrace.analysis.importers.row_files import NUM_NAMED, BadRowError, name_some
from entrace.analysis.importers.settings import ImportSettings
from entrace.analysis.trace.errors import TEMPORARY, InputError, faults_at, nearest

# Rows and tokens in memory while reading, and rows while sorting.
ROWS_AT_ONCE, TOKENS_AT_ONCE, SORTED_AT_ONCE = 1024, 1 << 18, 64
SORT_MEMORY = "1GiB"
# Called with the share of the files that was read, in [0, 1], and the number of rows.
OnRead = Callable[[float, int], None]
# Rows between two calls.
READ_EVERY = 256
# Rows whose values are known, by column.
KNOWN = (
    *("reward", "is_correct", "is_truncated", "has_answer", "ground_truth", "reward_components", "is_kept"),
    *("logprob", "sampling_logprob", "reference_logprob", "entropy", "entropy_mean", "turn", "policy_version"),
    "temperature",
)


@dataclass(frozen=True)
class Counts:
    """Counts of the rows that were read, and of those to import.

    Attributes:
        rows: Rows of all files.
        bad_rows: Malformed rows, which are skipped.
        dropped_rows: Well-formed rows that are skipped because their group holds a malformed row.
        dropped_groups: Groups that are skipped.
        rollouts: Rows to import.
        groups: Groups of responses to one prompt at one step.
        steps: Distinct steps.
        tokens: Tokens of all responses.
        masked: Tokens outside loss_mask.
        exact: Rows whose token ids are recorded.
        with_text: Rows whose prompt and completion are known as text.
        with_advantage: Rows with an advantage.
        correct: Correct responses.
        largest_id: Largest token id.
        kinds: Rows by who computed their logprobs.
        known: Rows that have a value, by column of ``KNOWN``.
        temperatures: Lowest and highest recorded sampling temperature; None if not recorded.
    """

    rows: int
    bad_rows: int
    dropped_rows: int = 0
    dropped_groups: int = 0
    rollouts: int = 0
    groups: int = 0
    steps: int = 0
    tokens: int = 0
    masked: int = 0
    exact: int = 0
    with_text: int = 0
    with_advantage: int = 0
    correct: int = 0
    largest_id: int = 0
    kinds: Mapping[str, int] = field(default_factory=dict)
    known: Mapping[str, int] = field(default_factory=dict)
    temperatures: tuple[float, float] | None = None


@dataclass(frozen=True)
class Collected:
    """Rollouts of all files, in a temporary file, and what is known about them.

    Attributes:
        path: The temporary file.
        dump: Files and format.
        counts: Counts of the rows.
        keys: Key of each field.
        texts: Texts of tokens that the dump holds.
        group_column: Column of the groups: ``group_id``, or ``shared_group_id`` if recorded groups hold one response.
        excluded: Groups that are skipped.
        remarks: What the user should know, one line each.
    """

    path: Path
    dump: Dump
    counts: Counts
    keys: Mapping[str, str]
    texts: DumpTexts
    group_column: str
    excluded: Sequence[int]
    remarks: Sequence[str]

    def in_order(self) -> Iterator[Rollout]:
        """Yield all rollouts by step, with groups adjacent, in constant memory."""
        with _connect(self.path) as con:
            names = ", ".join(name.name for name in fields(Rollout))
            rows = con.execute(
                f"select {names} from ({_select(self.group_column)}) order by step, group_id, row",
                [str(self.path), list(self.excluded)],
            )
            while batch := rows.fetchmany(SORTED_AT_ONCE):
                yield from (Rollout(*values) for values in batch)


@contextmanager
def collect(
    dump: Dump,
    settings: ImportSettings,
    codec: Codec | None = None,
    *,
    rewards: Rewards | None = None,
    has_model: bool = False,
    on_read: OnRead = lambda share, rows: None,
) -> Iterator[Collected]:
    """Read all files and keep the rollouts in a temporary file.

    The file lasts as long as the context.

    Args:
        dump: Files and format.
        settings: Settings of the import.
        codec: Tokenizer; None to use tokens as they are.
        rewards: Rewards to join by id.
        has_model: A model will read prompts and responses.
        on_read: Called while rows are read.

    Raises:
        InputError: a file is unreadable, or a row is malformed and must not be skipped.
    """
    with tempfile.TemporaryDirectory(prefix=TEMPORARY) as folder:
        with faults_at(folder):
            collected = _read(dump, settings, codec, rewards, has_model, Path(folder), on_read)
        yield collected


def _read(
    dump: Dump,
    settings: ImportSettings,
    codec: Codec | None,
    rewards: Rewards | None,
    has_model: bool,
    folder: Path,
    on_read: OnRead,
) -> Collected:
    spill = folder / "rollouts.parquet"
    needed = {name: kind for name, kind in dump.format.needed.items() if name != "reward" or not rewards}
    columns = Columns(settings.fields, needed, dump.format.uniform)
    reader = RowReader(settings, codec, columns, dump.format.prompts, has_model, rewards)
    rows = bad_rows = tokens = 0
    # The first row of each distinct fault, so that a fault of all rows is reported once.
    faults: dict[str, str] = {}
    with pq.ParquetWriter(spill, SPILL, compression="zstd") as writer:
        batch: list[dict[str, Any]] = []
        for place, row, task in dump.rows(folder, settings.fields):
            rows += 1
            if rows % READ_EVERY == 0:
                on_read(dump.share_read, rows)
            try:
                rollout = reader.read(row, place, task)
            except BadRowError as fault:
                bad_rows += 1
                if len(faults) < NUM_NAMED:
                    faults.setdefault(str(fault), f"{place}: {fault}")
                continue
            batch.append(vars(rollout))
            tokens += len(rollout.response_ids)
            if len(batch) == ROWS_AT_ONCE or tokens >= TOKENS_AT_ONCE:
                writer.write_table(pa.Table.from_pylist(batch, SPILL))
                batch, tokens = [], 0
        writer.write_table(pa.Table.from_pylist(batch, SPILL))
    named = name_some(list(faults.values()), bad_rows)
    _check(dump, settings, reader, rows, bad_rows, named)
    if rewards:
        rewards.check()
    return _finish(spill, dump, settings, reader, rewards, rows, bad_rows, named)


def _check(dump: Dump, settings: ImportSettings, reader: RowReader, rows: int, bad_rows: int, named: str) -> None:
    paths = ", ".join(map(str, dump.named))
    if bad_rows and not settings.skip_bad_rows:
        raise InputError(
            f"{bad_rows} of {rows} rows are malformed ({named}); fix them, or skip them with --skip-bad-rows"
        )
    if bad_rows == rows:
        raise InputError(f"{paths}: {f'all {rows} rows are malformed ({named})' if named else 'no rows'}")
    for name, key in settings.fields.items():
        if key and reader.columns.keys.get(name) != key:
            hint = nearest(key, reader.columns.columns)
            raise InputError(f'--field {name}={key}: no row has a value at "{key}"{hint}')
    found = reader.mismatches
    if found.checked and found.rows == found.checked:
        raise InputError(
            f"no row has the tokens of its text ({found.first}); name the tokenizer of the model that sampled"
        )


def _finish(
    spill: Path,
    dump: Dump,
    settings: ImportSettings,
    reader: RowReader,
    rewards: Rewards | None,
    rows: int,
    bad_rows: int,
    named: str,
) -> Collected:
    """Choose the groups, drop those that are not whole, and count the rest."""
    keys = reader.columns.keys
    remarks = [*dump.remarks, *_read_from(keys), *(rewards.remarks() if rewards else [])]
    with _connect(spill) as con:
        total, own, shared = _one(
            con,
            "select count(*), count(distinct group_id), count(distinct shared_group_id) from read_parquet(?)",
            spill,
        )
        is_unique = own == total > shared and "group" not in settings.fields
        falls_back = "group" in keys and (is_unique or reader.num_ungrouped > 0)
        column = "shared_group_id" if falls_back else "group_id"
        if falls_back:
            why = "differs for every response" if is_unique else f"is missing from {reader.num_ungrouped} responses"
            remarks.append(f'"{keys["group"]}" {why}; groups share prompt and step instead')
        excluded = _unwhole(con, spill, column, reader) if bad_rows else []
        counts = _count(con, spill, column, excluded, rows, bad_rows)
    if bad_rows:
        whole = ""
        if counts.dropped_rows:
            whole = f", with {counts.dropped_rows} further rows, the rest of {counts.dropped_groups} groups"
        remarks.append(f"{bad_rows} of {rows} rows skipped{whole} ({named})")
    if not counts.rollouts:
        raise InputError(
            f"{', '.join(map(str, dump.named))}: every group holds a malformed row ({named}); fix the rows"
        )
    remarks += _remarks(reader, settings, counts, keys, falls_back)
    return Collected(spill, dump, counts, keys, reader.texts, column, excluded, remarks)


def _unwhole(con: Any, spill: Path, column: str, reader: RowReader) -> list[int]:
    """Return the groups that a skipped row belongs to.

    A malformed row may not say which group it belongs to. Groups smaller than most are then left out as well.
    """
    bad = reader.bad_groups[column == "shared_group_id"]
    present = con.execute(f"select {column}, count(*) from read_parquet(?) group by 1", [str(spill)]).fetchall()
    sizes = dict(present)
    if reader.num_lost:
        common = Counter(size for group, size in sizes.items() if group not in bad)
        usual = max(common, key=lambda size: (common[size], size), default=0)
        bad = bad | {group for group, size in sizes.items() if size < usual}
    return sorted(bad & sizes.keys())


def _count(con: Any, spill: Path, column: str, excluded: list[int], rows: int, bad_rows: int) -> Counts:
    known = ", ".join(f"count({name})" for name in KNOWN)
    values = con.execute(
        f"""select
          count(*), count(distinct group_id), count(distinct step), coalesce(sum(len(response_ids)), 0)::bigint,
          coalesce(sum(len(list_filter(loss_mask, lambda x: not x))), 0)::bigint, count(*) filter (ids_given),
          count(*) filter (has_text), count(*) filter (advantage is not null or advantages is not null),
          count(*) filter (is_correct), coalesce(max(list_max(response_ids)), 0),
          histogram(logprob_kind), min(temperature), max(temperature), {known}
        from ({_select(column)})""",
        [str(spill), excluded],
    ).fetchone()
    names = ("rollouts", "groups", "steps", "tokens", "masked", "exact", "with_text", "with_advantage", "correct")
    first = dict(zip((*names, "largest_id"), values, strict=False))
    kinds, low, high, *by_column = values[len(first) :]
    return Counts(
        rows=rows,
        bad_rows=bad_rows,
        dropped_rows=rows - bad_rows - first["rollouts"],
        dropped_groups=len(excluded),
        **first,
        kinds=kinds or {},
        known=dict(zip(KNOWN, by_column, strict=True)),
        temperatures=None if low is None else (low, high),
    )


def _remarks(
    reader: RowReader, settings: ImportSettings, counts: Counts, keys: Mapping[str, str], falls_back: bool
) -> list[str]:
    """Return remarks about likely mistakes and about what was restored."""
    lines = []
    judged = counts.known["is_correct"]
    if judged and counts.correct in (0, judged):
        judge = keys.get("is_correct")
        by_reward = f"by {keys.get('reward', 'reward')} >= {settings.correct_at:g}; see --correct-at"
        lines.append(
            f"{'all' if counts.correct else 'no'} responses count as right {f'by {judge}' if judge else by_reward}"
        )
    if counts.groups == counts.rollouts and counts.known["reward"] and not counts.with_advantage:
        group = None if falls_back else keys.get("group")
        shared = f"{group}; --field group= groups by prompt and step" if group else "prompt and step"
        lines.append(f"all advantages are 0: no two responses share {shared}")
    if counts.masked:
        mask = keys.get("loss_mask", "loss_mask")
        lines.append(
            f"{mask} marks {counts.masked} of {counts.tokens} tokens as context, which is excluded from all statistics"
        )
    if reader.mismatches.rows:
        found = reader.mismatches
        lines.append(f"{found.rows} of {found.checked} rows have token ids that differ from their text ({found.first})")
    if not reader.prompts and counts.with_text < counts.rollouts:
        lines.append("token texts are unknown, so that questions about words have no answer; add --tokenizer PATH")
    restored = reader.prompts.counts if reader.prompts else {}
    if number := restored.get("rebuilt", 0) + restored.get("as question", 0):
        lines.append(f"{number} prompts rebuilt with the chat template, whose special tokens the dump lacks")
    if number := restored.get("not rebuilt", 0):
        lines.append(f"{number} prompts do not match the chat template without its special tokens; recorded as text")
    return lines


def _read_from(keys: Mapping[str, str]) -> list[str]:
    renamed = [f"{name} from {key}" for name, key in keys.items() if key != name]
    return [f"read {', '.join(renamed)}"] if renamed else []


def _select(column: str) -> str:
    """Return the query of the rows to import.

    Its parameters are the file and the groups that are skipped.
    """
    renamed = "shared_group_id as group_id, shared_prompt_id as prompt_id"
    replaced = f" replace ({renamed})" if column == "shared_group_id" else ""
    return (
        f"select *{replaced} from (select *, file_row_number as row from read_parquet(?, file_row_number=true)) "
        f"where not list_contains(?::bigint[], {column})"
    )


def _connect(spill: Path) -> Any:
    import duckdb

    config: dict[str, Any] = {"memory_limit": SORT_MEMORY, "temp_directory": str(spill.parent)}
    return duckdb.connect(config=config)


def _one(con: Any, query: str, spill: Path) -> tuple[Any, ...]:
    return con.execute(query, [str(spill)]).fetchone()
