"""Work that all processes of a group do together, and that ends for all if it ends for one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum

import torch
from torch import Tensor

from pyro_vae._utils import distributed as processes
from pyro_vae._utils.interrupts import defer_keyboard_interrupt


class _Status(IntEnum):
    WORKING = 0
    STOPPING = 1  # interrupted, and comes to the last exchange with what it has
    LEFT = 2  # interrupted, and comes to no exchange any more
    FAILED = 3


class Together:
    """A context in which the processes of a group exchange tensors, or none does.

    Before each exchange every process says how it is. So none waits for one that has failed: that
    one raises its own error, and the others, at the exchange that it did not come to, a
    RuntimeError that names it. Without a group, or in a group of one, nothing is exchanged.

    An interrupt (Ctrl-C) waits for the next :meth:`check`, lest it leave an exchange, or a handler
    of Pyro's, half done; a second one does not wait. A process that was interrupted, and has
    something to keep, calls :meth:`stop` and then :meth:`gather_last`; the others are told at their
    next exchange, as a KeyboardInterrupt, and do the same.

    Raises:
        RuntimeError: another process failed.
        KeyboardInterrupt: this process, or another, was interrupted.
    """

    def __init__(self):
        self.rank, self.num_processes = processes.rank(), processes.num_processes()
        self._expected = self.num_processes > 1  # at an exchange still to come
        self._stopping = False
        self._held = defer_keyboard_interrupt()
        self._interrupted: Callable[[], bool] = lambda: False

    def __enter__(self) -> Together:
        self._interrupted = self._held.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        try:
            if kind is not None and self._expected:
                interrupted = issubclass(kind, KeyboardInterrupt)
                self._say(_Status.LEFT if interrupted else _Status.FAILED)
        finally:
            self._stopping |= self._interrupted()  # though after the last check
            self._held.__exit__(None, None, None)

    @property
    def stopped(self) -> bool:
        """Whether an interrupt came to this process, or another told of one."""
        return self._stopping

    def check(self) -> None:
        """Let an interrupt through: where nothing is half done, several times a second.

        Raises:
            KeyboardInterrupt: there was one.
        """
        if self._interrupted():
            raise KeyboardInterrupt

    def checked(self, advance: Callable[..., None]) -> Callable[..., None]:
        """Return what shows progress and then lets an interrupt through."""

        def advance_and_check(count: int = 1, status: str = "") -> None:
            advance(count, status)
            self.check()

        return advance_and_check

    def own(self, count: int) -> int:
        """Return how many of so many parts a process has, at most."""
        return -(-count // self.num_processes)

    def common_seed(self, seed: int | None) -> int:
        """Return the seed; where there is none, one that the first process draws for all."""
        if seed is not None:
            return seed
        drawn = torch.randint(2**62, ())
        return int(self.broadcast([drawn], 0)[0])

    def broadcast(self, tensors: Sequence[Tensor] | None, source: int) -> list[Tensor]:
        """Return the tensors of one process in all; see :func:`processes.broadcast_all`."""
        with self._exchange():
            self._agree()
            return processes.broadcast_all(tensors, source)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of the tensors of all processes."""
        with self._exchange():
            self._agree()
            total = tensor.clone()
            processes.sum_over_processes([total])
            return total

    def gather(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return the tensors of each process; see :func:`processes.gather_all`."""
        with self._exchange():
            self._agree()
            return processes.gather_all(tensors)

    def gather_last(
        self, tensors: Sequence[Tensor], last: bool = True
    ) -> tuple[list[list[Tensor]], bool]:
        """Return the tensors of each process, and whether any was stopped: then it was the last.

        Args:
            tensors: what this process gives.
            last: whether it is the last exchange in any case.
        """
        with self._exchange():
            was_told = self._stopping
            self._agree(at_end=True)
            if self._stopping and not was_told:  # what the others said was said by stop()
                self._agree(at_end=True)
            found = processes.gather_all(tensors)
        last = last or self._stopping
        self._expected &= not last
        if last:
            self._stopping |= self._interrupted()
        return found, self._stopping

    def stop(self) -> None:
        """Tell the others that this process was interrupted, if it was not they who told it."""
        if not self._stopping:
            self._stopping = True
            with self._exchange():
                self._agree(stopping=True)

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[None]:
        try:
            yield
        except Exception:  # as of a connection that is lost: there is no use in more
            self._expected = False
            raise

    def _agree(self, *, stopping: bool = False, at_end: bool = False) -> None:
        if self.num_processes == 1:
            return
        if not self._expected:
            raise KeyboardInterrupt("another process was interrupted")
        said = self._say(_Status.STOPPING if stopping else _Status.WORKING)
        if _Status.FAILED in said or _Status.LEFT in said:
            self._expected = False
        if _Status.FAILED in said:
            failed = [str(number) for number, status in enumerate(said) if status == _Status.FAILED]
            raise RuntimeError(
                f"this needs all {self.num_processes} processes of the group, but it failed in "
                f"process {', '.join(failed)}: see what that one raised"
            )
        if _Status.LEFT in said:
            raise KeyboardInterrupt("another process was interrupted")
        if _Status.STOPPING in said:
            self._stopping = True
            if not (stopping or at_end):
                raise KeyboardInterrupt("another process was interrupted")

    @staticmethod
    def _say(status: _Status) -> list[int]:
        return [int(other) for other in processes.gather(torch.tensor(int(status)))]
