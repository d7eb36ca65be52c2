"""The processes that share an evaluation, and the part of the data that each one evaluates."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from enum import IntEnum
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_vae._utils import distributed
from pyro_vae._utils.interrupts import defer_keyboard_interrupt
from pyro_vae.datasets._minibatches import Batch, Minibatches

LazyBatch = tuple[int, Callable[[], Batch]]  # the number of its rows, and a function that reads it


class _Status(IntEnum):
    WORKING = 0
    STOPPING = 1  # interrupted; joins the last collective with its partial result
    LEFT = 2  # interrupted; joins no further collective
    FAILED = 3


class Group:
    """A context in which collectives run in all processes of a group, or in none.

    Before each collective, all processes exchange a status, so no process hangs after a failure.
    The failed process raises its own error. The others raise a RuntimeError with the number of the
    failed process, at their next collective. A single process exchanges nothing.

    An interrupt (Ctrl-C) is held back until the next :meth:`check`, because it must not end a
    collective or a handler of Pyro early. A second interrupt is not held back. An interrupted
    process with a partial result calls :meth:`stop` and then :meth:`gather_last`. The others
    raise KeyboardInterrupt at their next collective, and then call the same methods.

    Raises:
        RuntimeError: Another process failed.
        KeyboardInterrupt: This process, or another one, was interrupted.
    """

    def __init__(self):
        self.rank, self.num_processes = distributed.rank(), distributed.num_processes()
        self._expected = self.num_processes > 1  # in a later collective
        self._stopping = False
        self._deferred = defer_keyboard_interrupt()
        self._interrupt_came: Callable[[], bool] = lambda: False

    def __enter__(self) -> Group:
        self._interrupt_came = self._deferred.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        try:
            if kind is not None and self._expected:
                interrupted = issubclass(kind, KeyboardInterrupt)
                self._exchange(_Status.LEFT if interrupted else _Status.FAILED)
        finally:
            self._stopping |= self._interrupt_came()  # even if it came after the last check
            self._deferred.__exit__(None, None, None)

    @property
    def interrupted(self) -> bool:
        """Whether this process was interrupted, or received an interrupt from another process."""
        return self._stopping

    def check(self) -> None:
        """Raise a deferred interrupt. Call it between runs of programs, several times a second.

        Raises:
            KeyboardInterrupt: There was an interrupt.
        """
        if self._interrupt_came():
            raise KeyboardInterrupt

    def max_share(self, count: int) -> int:
        """Return the largest number of parts in one process, if there are ``count`` in all."""
        return -(-count // self.num_processes)

    def common_seed(self, seed: int | None) -> int:
        """Return the seed. If it is None, the first process draws a seed for all processes."""
        return int(self.broadcast(torch.randint(2**62, ()), 0)) if seed is None else seed

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """Overwrite a tensor with that of one process; see :func:`distributed.broadcast`."""
        with self._collective():
            return distributed.broadcast(tensor, source)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of the tensors of all processes."""
        with self._collective():
            total = tensor.clone()
            distributed.sum_over_processes([total])
            return total

    def gather(self, value: Any) -> list[Any]:
        """Return the value of each process; see :func:`distributed.gather`."""
        with self._collective():
            return distributed.gather(value)

    def gather_last(self, value: Any, *, last: bool = True) -> list[Any]:
        """Return the value of each process, also after an interrupt of one process.

        If :attr:`interrupted` is true afterwards, this was the last collective.

        Args:
            value: value of this process.
            last: whether this is the last collective even without an interrupt.
        """
        known = self._stopping
        with self._collective(at_end=True):
            if self._stopping and not known:  # the others' status was that of stop()
                self._agree(at_end=True)
            values = distributed.gather(value)
        last = last or self._stopping
        self._expected &= not last
        if last:
            self._stopping |= self._interrupt_came()
        return values

    def stop(self) -> None:
        """Send an interrupt to the other processes, unless it came from another process."""
        if not self._stopping:
            self._stopping = True
            with self._collective(stopping=True):
                pass

    @contextlib.contextmanager
    def _collective(self, *, stopping: bool = False, at_end: bool = False) -> Iterator[None]:
        try:
            self._agree(stopping=stopping, at_end=at_end)
            yield
        except Exception:  # such as a lost connection, after which no collective succeeds
            self._expected = False
            raise

    def _agree(self, *, stopping: bool = False, at_end: bool = False) -> None:
        """Exchange the status and raise an error unless all processes join the collective."""
        if self.num_processes == 1:
            return
        if not self._expected:
            raise KeyboardInterrupt("another process was interrupted")
        statuses = self._exchange(_Status.STOPPING if stopping else _Status.WORKING)
        if _Status.FAILED in statuses or _Status.LEFT in statuses:
            self._expected = False
        if _Status.FAILED in statuses:
            failed = [str(rank) for rank, each in enumerate(statuses) if each == _Status.FAILED]
            raise RuntimeError(
                f"The evaluation needs all {self.num_processes} processes of the group, but it "
                f"failed in process {', '.join(failed)}. See the error of that process."
            )
        if _Status.LEFT in statuses:
            raise KeyboardInterrupt("another process was interrupted")
        if _Status.STOPPING in statuses:
            self._stopping = True
            if not (stopping or at_end):
                raise KeyboardInterrupt("another process was interrupted")

    def _exchange(self, status: _Status) -> list[int]:
        statuses = torch.zeros(self.num_processes, dtype=torch.int64)
        statuses[self.rank] = status
        distributed.sum_over_processes([statuses])
        return statuses.tolist()


