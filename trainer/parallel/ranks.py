"""Train one policy in several processes, one per device.

``accelerate launch`` starts them. Every process holds the whole batch of small tensors (tokens, log-probabilities,
rewards). Advantages, shaping, dynamic sampling, and mini-batches are therefore computed over the whole batch, by the
code that a single process runs. The expensive work is divided: each response is sampled and scored by one process, and
its forward and backward pass is run by one process, with the denominators of the whole mini-batch. Gradients are
summed, not averaged.

All communication except gradients and weights goes through ``Ranks.all_gather_object``. A process that fails sends its
error in its next call, so that all processes stop at the same point with the same error.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

# Seconds that a process waits for the others after SIGTERM; launchers kill after 30.
GRACE_S = 15
LOST = "another process of the run has ended"


class LostProcessError(RuntimeError):
    """Another process of the run ended without sending an error."""


@dataclass(frozen=True)
class _Failure:
    """Carry a failed process's error in place of its ``all_gather_object`` argument."""

    error: BaseException

    @classmethod
    def of(cls, error: BaseException) -> _Failure:
        """Wrap the error, or its type and message if it cannot be pickled."""
        try:
            return pickle.loads(pickle.dumps(cls(error)))
        except Exception:
            return cls(RuntimeError(f"{type(error).__name__}: {error}"))


@dataclass
class Ranks:
    """Communicate with the other processes of a run.

    With one process, every exchange is the identity.

    Attributes:
        rank: Rank of this process, from 0. Rank 0 writes shared files and all messages.
        size: Number of processes.
        is_sharded: The launcher asks for sharded weights (FSDP).
    """

    rank: int = 0
    size: int = 1
    is_sharded: bool = False
    _group: Any = field(default=None, repr=False)
    _is_told_to_stop: bool = False
    _is_broken: bool = False
    # Error of another process, raised in this one.
    _received: BaseException | None = None

    @classmethod
    @contextmanager
    def join(cls) -> Iterator[Ranks]:
        """Join the processes launched with this one, for the duration of the block.

        Without others, the block runs alone.
        """
        if not was_launched():
            yield cls()
            return
        import torch
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available())
        distributed = torch.distributed
        is_sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")
        ranks = cls(state.process_index, state.num_processes, is_sharded)
        # Gloo, whichever backend reduces gradients: it reports a lost process at once.
        ranks._group = distributed.new_group(backend="gloo")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, ranks._note_signal)
        signal.signal(signal.SIGALRM, ranks._give_up)
        yield ranks
        # Its threads must end before the interpreter does; releasing a tensor later would abort the process.
        ranks._group = None
        distributed.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Return whether this process writes shared files and messages."""
        return self.rank == 0

    def all_gather_object(self, value: T) -> list[T]:
        """Return the values of all processes in order of rank, once all have called.

        Raises:
            LostProcessError: a process has ended.
            Exception: a process has failed; its error is raised in all.
            KeyboardInterrupt: a process received SIGINT or SIGTERM.
        """
        if self.size == 1:
            return [value]
        stop, self._is_told_to_stop = self._is_told_to_stop, False
        found = self._exchange(_Failure(KeyboardInterrupt()) if stop else value)
        for answer in found:
            if isinstance(answer, _Failure):
                self._received = answer.error
                raise answer.error
        return found

    def broadcast(self, function: Callable[[], T]) -> T:
        """Call ``function`` in rank 0 only, and return its result in all processes."""
        answers: list[Any] = self.all_gather_object(function() if self.is_main else None)
        return answers[0]

    def barrier(self) -> None:
        """Wait for all processes; raises as ``all_gather_object`` does."""
        self.all_gather_object(None)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block in rank 0 first, then in the others."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    @contextmanager
    def together(self, *, in_step: bool = False) -> Iterator[None]:
        """Send an error raised in the block to all processes.

        The others raise it in their next ``all_gather_object``.

        Args:
            in_step: The others may be waiting for this process's shard of a weight and cannot receive the error. This
                process then ends alone, and the launcher ends the others.

        Raises:
            LostProcessError: another process ended while this one waited for it.
        """
        try:
            yield
        except Exception as error:
            if self.size > 1 and error is not self._received:
                if in_step:
                    self._break_off()
                else:
                    with suppress(LostProcessError):
                        self._exchange(_Failure.of(error))
            if in_step and _is_of_network(error):
                raise LostProcessError(LOST) from error
            raise

    def shard(self, count: int) -> slice:
        """Return this process's slice of ``count`` items; slices are in order of rank."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def all_reduce(self, tensors: Iterable[Tensor]) -> None:
        """Replace every tensor by its sum over all processes, bit-equal in all of them."""
        if self.size == 1:
            return
        import torch.distributed as distributed

        pending: list[Any] = [
            distributed.all_reduce(tensor, group=self._group if tensor.device.type == "cpu" else None, async_op=True)
            for tensor in tensors
        ]
        for work in pending:
            work.wait()

    def _exchange(self, value: Any) -> list[Any]:
        import torch.distributed as distributed

        found: list[Any] = [None] * self.size
        try:
            if self._is_broken:
                raise RuntimeError("a process was lost before")
            distributed.all_gather_object(found, value, group=self._group)
        except RuntimeError as error:
            self._break_off()
            raise LostProcessError(LOST) from error
        return found

    def _note_signal(self, *_: Any) -> None:
        # Raising during an exchange would leave the others waiting; the next exchange reports the signal.
        self._is_told_to_stop = True
        signal.alarm(GRACE_S)

    def _give_up(self, *_: Any) -> None:
        self._break_off()
        raise KeyboardInterrupt

    def _break_off(self) -> None:
        """Stop all communication.

        Among the remaining processes, the first to call this writes messages.
        """
        if self._is_broken:
            return
        self._is_broken = True
        import torch.distributed as distributed

        is_first = True
        # The launcher hosts the counter and outlives its processes, unless it was killed too.
        with suppress(RuntimeError):
            is_first = distributed.distributed_c10d._get_default_store().add("speakers", 1) == 1
        if is_first:
            sys.stderr = sys.__stderr__
        else:
            _silence()


ALONE = Ranks()


def _is_of_network(error: Exception) -> bool:
    import torch.distributed as distributed

    # Gloo has no error type of its own.
    return isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def was_launched() -> bool:
    """Return True if a launcher started this process together with others.

    One such launcher is ``accelerate launch``.
    """
    return "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def prepare() -> None:
    """Silence all ranks except 0, which reports bad arguments.

    Call this before ``Ranks.join``. Rank 0 ignores SIGTERM, which the launcher sends as soon as another rank exits.
    """
    if int(os.environ["RANK"]):
        _silence()
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _silence() -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
