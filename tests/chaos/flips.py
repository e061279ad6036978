"""Damage one file of a small trained run, and check whether readers notice.

Each trial has one damage. Five of six trials flip one bit, and one of six zeroes a block of 4 KiB. Three of five flips
draw any file with equal probability. The other flips, and every zeroed block, draw a Parquet file in proportion to its
size. The run is then opened with and without verification, and all its tables are read by SQL. An outcome is
``detected`` (an error, or a note on the run), ``harmless`` (all answers are those of the intact run), ``unread`` (a
checkpoint, which no table reads), or ``silent`` (another answer).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

import entrace
from entrace.analysis.trace import TABLES, InputError
from entrace.analysis.trace.digests import DIGESTS, END_BYTES
from entrace.analysis.trace.verify import CHECKPOINTS, CHECKSUMS, list_files, verify_run

from .trial import Fault, Outcome, Trial
from .verify import equal

BLOCK_BYTES = 4096
BLOCK_EVERY = 6
DETECTED, HARMLESS, UNREAD, SILENT = "detected", "harmless", "unread", "silent"
# Without and with verification.
MODES = ("default", "verified")
# Opening reads all of a file of up to END_BYTES, and only the footer of a larger one.
PAGES, FOOTER, SMALL, OTHER = "pages of a large file", "footer of a large file", "small Parquet file", "other file"
CONFIG = [
    "steps=6",
    "task.num_heldout=8",
    "eval.samples=2",
    "eval.every=3",
    "record.flush_every=3",
    "record.checkpoint_every=3",
    "record.after_update_every=3",
]
INTERVENTION_TOKENS = 20_000


class Damage(NamedTuple):
    """Describe a change of one file.

    ``offset`` is that of the block, or of the byte whose ``bit`` is flipped.
    """

    file: str
    offset: int
    bit: int | None

    @classmethod
    def draw(cls, trace: Path, index: int, seed: int) -> Damage:
        """Draw the damage of a trial; a block that already holds zeros is drawn again."""
        rng = np.random.default_rng([seed, index])
        names = list_files(trace)
        sizes = np.array([(trace / name).stat().st_size * name.endswith(".parquet") for name in names], float)
        weights = sizes / sizes.sum() if index % 2 else None
        while True:
            name = names[rng.choice(len(names), p=weights)]
            offset = int(rng.integers((trace / name).stat().st_size))
            if index % BLOCK_EVERY < BLOCK_EVERY - 1:
                return cls(name, offset, int(rng.integers(8)))
            damage = cls(name, offset // BLOCK_BYTES * BLOCK_BYTES, None)
            data = (trace / name).read_bytes()
            if damage.apply_to(data) != data:
                return damage

    def apply_to(self, data: bytes) -> bytes:
        """Return the damaged content of the file."""
        if self.bit is None:
            zeros = bytes(min(BLOCK_BYTES, len(data) - self.offset))
            return data[: self.offset] + zeros + data[self.offset + len(zeros) :]
        changed = bytearray(data)
        changed[self.offset] ^= 1 << self.bit
        return bytes(changed)

    def place(self, data: bytes) -> str:
        """Return which part of the file is damaged, given its intact content."""
        if not self.file.endswith(".parquet"):
            return OTHER
        if len(data) <= END_BYTES:
            return SMALL
        footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
        end = self.offset + (BLOCK_BYTES if self.bit is None else 1)
        return FOOTER if end > footer else PAGES


class Answers(NamedTuple):
    """Hold the manifest of a run, and rows and summaries of its tables."""

    manifest: dict[str, Any]
    frames: list[pl.DataFrame]

    @classmethod
    def of(cls, runs: entrace.Runs) -> Answers:
        """Ask for all of it, in this process, which saves starting another one per trial."""
        [manifest] = ({**values, "path": None} for values in runs.manifests.values())
        frames = []
        for table in TABLES.values():
            plain = [column.name for column in table.columns if not pa.types.is_list(column.type)]
            # DuckDB answers these from the statistics in the footers, where it can.
            bounds = ", ".join(f"min({name}), max({name})" for name in plain)
            frames += [
                runs.run_shipped(f"select * from {table.name}"),
                runs.run_shipped(f"select count(*), {bounds} from {table.name}"),
            ]
        return cls(manifest, frames)

    def are_those_of(self, other: Answers) -> bool:
        """Return whether both runs answer alike, floats to the bit."""
        return self.manifest == other.manifest and all(map(equal, self.frames, other.frames))


def make_trace(folder: Path) -> Path:
    """Train a small run with checkpoints and interventions, and return its path.

    The run is inside ``folder``.
    """
    from entrace.trainer.config import load_config
    from entrace.trainer.interventions.intervene import Settings, intervene, resolve_checkpoint
    from entrace.trainer.train import train

    run_dir = folder / "run"
    train(load_config("tiny", CONFIG), run_dir, {"study": "flips", "arm": "none"})
    intervene(run_dir, Settings(resolve_checkpoint(run_dir, None), continuations=2), INTERVENTION_TOKENS)
    return run_dir


@cache
def answers_of(trace: Path) -> Answers:
    """Return the answers of the intact run."""
    if faults := verify_run(trace).faults:
        raise AssertionError(f"the intact run: {'; '.join(map(str, faults))}")
    return Answers.of(entrace.open_runs(trace))


class Found(NamedTuple):
    """Describe what readers noticed of some damage.

    Attributes:
        damage: What was changed.
        place: Part of the file that was changed.
        default: Outcome without verification.
        verified: Outcome with verification.
        messages: Errors and notes by mode.
        is_named: Whether every message names the damaged file, or the file with its digest or checksum.
    """

    damage: Damage
    place: str
    default: str
    verified: str
    messages: dict[str, str]
    is_named: bool

    @property
    def is_failure(self) -> bool:
        """Return True if the reader failed.

        A failure is silent damage that had to be detected, or an error that does not name the file.
        """
        is_avoidable = self.default == SILENT and self.place != PAGES
        return self.verified == SILENT or is_avoidable or not self.is_named


def run_trial(trace: Path, index: int, seed: int) -> Found:
    """Damage a copy of ``trace`` once, and read it with and without verification.

    Args:
        trace: An intact run, which is left as it is.
        index: Number of the trial; with ``seed``, it determines the damage.
        seed: Seed of all trials.
    """
    damage = Damage.draw(trace, index, seed)
    intact = (trace / damage.file).read_bytes()
    with tempfile.TemporaryDirectory(dir=trace.parent) as folder:
        # Links cost nothing; the damaged file is the only copy.
        run_dir = Path(shutil.copytree(trace, Path(folder, trace.name), copy_function=os.link))
        path = run_dir / damage.file
        path.unlink()
        path.write_bytes(damage.apply_to(intact))
        outcomes = {mode: _read(trace, run_dir, damage, verify=mode == "verified") for mode in MODES}
    messages = {mode: message for mode, (_, message) in outcomes.items() if message}
    is_named = all(str(path) in m or DIGESTS in m or CHECKSUMS in m for m in messages.values())
    default, verified = (outcomes[mode][0] for mode in MODES)
    return Found(damage, damage.place(intact), default, verified, messages, is_named)


def _read(trace: Path, run_dir: Path, damage: Damage, verify: bool) -> tuple[str, str | None]:
    """Return the outcome, and the error or note."""
    path = run_dir / damage.file
    try:
        runs = entrace.open_runs(run_dir, verify=verify)
        answers = Answers.of(runs)
    except InputError as error:
        return DETECTED, str(error)
    notes = "; ".join(runs.notes.values())
    if DIGESTS in notes:
        return DETECTED, notes
    if not answers.are_those_of(answers_of(trace)):
        return SILENT, None
    if not damage.file.startswith(CHECKPOINTS):
        return HARMLESS, None
    if not verify:
        return UNREAD, None
    # White space between the checksums may differ.
    is_equal = path.name == CHECKSUMS and json.loads(path.read_text()) == json.loads((trace / damage.file).read_text())
    return (HARMLESS if is_equal else SILENT), None


class Damaged(Fault):
    """Flip a bit or zero a block, and read the run with and without verification."""

    is_block: ClassVar[bool]

    def attempt(self, index: int, rng: np.random.Generator) -> Trial:
        """Damage one file."""
        # Of six indices, the last is a block.
        number = BLOCK_EVERY * index + BLOCK_EVERY - 1 if self.is_block else index + index // (BLOCK_EVERY - 1)
        found = run_trial(self.scene.flip_trace, number, self.scene.seed)
        outcomes = {"place": found.place, "default": found.default, "verified": found.verified}
        detail = {**found.damage._asdict(), **outcomes}
        message = next(iter(found.messages.values()), "")
        if found.is_failure:
            return Trial(self.name, index, Outcome.SILENT, message or "another answer, and no line", detail)
        if found.verified == DETECTED:
            return self.refused(index, message, **detail)
        return self.survived(index, **detail)


class Flips(Damaged):
    """Flip one bit."""

    name = "flipped bit"
    number = 1000
    is_block = False


class Blocks(Damaged):
    """Zero one block."""

    name = "zeroed block"
    number = 200
    is_block = True


def tally_places(trials: Sequence[Trial]) -> dict[str, dict[str, int]]:
    """Count the outcomes of damage by kind, place, and mode.

    The mode is opening with or without verification.
    """
    counts: dict[str, Counter[str]] = {}
    for trial in trials:
        for mode in MODES if trial.detail else ():
            key = f"{trial.kind}, {trial.detail['place']}, {mode}"
            counts.setdefault(key, Counter())[trial.detail[mode]] += 1
    return {key: dict(count) for key, count in sorted(counts.items())}


def describe_default(damage: dict[str, dict[str, int]]) -> str:
    """Describe in one line how often missing verification changed an answer.

    Only damage that verification notices counts.
    """
    counts = [count for key, count in damage.items() if key.endswith(f", {PAGES}, default")]
    silent, tried = sum(count.get(SILENT, 0) for count in counts), sum(sum(count.values()) for count in counts)
    changes = f"{silent:,} of {tried:,} changes within data pages of larger files"
    return f"Without verification, {changes} silently changed an answer."
