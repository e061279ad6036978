"""Record digests of a run's files in ``digests.jsonl``, and check files by them.

``digests.jsonl`` is beside ``run.json``. Every line is JSON and describes one written file: its path in the run's
folder, size in bytes, SHA-256, the CRC-32 of its Parquet footer, and the CRC-32 of the line's other fields. ``sha256``
is null for a file that was removed on purpose, as ``entrace verify --accept-edits`` records. Lines are only ever added.
A file is intact if it equals any of its lines since the last removal, so that a line may be added before the file is
replaced: a process that is killed in between leaves the old file, and its line.

Files of older traces have no line; ``entrace verify`` decodes them. The files of a checkpoint have a list of their own,
``checksums.json`` in the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from entrace.analysis.trace.errors import reason_of

DIGESTS = "digests.jsonl"
DIFFERS = f"damaged, or edited by hand (see entrace verify --accept-edits): it differs from its digest in {DIGESTS}"
# Bytes that opening a file reads from its end, which is the whole of most files but those of tokens and rollouts.
END_BYTES = 1 << 16
# A Parquet file ends with the length of its footer in 4 bytes, and this magic number.
MAGIC = b"PAR1"
TRAILER_BYTES = 8
LINE_START = b'{"file": "'
# Of `, "crc32": "00000000"}`, which ends every line.
CHECK_BYTES = 22
# Hexadecimal digits of a fingerprint, which identifies an input of a run.
DIGEST_LENGTH = 16


class Digest(NamedTuple):
    """Digest of one file; ``footer`` is None unless it is a Parquet file."""

    sha256: str
    size: int
    footer: str | None = None

    @classmethod
    def of(cls, data: bytes | memoryview) -> Digest:
        """Return the digest of a file's content."""
        return cls(hashlib.sha256(data).hexdigest(), len(data), _footer_crc(data))

    def agrees_with(self, end: End) -> bool:
        """Return whether the end of a file, or all of a small file, is as recorded."""
        if self.size != end.size:
            return False
        if end.is_whole:
            return hashlib.sha256(end.data).hexdigest() == self.sha256
        return self.footer is None or _footer_crc(end.data) == self.footer


class End(NamedTuple):
    """The size of a file and its last bytes, which include a Parquet file's footer."""

    size: int
    data: bytes

    @property
    def is_whole(self) -> bool:
        """Return whether the data are the whole file."""
        return len(self.data) == self.size

    @classmethod
    def of(cls, path: Path) -> End:
        """Read the end of a file."""
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            data = _read_last(file, size, END_BYTES)
            footer = _footer_bytes(data)
            return cls(size, _read_last(file, size, footer) if footer > len(data) else data)


@dataclass
class Recorded:
    """Hold the content of a run's ``digests.jsonl``.

    Attributes:
        files: Digests that count, by path in the run's folder; empty for a file that was removed on purpose.
        damage: What is wrong with ``digests.jsonl`` itself. No digest counts then: the line that is lost may be the
            latest of its file.
    """

    files: dict[str, tuple[Digest, ...]] = field(default_factory=dict)
    damage: str | None = None

    def of(self, name: str) -> tuple[Digest, ...]:
        """Return the digests that the file may have; empty if none is known."""
        return () if self.damage else self.files.get(name, ())

    def is_removed(self, name: str) -> bool:
        """Return whether the file was removed on purpose."""
        return self.files.get(name) == ()


def digest_of(path: Path) -> Digest:
    """Return the digest of a file."""
    end = End.of(path)
    return Digest(sha256_of(path), end.size, _footer_crc(end.data))


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_file(path: Path) -> str | None:
    """Return the fingerprint of a file; None if it does not exist.

    The reader of the file reports that it is missing.
    """
    return sha256_of(path)[:DIGEST_LENGTH] if path.is_file() else None


