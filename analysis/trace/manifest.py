"""Read and write ``run.json``: the description, settings, and progress of a run."""

from __future__ import annotations

import json
import math
import os
import platform
import reprlib
import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

from entrace.analysis.trace import digests
from entrace.analysis.trace.digests import Digest
from entrace.analysis.trace.errors import InputError, faults_at, in_one_line, reason_of
from entrace.analysis.trace.places import to_place
from entrace.analysis.trace.plain import well_formed
from entrace.analysis.trace.sampling import TokenSampling
from entrace.analysis.trace.schema import check_version

MANIFEST = "run.json"
# Types of the keys that readers use; other keys may hold any value.
TEXT, NUMBER, SECTION = (str, type(None)), (int, type(None)), (dict, type(None))
KIND_NAMES = {TEXT: "text", NUMBER: "a 32-bit integer", SECTION: "a table"}
KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("run_id", "study", "arm", "baseline", "status", "error", "model", "task"), TEXT),
    **dict.fromkeys(("git_commit", "started_at", "finished_at"), TEXT),
    **dict.fromkeys(("seed", "last_durable_step", "total_steps"), NUMBER),
    **dict.fromkeys(
        ("config", "files", "hardware", "versions", "common_random_numbers", "imported", "unknown"), SECTION
    ),
    "token_sampling": SECTION,
}
# How a trace was imported, and the name of this key when the command was ``entrace score``.
IMPORTED, FORMER = "imported", "scored"
PACKAGES = ("entrace", "torch", "transformers", "tokenizers", "reasoning-gym", "pyarrow", "duckdb", "numpy")


def write_manifest(run_dir: Path, manifest: dict[str, Any], new_files: Mapping[str, Digest] | None = None) -> None:
    """Replace ``run.json`` atomically, after recording digests.

    The digests are its own, and those of the ``new_files`` that it lists for the first time. A reader sees either the
    old or the new content, never a part. The new content survives a loss of power.
    """
    data = f"{to_json(str(run_dir / MANIFEST), manifest)}\n".encode()
    recorded = {**(new_files or {}), MANIFEST: Digest.of(data)}
    # Both files are synced together, and the digests are on disk before ``run.json`` gets its name.
    with ThreadPoolExecutor(1) as pool, durable_file(run_dir / MANIFEST) as file:
        appended = pool.submit(digests.append, run_dir, recorded)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        appended.result()


def is_before_manifest(run_dir: Path) -> bool:
    """Return True if a folder is empty, or its first manifest was never completed.

    A process that is killed in its first manifest may leave its temporary file and ``digests.jsonl``.
    """
    return {path.name for path in run_dir.iterdir()} <= {f".{MANIFEST}.tmp", digests.DIGESTS}


@contextmanager
def durable_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that is renamed to ``path`` once it is complete and on disk.

    An error leaves the old file.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with faults_at(path):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make new names in ``folder`` survive a loss of power, where supported."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(run_dir: Path) -> dict[str, Any]:
    """Return the content of ``run.json``.

    Raises:
        InputError: the folder is not a trace, the file is damaged or not JSON, its schema version is not readable, or
            a key has the wrong type.
    """
    path = to_place(run_dir) / MANIFEST
    if not path.is_file():
        raise InputError(f"{run_dir}: not a trace (no {MANIFEST})")
    try:
        data = path.read_bytes()
        # Earlier versions wrote NaN and infinity, which are not JSON.
        manifest = json.loads(data.decode(), parse_constant=str)
        # Only an escape can stand for a lone surrogate.
        if b"\\u" in data:
            manifest = json.loads(well_formed(json.dumps(manifest, ensure_ascii=False)))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({in_one_line(error)})") from None
    except OSError as error:
        raise InputError(f"{path}: {reason_of(error)}") from None
    if not isinstance(manifest, dict):
        raise InputError(f"{path}: expected an object, found {reprlib.repr(manifest)}; not the manifest of a trace")
    if manifest.get("schema_version") is None:
        state = "is null" if "schema_version" in manifest else "is missing"
        raise InputError(f"{path}: schema_version {state}; not the manifest of a trace")
    check_version(f"{path}: schema_version", manifest["schema_version"])
    if FORMER in manifest:
        manifest[IMPORTED] = manifest.pop(FORMER)
    check_kinds(str(path), manifest)
    TokenSampling.of(manifest, str(path))
    for table, files in (manifest.get("files") or {}).items():
        if not isinstance(files, dict):
            raise InputError(
                f"{path}: files.{table} is {reprlib.repr(files)}, expected a table of files and their rows"
            )
    if not digests.is_intact(run_dir, MANIFEST, data):
        raise InputError(f"{path}: {digests.DIFFERS}; restore it")
    return manifest


def check_kinds(place: str, manifest: Mapping[str, Any]) -> None:
    """Raise ``InputError`` if a key that readers use has the wrong type.

    The error names ``place``.
    """
    for key, kinds in KINDS.items():
        value = manifest.get(key)
        if not isinstance(value, kinds) or (isinstance(value, int) and not -(2**31) <= value < 2**31):
            raise InputError(f"{place}: {key} is {reprlib.repr(value)}, expected {KIND_NAMES[kinds]}")


def check_run_id(place: str, run_id: Any) -> None:
    """Raise ``InputError`` if ``run_id`` is not text that names a run.

    The error names ``place``.
    """
    if not isinstance(run_id, str) or not run_id.strip():
        raise InputError(f"{place}: run_id is {reprlib.repr(run_id)}, expected text that names the run")


def to_json(place: str, values: Mapping[str, Any]) -> str:
    """Return a manifest as JSON.

    Raises:
        InputError: JSON cannot hold a value; the error names ``place`` and the key.
    """
    try:
        return json.dumps(values, indent=2, sort_keys=True, allow_nan=False)
    except RecursionError:
        raise InputError(f"{place}: nested too deeply for JSON") from None
    except (TypeError, ValueError) as error:
        raise InputError(f"{place}: {next(_not_json(values), in_one_line(error))}") from None


def _not_json(value: Any, path: str = "", outer: tuple[Any, ...] = ()) -> Iterator[str]:
    """Yield what JSON cannot hold, by dotted key."""
    if any(value is other for other in outer):
        yield f"{path} holds itself, which JSON cannot; leave it out"
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _not_json(item, f"{path}.{key}" if path else str(key), (*outer, value))
        for key in value:
            if not isinstance(key, str):
                yield f"key {reprlib.repr(key)}{f' of {path}' if path else ''} is not text; write it as text"
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _not_json(item, f"{path}[{i}]", (*outer, value))
    elif isinstance(value, float):
        if not math.isfinite(value):
            yield f"{path} is {value}, which JSON cannot hold; leave it out, or write it as text"
    elif not isinstance(value, str | int | None):
        yield f"{path} is of type {type(value).__name__}, which JSON cannot hold; write it as text or a number"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings, such as ``config``, by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def now() -> str:
    """Return the current UTC time in ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def describe_machine() -> dict[str, Any]:
    """Return hardware, library versions, and git commit, without importing torch.

    Packages that are not installed are left out; an unknown commit is None.
    """
    return {
        "hardware": {"machine": platform.machine(), "cpu": _cpu_name(), "cores": count_cores()},
        "versions": {"python": platform.python_version(), **_package_versions()},
        "git_commit": _git_commit(),
    }


def count_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _package_versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
