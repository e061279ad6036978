"""Check every byte of a run's files against their digests and checksums."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from entrace.analysis.trace import digests
from entrace.analysis.trace.digests import DIGESTS, Digest, sha256_of
from entrace.analysis.trace.errors import InputError, StorageError, reason_of
from entrace.analysis.trace.manifest import MANIFEST, read_manifest
from entrace.analysis.trace.parts import PART, check_whole, listed_files, part_path, remedy, wait_for_moves
from entrace.analysis.trace.schema import TABLES

CHECKPOINTS = "checkpoints"
# In every checkpoint: the SHA-256 of each of its other files.
CHECKSUMS = "checksums.json"
CHECKPOINT_REMEDY = "restore it, or remove the checkpoint and use an earlier one"
DIGESTS_REMEDY = "restore it; without it, files are checked only by the checksums inside them"

State = Literal["damaged", "missing", "unlisted", "removed"]


@dataclass(frozen=True)
class Finding:
    """One file that is not as it was written, or one table that was removed.

    Attributes:
        state: ``damaged`` or ``missing``, which are faults; ``unlisted``, for a file that is not part of the trace;
            ``removed``, for files that were removed on purpose.
        run: Name of the run.
        table: Table, or ``checkpoints``; None for a file beside ``run.json``.
        file: Path in the folder of the run.
        message: What was found, and what to do.
    """

    state: State
    run: str
    table: str | None
    file: str
    message: str

    @property
    def is_fault(self) -> bool:
        """Return whether something was lost."""
        return self.state in ("damaged", "missing")

    def __str__(self) -> str:
        """Return one line."""
        place = f"{'table ' if self.table in TABLES else ''}{self.table}: " if self.table else ""
        return f"{self.state}: run {self.run}: {place}{self.message}"


@dataclass
class Verification:
    """Result of checking one run.

    Attributes:
        run: Name of the run.
        path: Its folder.
        files: Number of files that were read.
        size: Their bytes.
        without_digest: Files among them that have no digest; their rows were decoded instead.
        findings: What is not as it was written.
    """

    run: str
    path: str
    files: int = 0
    size: int = 0
    without_digest: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def faults(self) -> list[Finding]:
        """Return the findings that mean a loss."""
        return [finding for finding in self.findings if finding.is_fault]

    @property
    def summary(self) -> str:
        """Return one line on the run as a whole."""
        decoded = f", {self.without_digest} of them without a digest (their rows were decoded)"
        state = f"{len(self.faults)} damaged or missing" if self.faults else "intact"
        return f"run {self.run}: {state}; read {self.files} files{decoded if self.without_digest else ''}"


def list_files(run_dir: Path) -> list[str]:
    """Return the files of a run that ``verify_run`` checks, except temporary ones."""
    paths = (path.relative_to(run_dir) for path in sorted(run_dir.rglob("*")) if not path.is_dir())
    return [path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)]


def verify_run(run_dir: Path, on_file: Callable[[], None] = lambda: None) -> Verification:
    """Read every file of a run completely, and compare it with its record.

    Args:
        run_dir: Folder of the run.
        on_file: Called after every file of ``list_files``.
    """
    return _Verifier(run_dir).verify(on_file)


def check_run(run_dir: Path) -> None:
    """Check a run as ``verify_run`` does.

    Raises:
        InputError: a file is damaged or missing.
    """
    if faults := verify_run(run_dir).faults:
        more = f" ({len(faults) - 1} more: entrace verify {run_dir})" if len(faults) > 1 else ""
        raise InputError(f"{faults[0]}{more}")


def accept_edits(run_dir: Path) -> list[str]:
    """Accept files that were edited or removed on purpose; return their names.

    Their present state is recorded. A file that ``run.json`` lists cannot be removed alone; every reader would miss its
    rows.

    Raises:
        InputError: a file of a table cannot be read, or its page checksums are wrong.
    """
    recorded = digests.read(run_dir)
    edited: dict[str, Digest | None] = {}
    for name in recorded.files:
        path, known = run_dir / name, recorded.of(name)
        if known and not path.exists() and path.parent.name in TABLES and not PART.fullmatch(path.name):
            edited[name] = None
        if known and path.is_file() and (digest := digests.digest_of(path)) not in known:
            if path.parent.name in TABLES:
                check_whole(path, TABLES[path.parent.name])
            edited[name] = digest
    if edited:
        digests.append(run_dir, edited)
    return list(edited)


class _Verifier:
    def __init__(self, run_dir: Path) -> None:
        """Read everything that says which files belong to the run."""
        self.run_dir = run_dir
        self.result = Verification(run_dir.name, str(run_dir))
        # Without a readable manifest, every file named like the writer's counts as listed.
        manifest: dict[str, Any] = {}
        try:
            manifest = read_manifest(run_dir)
            self.result.run = manifest.get("run_id") or run_dir.name
        except StorageError:
            raise
        except InputError as error:
            self._report("damaged", MANIFEST, str(error))
        # The manifest comes first, because a file has a digest before it is listed.
        self.recorded = digests.read(run_dir)
        listed = listed_files(run_dir, manifest)
        wait_for_moves(run_dir, listed)
        self.rows = {f"{table}/{name}": rows for table, files in listed.items() for name, rows in files.items()}
        self.checksums: dict[str, str] = {}
        for folder in sorted((run_dir / CHECKPOINTS).glob("step-*")):
            place = f"{CHECKPOINTS}/{folder.name}"
            try:
                self.checksums |= {f"{place}/{name}": value for name, value in _read_checksums(folder).items()}
            except StorageError:
                raise
            except InputError as error:
                self._report("damaged", f"{place}/{CHECKSUMS}", str(error))

    def verify(self, on_file: Callable[[], None]) -> Verification:
        """Check the files that exist, then report those that do not."""
        names = list_files(self.run_dir)
        names += sorted(name for name in self.rows.keys() - set(names) if self._path(name).exists())
        for name in names:
            try:
                self._check(name)
            except StorageError:
                raise
            except InputError as error:
                self._report("damaged", name, str(error))
            on_file()
        self._report_absent(set(names))
        return self.result

    def _check(self, name: str) -> None:
        path, known = self._path(name), self.recorded.of(name)
        if name in self.checksums:
            self._compare(path, {self.checksums[name]}, f"damaged, it differs from {CHECKSUMS}; {CHECKPOINT_REMEDY}")
        elif name == DIGESTS and self.recorded.damage:
            raise InputError(f"{path}: {self.recorded.damage}; {DIGESTS_REMEDY}")
        elif self._is_part(name):
            self.result.without_digest += not known
            check_whole(path, TABLES[name.partition("/")[0]], self.rows.get(name), known)
        elif name not in (MANIFEST, DIGESTS) and path.name != CHECKSUMS:
            if not known:
                self._report(
                    "unlisted", name, f"{path}: not part of the trace, not checked; remove it if you do not need it"
                )
                return
            self._compare(
                path, {digest.sha256 for digest in known}, f"differs from its digest in {DIGESTS}; restore it"
            )
        self.result.files += 1
        self.result.size += path.stat().st_size

    def _path(self, name: str) -> Path:
        """Return where a file is, which run.json may list before it moves to its table."""
        table, _, file = name.partition("/")
        return part_path(self.run_dir, table, file) if name in self.rows else self.run_dir / name

    def _compare(self, path: Path, expected: set[str], fault: str) -> None:
        try:
            if sha256_of(path) not in expected:
                raise InputError(f"{path}: {fault}")
        except OSError as error:
            raise InputError(f"{path}: {reason_of(error)}") from None

    def _is_part(self, name: str) -> bool:
        """Return whether a file holds rows that readers read."""
        table, _, file = name.partition("/")
        is_parquet = table in TABLES and file.endswith(".parquet") and "/" not in file
        return name in self.rows or (is_parquet and not PART.fullmatch(file))

    def _report_absent(self, found: set[str]) -> None:
        recorded = {name for name in self.recorded.files if self._is_part(name)}
        removed: dict[str, int] = {}
        for name in sorted((self.rows.keys() | recorded | self.checksums.keys()) - found):
            path, (table, *_) = self.run_dir / name, name.split("/")
            if table in TABLES and (self.recorded.is_removed(name) or not (self.run_dir / table).exists()):
                removed[table] = removed.get(table, 0) + 1
            elif table in TABLES:
                self._report("missing", name, f"{path}: missing; {_remedy_of_loss(path)}")
            elif (self.run_dir / table / name.split("/")[1]).exists():
                self._report("missing", name, f"{path}: missing, although {CHECKSUMS} lists it; {CHECKPOINT_REMEDY}")
        for table, count in removed.items():
            self._report(
                "removed", table, f"{self.run_dir / table}: {count} files were removed; other tables are complete"
            )

    def _report(self, state: State, name: str, message: str) -> None:
        table = name.split("/")[0]
        table = table if table in (*TABLES, CHECKPOINTS) else None
        self.result.findings.append(Finding(state, self.result.run, table, name, message))


def _remedy_of_loss(path: Path) -> str:
    if PART.fullmatch(path.name):
        return remedy(path)
    return "repeat the command that made it, or accept that it was removed with entrace verify --accept-edits"


def _read_checksums(checkpoint: Path) -> dict[str, str]:
    path = checkpoint / CHECKSUMS
    try:
        checksums = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {reason_of(error)}; {CHECKPOINT_REMEDY}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path}: damaged, not JSON; {CHECKPOINT_REMEDY}") from None
    if not isinstance(checksums, dict):
        raise InputError(f"{path}: damaged, expected the checksum of every file; {CHECKPOINT_REMEDY}")
    return checksums
