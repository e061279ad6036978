"""Train a run that may be killed at any moment, and report how far it got.

The process kills itself or is killed from outside. File-system events are counted as Python sees them: opens, renames,
removals, folders, syncs, and each write of a buffer to a file. Libraries that write past it count as one write per
file.
"""

from __future__ import annotations

import builtins
import functools
import io
import os
import pkgutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

from entrace.analysis.trace.parts import PENDING

# A small run in which everything happens that a resume has to restore: steps are flushed, checkpointed, evaluated and
# captured at different intervals, an old checkpoint is removed, groups are refilled, the loss draws random numbers, one
# shaping draws some until step 5, and another one starts at the plateau, which this seed reaches at step 7.
CONFIG = [
    "seed=3",
    "steps=9",
    "task.num_heldout=4",
    "rollout.prompts_per_step=4",
    "rollout.group_size=4",
    "rollout.max_response_tokens=32",
    "rollout.max_refills=1",
    "shaping.method=ppl_permuted+position",
    "shaping.ppl={alpha=0.5,end_step=5}",
    "shaping.plateau={window_steps=2,tolerance=1.0}",
    "loss.method=clip_cov",
    "loss.clip_cov={frac=0.1,low=0.0,high=5.0}",
    "optim.lr=1e-3",
    "optim.mini_batches=2",
    "eval.samples=2",
    "eval.every=3",
    "record.flush_every=2",
    "record.after_update_every=3",
    "record.checkpoint_every=4",
]
LABELS = {"study": "chaos", "arm": "ppl_permuted+position"}

START = "start-up"
FLUSH = "flush"
# Whichever of these functions was entered last names the place.
PLACES = {
    "entrace.trainer.train:collect_batch": "sampling",
    "entrace.trainer.train:shape": "shaping",
    "entrace.trainer.learner:Learner.update": "update",
    "entrace.trainer.learner:Learner.capture": "capture",
    "entrace.trainer.train:record_batch": "recording",
    "entrace.trainer.train:evaluate": "evaluation",
    "entrace.trainer.train:save_checkpoint": "checkpoint",
    "entrace.trainer.runs.recording:find_intact": "resume",
    "entrace.trainer.runs.recording:load_checkpoint": "resume",
    "entrace.analysis.trace.writer:TraceWriter.resume": "resume",
    "entrace.trainer.runs.recording:remove_unfinished": "resume clean-up",
    "entrace.trainer.runs.recording:remove_superseded": "resume clean-up",
    "entrace.analysis.trace.writer:remove_leftovers": "resume clean-up",
    "entrace.analysis.trace.writer:TraceWriter.flush": FLUSH,
    "entrace.analysis.trace.writer:write_manifest": "manifest",
}
# Writes a file without Python seeing it.
NATIVE_WRITER = "safetensors.torch:serialize_file"
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree"}


class Board(NamedTuple):
    """Share memory with the parent, which can read it after the victim is gone."""

    place: Any
    num_events: Any

    @classmethod
    def of(cls, context: Any) -> Board:
        """Return a board for processes of a multiprocessing context."""
        return cls(context.RawArray("c", 64), context.RawValue("l", 0))


def run(
    run_dir: Path,
    log: Path,
    board: Board,
    kill_at: int | None,
    is_torn: bool,
    prepare: Callable[[], None] | None = None,
) -> None:
    """Train or resume the run in ``run_dir``; the process target.

    Args:
        run_dir: Folder of the trace.
        log: What the process prints.
        board: Where the process is.
        kill_at: Number of the file-system event, from 1, at which the process kills itself; None for never.
        is_torn: A write is killed after half of it, not before it.
        prepare: Called in the process before it trains.
    """
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    from entrace.trainer.config import load_config
    from entrace.trainer.runs.run_folder import run_lock
    from entrace.trainer.train import train

    torch.set_num_threads(1)
    config = load_config("tiny", CONFIG)
    if prepare:
        prepare()
    Watch(run_dir, board, kill_at, is_torn).install()
    # As the command does.
    with run_lock(run_dir, waits=False):
        train(config, run_dir, LABELS, resume=True)