def lazy_batches(batches: Minibatches) -> Iterator[LazyBatch]:
    """Yield the size of each minibatch and a function that reads it."""
    for selection in batches.selections():
        yield len(selection[0]), partial(batches.prepare, *selection)


class Shard:
    """The parts of the data that one process evaluates.

    Part i belongs to process i mod R, counted from the first part that is not done. Each part has
    its own seed, drawn in order from torch's generator. So the random numbers of a part are the
    same in any process and in a resumed call.

    Args:
        group: the processes.
        batches: minibatches, in an order that is the same in all processes.
        max_rows: largest number of rows of a part. A larger minibatch is split into parts.
        num_done: number of data points at the beginning of the data that are done already.
        advance: called with the number of data points of each part, of all processes.
    """

    def __init__(
        self,
        group: Group,
        batches: Iterable[LazyBatch],
        *,
        max_rows: int,
        num_done: int,
        advance: Callable[[int], None],
    ):
        self._group, self._batches, self._max_rows = group, batches, max_rows
        self._num_done, self._advance = num_done, advance
        self.num_parts = self.num_data = 0  # so far, of all processes, without the done data

    def __iter__(self) -> Iterator[tuple[Batch, int]]:
        """Yield the batch and the seed of each part of this process.

        Raises:
            ValueError: The data points that are done end inside a part, or are more than all data.
        """
        left = self._num_done
        for batch_size, read in self._batches:
            whole = None
            for start in range(0, batch_size, self._max_rows):
                size = min(self._max_rows, batch_size - start)
                seed = int(torch.randint(2**62, ()))
                if 0 < left < size:
                    raise ValueError(
                        f"resume has {self._num_done} data points, but in this call no minibatch "
                        "ends there. Pass the same data, batch_size and method as before."
                    )
                if left:
                    left -= size
                else:
                    own = self.num_parts % self._group.num_processes == self._group.rank
                    self.num_parts += 1
                    self.num_data += size
                    if own:
                        whole = read() if whole is None else whole
                        yield tuple(column[start : start + size] for column in whole), seed
                self._advance(size)
        if left:
            raise ValueError(
                f"resume has {left} data points more than data. Pass the same data as before."
            )
