"""Find the files of a dump, and detect its format."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from entrace.analysis.importers.formats import FORMATS
from entrace.analysis.importers.formats.base import Format, Session
from entrace.analysis.importers.row_files import BadRowError, Reading, read_rows, size_of
from entrace.analysis.trace.errors import InputError, choices, in_one_line, reason_of
from entrace.analysis.trace.places import to_place

PICKLE = (
    "a pickle, which can run code when it is loaded; if you trust it, load it yourself and write JSONL (slime: per "
    'sample of torch.load(FILE)["samples"], with n = response_length: prompt_ids = tokens[:-n], '
    "response_ids = tokens[-n:], "
    "loss_mask, reward, group = group_index, sampling_logprob = rollout_log_probs)"
)
# Other formats, by the first bytes of a file and by its suffix.
SIGNATURES = {
    b"PK\x03\x04": f"a zip archive; one that torch.save wrote is {PICKLE}",
    b"\x80": PICKLE,
    b"PAR1": "Parquet; rename the file to .parquet",
    b"\x1f\x8b": "gzip; decompress the file",
    b"\x28\xb5\x2f\xfd": "zstd; rename the file to .jsonl.zst",
    b"ARROW1": "an Arrow file; write Parquet",
    b"\x93NUMPY": "a NumPy array; write Parquet",
    b"\xff\xfe": "text in UTF-16; write UTF-8",
}
SUFFIXES = {
    **dict.fromkeys((".pt", ".pth", ".pkl", ".pickle"), PICKLE),
    **dict.fromkeys((".csv", ".tsv"), "a table of text; write Parquet"),
}
# Suffixes of the files of a folder that are read; other files beside them, such as unfinished ones, are not.
READ = (".jsonl", ".zst", ".parquet")
NUMBERS = re.compile(r"(\d+)")
# Files that a message about a folder names.
NUM_LISTED = 3


@dataclass(frozen=True)
class Dump:
    """Files of one dump.

    Attributes:
        named: Paths as named by the user.
        files: Files to read, in order.
        format: Their format.
        remarks: Filled while reading with what the user should know.
    """

    named: Sequence[Path]
    files: Sequence[Path]
    format: Format
    remarks: list[str] = field(default_factory=list)
    _progress: _Progress = field(default_factory=lambda: _Progress(), repr=False, compare=False)

    @classmethod
    def find(cls, paths: Sequence[Path], name: str | None = None, *, has_fields: bool = False) -> Dump:
        """Find the files at ``paths`` and their format.

        Args:
            paths: Files and folders.
            name: The format; None to detect it.
            has_fields: The user names fields, so that rows with other keys may be rollouts.

        Raises:
            InputError: a path does not exist or is empty, the format is unknown, or the paths hold several formats or
                runs.
        """
        if name is not None and name not in FORMATS:
            raise InputError(f"--from {name}: unknown format{choices(name, FORMATS)}")
        found = [_find(path, FORMATS[name] if name else None, has_fields) for path in paths]
        told: list[str] = []
        for path, (form, files) in zip(paths, found, strict=True):
            if path.is_dir():
                files[:], of_path = form.whole(files)
                told += of_path
        kinds = {form.name: path for path, (form, _) in zip(paths, found, strict=True)}
        if len(kinds) > 1:
            listed = ", ".join(f"{path} holds {FORMATS[kind].title}" for kind, path in kinds.items())
            raise InputError(f"{listed}; import one format at a time")
        form = found[0][0]
        files = list(dict.fromkeys(file for _, of_path in found for file in of_path))
        runs = sorted({run for file in files if (run := form.run_of(file)) is not None})
        if len(runs) > 1:
            raise InputError(
                f"{', '.join(map(str, paths))}: {len(runs)} runs, {runs[0]} and {runs[1]}; import one run at a time"
            )
        remarks = [] if form.name == "rows" else [f"found {form.title} in {len(files)} file{'s'[: len(files) > 1]}"]
        return cls(list(paths), files, form, [*remarks, *told])

    @property
    def share_read(self) -> float:
        """Return the share of the bytes of all files that ``rows`` has read, in [0, 1]."""
        return self._progress.share

    def task_of(self, path: Path) -> str:
        """Return the default task of the rows of a file.

        It is the name of the file. If files belong to a run, with one file per step, it is the name of the run.
        """
        run = self.format.run_of(path)
        if run is None:
            return path.stem
        place = to_place(run)
        return place.name or place.resolve().name

    def rows(
        self, folder: Path, fields: Collection[str] = ()
    ) -> Iterator[tuple[str, dict[str, Any] | BadRowError, str]]:
        """Yield all rollouts with their places and default task names.

        A malformed row is replaced by its fault.

        Args:
            folder: Temporary folder.
            fields: Fields for which the user names keys.

        Raises:
            InputError: a file does not exist or is damaged.
        """
        session = Session(self.files, folder, fields=fields)
        convert = self.format.open(session)
        for path in self._progress.over(self.files):
            task = self.task_of(path)
            for place, row in read_rows(path, self._progress.reading):
                where = f"{path}, {place}"
                if isinstance(row, BadRowError):
                    yield where, row, task
                    continue
                try:
                    for found in convert(row, path):
                        yield where, found, task
                except BadRowError as fault:
                    yield where, fault, task
                except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
                    # A value of another type than the trainer writes.
                    yield where, BadRowError(f"not {self.format.title} ({in_one_line(error)})"), task
        self.remarks.extend(session.remarks)


class _Progress:
    """Tell how far the reading of files is."""

    def __init__(self) -> None:
        self.reading = Reading()
        self._done = self._size = self._total = 0

    def over(self, files: Sequence[Path]) -> Iterator[Path]:
        """Yield the files, and count the bytes of those that are complete."""
        sizes = [size_of(path) for path in files]
        self._done, self._total = 0, sum(sizes)
        for path, self._size in zip(files, sizes, strict=True):
            self.reading = Reading()
            yield path
            self._done += self._size
        self._size = 0

    @property
    def share(self) -> float:
        """Return the share that was read, in [0, 1]; 0 if unknown."""
        return (self._done + self._size * self.reading.share) / self._total if self._total else 0.0


def _find(path: Path, form: Format | None, has_fields: bool) -> tuple[Format, list[Path]]:
    """Return format and files of a path."""
    if path.is_dir():
        return _find_in_folder(path, form)
    if kind := _other_format(path):
        raise InputError(f"{path}: expected JSONL or Parquet, one response per row; found {kind}")
    # A pipe can be read only once.
    if form or (path.exists() and not path.is_file()):
        return form or FORMATS["rows"], [path]
    row = _first_row(path)
    found = _detect(row, path)
    if found is None and isinstance(row, dict) and not has_fields and not _is_near_rows(row):
        keys = ", ".join(map(str, islice(row, 8)))
        raise InputError(
            f"{path}: unknown format, its first row has the keys {keys or 'none'}; name the format with --from "
            f"({', '.join(FORMATS)}), or the keys with --field NAME=KEY"
        )
    return found or FORMATS["rows"], [path]


def _is_near_rows(row: dict[str, Any]) -> bool:
    """Return whether a row has a reward, and so may be a misspelled rollout."""
    return any(key in row for key in ("reward", "score", "rewards"))


def _find_in_folder(folder: Path, form: Format | None) -> tuple[Format, list[Path]]:
    if not any(path.is_file() for path in folder.rglob("*")):
        raise InputError(f"{folder}: an empty folder; name the folder of a dump or its files")
    for candidate in [form] if form else FORMATS.values():
        for pattern in candidate.files:
            files = sorted((path for path in folder.glob(pattern) if path.is_file()), key=natural)
            files = [path for path in files if path.suffix in READ and ".index." not in path.name]
            if not files:
                continue
            if form or _detect(_first_row(files[0]), files[0]) is candidate:
                return candidate, files
    names = sorted((path for path in folder.rglob("*") if path.is_file()), key=natural)
    for path in names:
        if kind := _other_format(path):
            raise InputError(f"{path}: expected JSONL or Parquet, one response per row; found {kind}")
    shown = ", ".join(str(path.relative_to(folder)) for path in names[:NUM_LISTED])
    more = f", and {len(names) - NUM_LISTED} more" if len(names) > NUM_LISTED else ""
    wanted = f"no files of {form.title}" if form else "no dump of a known format"
    raise InputError(f"{folder}: {wanted}; found {shown}{more}; formats: {', '.join(FORMATS)}")


def natural(path: Path) -> list[tuple[int, int | str]]:
    """Return a key that sorts names with numbers by number."""
    parts = NUMBERS.split(str(path))
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts]


def _first_row(path: Path) -> dict[str, Any] | BadRowError | None:
    return next((row for _, row in read_rows(path)), None)


def _detect(row: dict[str, Any] | BadRowError | None, path: Path) -> Format | None:
    if not isinstance(row, dict):
        return None
    return next((form for form in FORMATS.values() if form.is_row(row, path)), None)


def _other_format(path: Path) -> str | None:
    """Return the format and remedy of a file that is neither JSONL nor Parquet.

    The result is None if the file may be either.
    """
    # A pipe can be read only once.
    if path.suffix.lower() in (".parquet", ".zst") or not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise InputError(f"{path}: {reason_of(error)}") from None
    if path.suffix.lower() == ".json" and start.lstrip().startswith(b"["):
        return "a JSON array; write one object per line, as jq -c '.[]' does"
    found = (kind for signature, kind in SIGNATURES.items() if start.startswith(signature))
    return SUFFIXES.get(path.suffix.lower()) or next(found, None)
