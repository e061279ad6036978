"""Several processes that train one policy together, as ``accelerate launch`` starts them, one a device.

Every process holds the whole batch of small tensors (tokens, log-probabilities, rewards), so that advantages, shaping,
dynamic sampling and mini-batches are worked out over all of it by the code that a single process runs. What takes time
is dealt out: responses are sampled and scored by one process each, and so is every row's forward and backward pass,
with denominators of the whole mini-batch; gradients are added up, not averaged.

Whatever the processes tell one another goes through ``Ranks.gather``, and a process that fails takes part in the next
one with its error: all of them leave the work at the same place, with the same error.
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

# Of a process that was told to end and hears nothing from the others; launchers kill after 30.
GRACE_S = 15
LOST = "another process of the run has ended"


class LostProcessError(RuntimeError):
    """Another process of the run has ended without a word."""


@dataclass(frozen=True)
class _Failure:
    """Takes the place of what a process that failed would have passed to ``all_gather_object``."""

    error: BaseException

    @classmethod
    def of(cls, error: BaseException) -> _Failure:
        """Holds the error itself, or what it says where it cannot be sent."""
        try:
            return pickle.loads(pickle.dumps(cls(error)))
        except Exception:
            return cls(RuntimeError(f"{type(error).__name__}: {error}"))


@dataclass
class Ranks:
    """The processes of a run, seen from one of them; alone, every exchange is the identity.

    Attributes:
        rank: Of this process, from 0. Rank 0 writes what there is one of, and speaks.
        size: Number of processes.
        is_sharded: Weights shall be shared out to them, as the launcher was told (FSDP).
    """

    rank: int = 0
    size: int = 1
    is_sharded: bool = False
    _group: Any = field(default=None, repr=False)
    _is_told_to_stop: bool = False
    _is_broken: bool = False
    # The error of another process that was raised here.
    _heard: BaseException | None = None

    @classmethod
    @contextmanager
    def join(cls) -> Iterator[Ranks]:
        """The processes that were launched with this one, which meet here; this one alone if there are no others."""
        if not was_launched():
            yield cls()
            return
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())
        distributed = torch.distributed
        # Over the network of the CPUs, whatever gradients go over: a process that dies is noticed there at once.
        is_sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")
        ranks = cls(distributed.get_rank(), distributed.get_world_size(), is_sharded)
        ranks._group = distributed.new_group(backend="gloo")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, ranks._note_signal)
        signal.signal(signal.SIGALRM, ranks._give_up)
        yield ranks
        # Its threads may not outlive the interpreter: to let go of a tensor then would abort the process.
        ranks._group = None
        distributed.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def all_gather_object(self, value: T) -> list[T]:
        """What every process passes, in order of rank, once all have called.

        Raises:
            LostProcessError: one of them has ended.
            Exception: one of them has failed, with that.
            KeyboardInterrupt: one of them was told to end.
        """
        if self.size == 1:
            return [value]
        stop, self._is_told_to_stop = self._is_told_to_stop, False
        found = self._exchange(_Failure(KeyboardInterrupt()) if stop else value)
        for answer in found:
            if isinstance(answer, _Failure):
                self._heard = answer.error
                raise answer.error
        return found

    def broadcast(self, function: Callable[[], T]) -> T:
        """What rank 0 gets from ``function``, for all; the others do not call it."""
        answers: list[Any] = self.all_gather_object(function() if self.is_main else None)
        return answers[0]

    def barrier(self) -> None:
        """Returns once all processes are here, and none has failed."""
        self.all_gather_object(None)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The others enter once rank 0 has left."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    @contextmanager
    def together(self, *, in_step: bool = False) -> Iterator[None]:
        """Share an error in the block with all processes, which raise it at their next ``all_gather_object``.

        Args:
            in_step: They may wait for this process's part of a weight instead, and hear nothing: it ends by itself, and
                the launcher ends the others.

        Raises:
            LostProcessError: another process has ended while this one waited for it.
        """
        try:
            yield
        except Exception as error:
            if self.size > 1 and error is not self._heard:
                if in_step:
                    self._break_off()
                else:
                    with suppress(LostProcessError):
                        self._exchange(_Failure.of(error))
            if in_step and _is_of_network(error):
                raise LostProcessError(LOST) from error
            raise

    def shard(self, count: int) -> slice:
        """The part of ``count`` things that this process takes: the parts follow one another in order of rank."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def all_reduce(self, tensors: Iterable[Tensor]) -> None:
        """Replaces every tensor by its sum over all processes, the same to the bit in each."""
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
        # Half an exchange would leave the others waiting: the signal counts from the next one on.
        self._is_told_to_stop = True
        signal.alarm(GRACE_S)

    def _give_up(self, *_: Any) -> None:
        self._break_off()
        raise KeyboardInterrupt

    def _break_off(self) -> None:
        """From here on nothing is exchanged, and of the processes that are left, the first to come here speaks."""
        if self._is_broken:
            return
        self._is_broken = True
        import torch.distributed as distributed

        is_first = True
        # The launcher, which outlives its processes, counts; unless it has ended, too.
        with suppress(RuntimeError):
            is_first = distributed.distributed_c10d._get_default_store().add("speakers", 1) == 1
        if is_first:
            sys.stderr = sys.__stderr__
        else:
            _hush()


ALONE = Ranks()


def _is_of_network(error: Exception) -> bool:
    import torch.distributed as distributed

    # Gloo has no error of its own.
    return isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def was_launched() -> bool:
    """Whether a launcher such as ``accelerate launch`` has started this process beside others."""
    return "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def prepare() -> None:
    """To be called before the processes meet: rank 0 alone speaks, and has time to say what is wrong with the call."""
    if int(os.environ["RANK"]):
        _hush()
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _hush() -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
