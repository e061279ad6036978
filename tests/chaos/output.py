"""Test closed pipes, exhausted memory, and full disks under two commands.

The commands are ``entrace sql`` and ``entrace report``.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from functools import cache, partial
from pathlib import Path

import numpy as np

from entrace.analysis.terminal.export import FORMATS

from .commands import Ended, draw_few_figures
from .scene import contents, differences
from .trial import Fault, Outcome, Trial, require

# Output without end, for a reader that stops early.
ENDLESS = "select i, md5(i::varchar) as x, i / 7 as y from range(1000000000) as t(i)"
# A command that nobody reads from must end within this time, which includes the start of a process.
PROMPT_S = 30.0
ADDED_MIB = 300
CHUNK = 1 << 16
# Answers that take much memory, by what needs it; each query returns the same bytes every time.
QUERIES: dict[str, str] = {
    "sort": "select md5(i::varchar) as x from range({rows}) as t(i) order by x",
    "window": (
        "select sum(length(x) + r) as s from "
        "(select repeat(md5(i::varchar), 20) as x, row_number() over (order by x) as r from range({rows}) as t(i))"
    ),
    "groups": "select count(*) as n, max(m) as m from (select md5(i::varchar) as x, max(i) as m from range({rows}) as "
    "t(i) group by x)",
    "distinct": "select count(distinct repeat(md5(i::varchar), 3)) as n from range({rows}) as t(i)",
    "list": "select len(list(i)) as n from range({rows}) as t(i)",
    "text": "select length(string_agg(repeat(md5(i::varchar), 10), '')) as n from range({rows}) as t(i)",
    "median": "select median(i * 7919 % 104729) as m from range({rows}) as t(i)",
    "join": (
        "with t as (select md5(i::varchar) as x from range({rows}) as t(i)) "
        "select count(*) as n from t as a join t as b on a.x = b.x"
    ),
    "doubling": (
        "with recursive t(i, s) as (select 1, 'x' union all select i + 1, s || s from t where i < {exponent}) "
        "select max(length(s)) as n from t"
    ),
    "wide row": "select repeat('x', {rows} * 100) as x",
    "tokens": "select a.token_id as i, count(*) as n, max(b.entropy) as m from tokens as a, tokens as b group by 1 "
    "order by 1",
}


class Pipes(Fault):
    """Close a pipe after some bytes, as ``head -c`` does."""

    name = "closed pipe"
    number = 100

    @cache  # noqa: B019 - one object per process
    def _beginning(self, form: str) -> bytes:
        """Return the first bytes of the output, from a reader that does not stop early."""
        with self.scene.place(f"pipe/{form}") as place:
            _, data = self._read(place, form, 1 << 21)
        return data

    def attempt(self, index: int, rng: np.random.Generator) -> Trial:
        """Read so many bytes of an endless output."""
        form = FORMATS[index % len(FORMATS)]
        size = int(2 ** rng.uniform(0, 21)) - 1
        expected = self._beginning(form) if form in ("csv", "json") else None
        with self.scene.place(f"pipe/{index}") as place:
            ended, data = self._read(place, form, size)
        require(ended.code == 0, f"exit code {ended.code}: {ended.last_line}")
        require(not ended.lines, f"said: {ended.last_line}")
        require(ended.seconds < PROMPT_S, f"ended after {ended.seconds:.1f} s")
        require(ended.peak_mib < ADDED_MIB, f"took {ended.peak_mib:.0f} MiB")
        require(expected is None or expected.startswith(data), "other bytes than before", Outcome.SILENT)
        return self.survived(index, form=form, size=size)

    def _read(self, place: Path, form: str, size: int) -> tuple[Ended, bytes]:
        pipe = place / "pipe"
        os.mkfifo(pipe)
        descriptor = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        os.set_blocking(descriptor, True)
        # A table is printed at its end, which never comes; its reader leaves at once.
        size = 0 if form == "table" else size
        with os.fdopen(descriptor, "rb", buffering=0) as reader:
            started = self.scene.start(
                "sql", self.scene.trace, ENDLESS, "--format", form, log=place / "log.txt", out=pipe
            )
            data = b""
            while len(data) < size and (more := reader.read(min(CHUNK, size - len(data)))):
                data += more
        return started.end(), data


class Memory(Fault):
    """Ask a query with little memory."""

    name = "exhausted memory"
    number = 80

    @cache  # noqa: B019 - one object per process
    def _answer(self, query: str) -> bytes:
        """Return the answer of a query that has enough memory."""
        with self.scene.place("memory/answer") as place:
            ended, data = self._ask(place, query, "8GiB")
        require(ended.code == 0, f"with enough memory: {ended.last_line}")
        return data

    def attempt(self, index: int, rng: np.random.Generator) -> Trial:
        """Ask a query with a random limit."""
        name = list(QUERIES)[index % len(QUERIES)]
        # Few sizes, so that answers are computed once.
        rows = int(rng.choice([200_000, 1_000_000]))
        query = QUERIES[name].format(rows=rows, exponent=20 if rows < 500_000 else 27)
        memory = f"{int(2 ** rng.uniform(6, 8.5))}MiB"
        with self.scene.place(f"memory/{index}") as place:
            ended, data = self._ask(place, query, memory)
        ended.require_one_line()
        if ended.code:
            require("memory" in ended.last_line, f"not about memory: {ended.last_line}")
            return self.refused(index, ended.last_line, query=name)
        require(data == self._answer(query), f"{name}: another answer with {memory}", Outcome.SILENT)
        return self.survived(index, query=name, memory=memory)

    def _ask(self, place: Path, query: str, memory: str) -> tuple[Ended, bytes]:
        words = ["sql", self.scene.trace, query, "--format", "csv", "--memory", memory]
        ended = self.scene.start(*words, log=place / "log.txt", out=place / "rows.csv").end()
        return ended, (place / "rows.csv").read_bytes()


class Disks(Fault):
    """Export, or write a report, on a full disk."""

    name = "full disk"
    number = 40

    def attempt(self, index: int, rng: np.random.Generator) -> Trial:
        """Export to a full device, or write a report where there is too little room."""
        if index % 2 or not can_mount():
            return self._export(index)
        whole, _ = self.scene.report
        with self.scene.place(f"disk/{index}") as place:
            size = int(rng.uniform(0.02, 1.1) * sum(map(len, whole.values()))) >> 12
            (place / "disk").mkdir()
            out, left_over = place / "disk" / "out", place / "left"
            ended = self.scene.start(
                *("report", self.scene.trace, "--out", out),
                log=place / "log.txt",
                prepare=partial(draw_on_small_disk, place / "disk", size << 12),
                finish=partial(copy_what_is_left, out, left_over),
            ).end()
            left, hidden = contents(left_over), [path.name for path in left_over.rglob(".*")]
        ended.require_one_line()
        if ended.code == 0:
            require(left == whole, f"finished, but {differences(left, whole)} differ", Outcome.SILENT)
            return self.survived(index)
        require("no space left on device; free some space" in ended.last_line, ended.last_line)
        require(not left and not hidden, f"left files behind: {', '.join([*left, *hidden])}")
        return self.refused(index, ended.last_line)

    def _export(self, index: int) -> Trial:
        form = FORMATS[index // 2 % len(FORMATS)]
        query = "select * from tokens, range(20)" if index % 4 == 1 else "select * from tokens limit 3"
        with self.scene.place(f"disk/{index}") as place:
            words = ["sql", self.scene.trace, query, "--format", form]
            ended = self.scene.start(*words, log=place / "log.txt", out=Path("/dev/full")).end()
        ended.require_one_line()
        require(ended.code == 1, f"exit code {ended.code}: {ended.last_line}", Outcome.SILENT)
        require("no space left on device" in ended.last_line.lower(), ended.last_line)
        return self.refused(index, ended.last_line, form=form)


@cache
def can_mount() -> bool:
    """Return whether a process may mount a file system that no other one sees."""
    probe = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return shutil.which("unshare") is not None and subprocess.run(probe, capture_output=True).returncode == 0


def draw_on_small_disk(folder: Path, size: int) -> None:
    """Mount a disk of ``size`` bytes that only this process sees.

    The report is limited to one figure.
    """
    new_namespace = 0x20000
    if ctypes.CDLL(None, use_errno=True).unshare(new_namespace):
        raise OSError(ctypes.get_errno(), "unshare")
    # A mount in this namespace must not reach the others.
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    draw_few_figures()


def copy_what_is_left(out: Path, left: Path) -> None:
    """Copy the files of ``out``, which is on a disk that ends with this process."""
    if out.exists():
        shutil.copytree(out, left)