class Watch:
    """Count what happens to the files below a folder, keep the place, and kill."""

    def __init__(self, folder: Path, board: Board, kill_at: int | None, is_torn: bool) -> None:
        """Store what to watch, and when to kill; see ``run``."""
        self.folder = f"{folder}{os.sep}"
        self.board, self.kill_at, self.is_torn = board, kill_at, is_torn

    def install(self) -> None:
        """Watch this process from now on."""
        for name, place in PLACES.items():
            self._wrap(name, functools.partial(self._enter, place))
        self._wrap(NATIVE_WRITER, self._write_natively)
        self._wrap("os:fsync", self._sync)
        self._open = io.open
        io.open = builtins.open = self._open_watched
        sys.addaudithook(self._audit)
        self.board.place.value = START.encode()

    def is_due(self, path: Any) -> bool:
        """Count an event at a path; return whether it is the one to be killed at."""
        if not self._is_inside(path):
            return False
        if self.board.place.value.decode().split()[0] == FLUSH:
            table, *names = f"{path}{os.sep}".removeprefix(self.folder).split(os.sep)
            if table == PENDING:
                table = names[0].lstrip(".").partition(".")[0]
            self.board.place.value = f"{FLUSH} of {table or 'folder'}".encode()
        self.board.num_events.value += 1
        return self.board.num_events.value == self.kill_at

    def say_torn(self) -> None:
        """Add to the place that a write was cut short."""
        self.board.place.value += b", inside a write"

    def _is_inside(self, path: Any) -> bool:
        return isinstance(path, str | Path) and f"{path}{os.sep}".startswith(self.folder)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in FILE_EVENTS:
            return
        path = arguments[0]
        if event in ("os.remove", "os.rmdir") and arguments[1] != -1:
            # How shutil.rmtree names what it removes: relative to an open folder.
            path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), path)
        if self.is_due(path):
            kill()

    def _enter(self, place: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before, self.board.place.value = self.board.place.value, place.encode()
        try:
            return function(*args, **kwargs)
        finally:
            self.board.place.value = before

    def _sync(self, function: Callable[[int], None], descriptor: int) -> None:
        if self.is_due(os.readlink(f"/proc/self/fd/{descriptor}")):
            kill()
        function(descriptor)

    def _write_natively(self, function: Callable[..., Any], tensors: Any, path: Any, **kwargs: Any) -> None:
        is_due = self.is_due(path)
        if is_due and not self.is_torn:
            kill()
        function(tensors, path, **kwargs)
        if is_due:
            os.truncate(path, os.path.getsize(path) // 2)
            self.say_torn()
            kill()

    def _open_watched(self, file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> IO[Any]:
        if not self._is_inside(file) or not set(mode) & set("wax"):
            return self._open(file, mode, buffering, *args, **kwargs)
        binary = io.BufferedWriter(WatchedFile(self, file, mode.replace("b", "").replace("t", "")))
        return binary if "b" in mode else io.TextIOWrapper(binary, *args, **kwargs)

    def _wrap(self, name: str, wrapper: Callable[..., Any]) -> None:
        """Replace a function by ``wrapper(function, ...)``."""
        owner, _, attribute = name.replace(":", ".").rpartition(".")
        function = pkgutil.resolve_name(name)

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return wrapper(function, *args, **kwargs)

        setattr(pkgutil.resolve_name(owner), attribute, wrapped)


class WatchedFile(io.FileIO):
    """Count every write of a file to the system as an event."""

    def __init__(self, watch: Watch, path: Any, mode: str) -> None:
        """Open ``path``, which is an event of its own."""
        super().__init__(path, mode)
        self.watch = watch

    def write(self, data: Any) -> int:
        """Write, unless the process is killed before, or after half of it."""
        if self.watch.is_due(self.name):
            if self.watch.is_torn:
                super().write(memoryview(data)[: len(data) // 2])
                self.watch.say_torn()
            kill()
        return super().write(data)


def kill() -> None:
    """End this process as the system does when it runs out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)