def append(run_dir: Path, files: Mapping[str, Digest | None]) -> None:
    """Record the digests of files durably, in one write.

    A digest of None records that the file was removed on purpose. Record a new file once it is complete, and before
    ``run.json`` lists it. Record the new content of a file that already counts before it replaces the old one.

    Args:
        run_dir: Folder of the run.
        files: Digests by path in ``run_dir``, with ``/`` between folders.
    """
    lines = b"".join(_to_line(name, digest) for name, digest in files.items())
    with open(run_dir / DIGESTS, "ab") as file:
        _lock(file)
        file.write(_end_last_line(run_dir / DIGESTS) + lines)
        file.flush()
        os.fsync(file.fileno())


def read(run_dir: Path) -> Recorded:
    """Read ``digests.jsonl`` of a run; without the file, nothing is recorded.

    A last line that was cut off when its writer was killed does not count, and is not damage.
    """
    try:
        *lines, last = (run_dir / DIGESTS).read_bytes().split(b"\n")
    except FileNotFoundError:
        return Recorded()
    except OSError as error:
        return Recorded(damage=reason_of(error))
    recorded = Recorded()
    damaged = [] if _is_torn(last) else [len(lines) + 1]
    for number, line in enumerate(lines, 1):
        if entry := _from_line(line):
            name, digest = entry
            recorded.files[name] = (*recorded.files.get(name, ()), digest) if digest else ()
        else:
            damaged.append(number)
    if damaged:
        recorded.damage = f"{len(damaged)} damaged of {len(lines)} lines, the first is line {min(damaged)}"
    return recorded


def is_intact(run_dir: Path, name: str, data: bytes) -> bool:
    """Return whether a file's content was recorded; True without a reliable record."""
    try:
        # Looking for the digest takes less time than parsing every line.
        if hashlib.sha256(data).hexdigest().encode() in (run_dir / DIGESTS).read_bytes():
            return True
    except OSError:
        return True
    return not read(run_dir).of(name)


def _to_line(name: str, digest: Digest | None) -> bytes:
    entry = {"file": name, **(digest._asdict() if digest else {"sha256": None})}
    body = json.dumps(entry).removesuffix("}").encode()
    return body + _check(body) + b"\n"


def _from_line(line: bytes) -> tuple[str, Digest | None] | None:
    """Return the file and digest of a line; None if the line is damaged."""
    body, check = line[:-CHECK_BYTES], line[-CHECK_BYTES:]
    if check != _check(body):
        return None
    try:
        entry = json.loads(body + b"}")
        return entry.pop("file"), Digest(**entry) if entry["sha256"] else None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _check(body: bytes) -> bytes:
    return f', "crc32": "{_crc(body)}"}}'.encode()


def _crc(data: bytes | memoryview) -> str:
    return f"{zlib.crc32(data):08x}"


def _is_torn(last: bytes) -> bool:
    """Return whether the bytes after the last newline are empty or begin a line."""
    is_beginning = LINE_START.startswith(last[: len(LINE_START)]) and (last.isascii() and last.decode().isprintable())
    return is_beginning and _from_line(last[:-1]) is None


def _end_last_line(path: Path) -> bytes:
    """Remove a torn last line; return the newline that a damaged last line lacks."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size == 0 or (file.seek(size - 1) and file.read() == b"\n"):
            return b""
        file.seek(0)
        last = file.read().rpartition(b"\n")[2]
    if not _is_torn(last):
        return b"\n"
    os.truncate(path, size - len(last))
    return b""


def _lock(file: BinaryIO) -> None:
    """Wait for other writers, if the file system supports locks.

    Windows and some shared file systems do not.
    """
    with suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)


def _read_last(file: BinaryIO, size: int, count: int) -> bytes:
    file.seek(max(0, size - count))
    return file.read(count)


def _footer_bytes(data: bytes | memoryview) -> int:
    """Return the size of a Parquet file's footer and trailer, from its last bytes.

    The size is in bytes; it is 0 for other files.
    """
    trailer = bytes(data[-TRAILER_BYTES:])
    return TRAILER_BYTES + int.from_bytes(trailer[:4], "little") if trailer[4:] == MAGIC else 0


def _footer_crc(data: bytes | memoryview) -> str | None:
    length = _footer_bytes(data)
    return _crc(data[-length:]) if length else None
