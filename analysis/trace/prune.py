"""Thin the tokens of a recorded trace, as if recorded with ``TokenSampling``.

The remaining tokens are written to pending files; then ``run.json`` switches to the new files at once, the old ones are
removed, and the new ones move to their places. A process killed at any moment leaves the old trace or the new one, and
the next call completes the work. A reader by pattern finds the old tokens, for a moment only some of the new ones, and
then the new ones, but never a token twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from entrace.analysis.trace import digests
from entrace.analysis.trace.errors import InputError
from entrace.analysis.trace.lock import lock_path, locked
from entrace.analysis.trace.manifest import durable_file, read_manifest, sync_folder, write_manifest
from entrace.analysis.trace.parts import (
    FILES,
    PART,
    check_part,
    check_whole,
    list_parts,
    listed_files,
    listed_name,
    pending_path,
    pruned_name,
    read_part,
    remove_leftovers,
)
from entrace.analysis.trace.places import check_local
from entrace.analysis.trace.sampling import TokenSampling, response_draws
from entrace.analysis.trace.schema import TABLES
from entrace.analysis.trace.writer import parquet_options

TOKENS = "tokens"
# Rows that are read at once, and the largest row group that is written.
ROWS_AT_ONCE, ROW_GROUP = 1 << 16, 1 << 18


@dataclass
class Pruned:
    """Size of the tokens of a run before and after pruning.

    Attributes:
        run: Folder of the run.
        token_steps: Interval of the steps with tokens, after pruning.
        token_responses: Share of the responses with tokens, after pruning.
        rows_before: Tokens before.
        rows_after: Tokens after.
        bytes_before: Size of the files of table ``tokens`` before.
        bytes_after: Size after; estimated from the number of rows in a dry run.
    """

    run: str
    token_steps: int
    token_responses: float
    rows_before: int = 0
    rows_after: int = 0
    bytes_before: int = 0
    bytes_after: int = 0

    def add(self, rows_before: int, rows_after: int, bytes_before: int, bytes_after: int) -> None:
        """Count one file."""
        self.rows_before += rows_before
        self.rows_after += rows_after
        self.bytes_before += bytes_before
        self.bytes_after += bytes_after


def prune(
    run_dir: Path,
    sampling: TokenSampling,
    *,
    dry_run: bool = False,
) -> Pruned:
    """Keep only the tokens that ``sampling`` chooses.

    See module ``sampling`` for the rule. All other tables stay as they are.

    Args:
        run_dir: Folder of the run.
        sampling: Tokens to keep; applied to what an earlier sampling kept.
        dry_run: Count only.

    Raises:
        InputError: the folder is a URL or not a trace, a process is writing it, or its tokens are in files that the
            writer of traces did not write.
    """
    check_local(run_dir)
    is_locked_by_writers = lock_path(run_dir).exists()
    with nullcontext(False) if dry_run else locked(run_dir, waits=False) as is_locked:
        manifest = read_manifest(run_dir)
        if manifest.get("status") == "running" and not dry_run and not (is_locked and is_locked_by_writers):
            raise InputError(
                f"{run_dir}: run.json says that the run is being written, and no lock shows that it is not; finish it, "
                'or set "status" to "failed" in run.json if its process has ended'
            )
        return _prune(run_dir, manifest, TokenSampling.of(manifest).thinned(sampling), dry_run)


def _prune(
    run_dir: Path,
    manifest: dict[str, Any],
    sampling: TokenSampling,
    dry_run: bool,
) -> Pruned:
    before = TokenSampling.of(manifest)
    is_listed = manifest.get(FILES) is not None
    manifest = {**manifest, FILES: listed_files(run_dir, manifest)}
    if is_listed and not dry_run:
        remove_leftovers(run_dir, manifest)
    parts = list_parts(run_dir, manifest)
    recorded = digests.read(run_dir)
    for path, rows in parts[TOKENS].items():
        if not PART.fullmatch(listed_name(path)):
            raise InputError(f"{path}: not written by TraceWriter, so that it cannot be replaced; remove or rename it")
        # A thinned file gets a new digest, which must not cover damage.
        check = check_part if dry_run else check_whole
        check(path, TABLES[TOKENS], rows, recorded.of(f"{TOKENS}/{listed_name(path)}"))
    if not is_listed and not dry_run:
        # Without a list, the new files would count while the old ones still do.
        write_manifest(run_dir, manifest)
        remove_leftovers(run_dir, manifest)
    seed = manifest.get("seed") or 0
    counts, captured = {}, set()
    for path in parts[TOKENS]:
        counts[path], own = _count_sampled(path, sampling.responses, seed)
        captured |= own
    stored = captured | _sampled_steps(parts["steps"], manifest, sampling)
    result = Pruned(str(run_dir), sampling.steps, sampling.responses)
    replaced: dict[str, tuple[str, int] | None] = {}
    try:
        for path, by_step in counts.items():
            num_rows, num_left = pq.read_metadata(path).num_rows, sum(by_step[step] for step in stored)
            size = size_left = path.stat().st_size
            if num_left < num_rows:
                size_left = round(size * num_left / num_rows)
                name = pruned_name(listed_name(path), manifest[FILES][TOKENS])
                replaced[listed_name(path)] = (name, num_left) if num_left else None
                if num_left and not dry_run:
                    target = pending_path(run_dir, TOKENS, name)
                    target.parent.mkdir(exist_ok=True)
                    size_left = _write_sampled(path, target, stored, sampling.responses, seed)
            result.add(num_rows, num_left, size, size_left)
    except BaseException:
        # A full disk needs the space.
        if not dry_run:
            remove_leftovers(run_dir, manifest)
        raise
    if not dry_run and (replaced or sampling != before):
        _switch_files(run_dir, {**manifest, **sampling.entry()}, replaced)
    return result


def _switch_files(run_dir: Path, manifest: dict[str, Any], replaced: Mapping[str, tuple[str, int] | None]) -> None:
    """Let the new files of table ``tokens`` count, and remove the old ones.

    Args:
        run_dir: Folder of the run.
        manifest: ``run.json``, with the old files and the new sampling.
        replaced: Name and number of rows of the new file by name of the old one; None if no row is left.
    """
    kept = {name: rows for name, rows in manifest[FILES].get(TOKENS, {}).items() if name not in replaced}
    added = dict(new for new in replaced.values() if new)
    new = {f"{TOKENS}/{name}": digests.digest_of(pending_path(run_dir, TOKENS, name)) for name in added}
    manifest = {**manifest, FILES: {**manifest[FILES], TOKENS: {**kept, **added}}}
    write_manifest(run_dir, manifest, new)
    remove_leftovers(run_dir, manifest)
    sync_folder(run_dir / TOKENS)


def _sampled_steps(parts: Mapping[Path, int | None], manifest: Mapping[str, Any], sampling: TokenSampling) -> set[int]:
    """Return the steps that ``sampling`` selects.

    Captured steps have tokens as well. The rule uses the index of a step rather than its number, because imported
    traces lack some steps.
    """
    steps = sorted({step for path in parts for step in read_part(path, columns=["step"])["step"].to_pylist()})
    last = manifest.get("total_steps") if manifest.get("status") != "complete" else max(steps, default=0)
    return {step for number, step in enumerate(steps, 1) if sampling.has_step(number, is_last=step == last)}


def _count_sampled(path: Path, share: float, seed: int) -> tuple[Counter[int], set[int]]:
    """Return sampled tokens per step, and the steps with after-update values.

    Only after-update values of sampled tokens count.
    """
    counts: Counter[int] = Counter()
    captured: set[int] = set()
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=["step", "rollout_id", "logprob_after"]):
            rows = batch.filter(_is_sampled(batch, share, seed))
            steps, numbers = np.unique(rows["step"].to_numpy(), return_counts=True)
            counts.update(dict(zip(steps.tolist(), numbers.tolist(), strict=True)))
            captured |= set(rows["step"].filter(rows["logprob_after"].is_valid()).unique().to_pylist())
    return counts, captured


def _write_sampled(source: Path, target: Path, stored: set[int], share: float, seed: int) -> int:
    """Write the sampled rows of a file; return the size of the new file in bytes.

    Rows are written one row group at a time.
    """
    steps = np.array(sorted(stored))
    with pq.ParquetFile(source, page_checksum_verification=True) as file, durable_file(target) as sink:
        schema = file.schema_arrow
        options = parquet_options(TABLES[TOKENS], schema.names)
        with pq.ParquetWriter(sink, schema, **options) as writer:
            waiting: list[pa.RecordBatch] = []
            for batch in file.iter_batches(ROWS_AT_ONCE):
                is_kept = _is_sampled(batch, share, seed).to_numpy(zero_copy_only=False)
                is_kept &= np.isin(batch["step"].to_numpy(), steps)
                waiting.append(batch.filter(pa.array(is_kept)))
                if sum(map(len, waiting)) >= ROW_GROUP:
                    writer.write_table(pa.Table.from_batches(waiting, schema))
                    waiting = []
            if any(map(len, waiting)):
                writer.write_table(pa.Table.from_batches(waiting, schema))
    return target.stat().st_size


def _is_sampled(batch: pa.RecordBatch, share: float, seed: int) -> pa.BooleanArray:
    draws = response_draws(seed, batch["step"].to_numpy(), batch["rollout_id"].to_numpy())
    return pa.array(draws < share)
