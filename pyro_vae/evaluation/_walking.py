"""Data taken part by part: shared among processes, stopped by Ctrl-C, and gone on with."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pyro_vae._utils import distributed as processes
from pyro_vae._utils.random import seeded
from pyro_vae.datasets._minibatches import Batch, Minibatches
from pyro_vae.evaluation._together import Together

Sized = tuple[int, Callable[[], Batch]]  # how many data, and what reads them


@dataclass(frozen=True)
class Part:
    """Some data of a walk.

    Args:
        first: the number of the first of them.
        batch: x and covariates.
        seed: of all that is drawn for them, whoever does them, and in whatever order.
    """

    first: int
    batch: Batch
    seed: int


def minibatches(batches: Minibatches) -> Iterator[Sized]:
    """Yield how many data each minibatch has, and what reads it, so that others' are not read."""
    for selection in batches.selections():
        yield len(selection[0]), partial(batches.prepare, *selection)


class Walk:
    """The parts of some data that one process does.

    Part i goes to process i mod R, counted from the first that is not done yet. Each has a seed of
    its own, drawn in order from torch's generator: so its random numbers are the same in any
    process, and whether or not the parts before it are done again.

    Args:
        together: the processes.
        sized: the data, in an order that is the same in all processes.
        rows: data of a part at most; a minibatch is cut into such parts.
        num_done: data that are done already, the first of all.
        advance: called with the number of data that are passed by.
    """

    def __init__(
        self,
        together: Together,
        sized: Iterable[Sized],
        *,
        rows: int = sys.maxsize,
        num_done: int = 0,
        advance: Callable[[int], None] = lambda count: None,
    ):
        self._together, self._sized, self._rows = together, sized, rows
        self._num_done, self._advance = num_done, advance
        self.num_parts = self.num_data = 0  # that were met, of all processes; done ones apart

    def __iter__(self) -> Iterator[Part]:
        """Yield the parts of this process.

        Raises:
            ValueError: what is done ends inside of a part, or is more than there is.
        """
        left, first = self._num_done, 0
        for minibatch_size, read in self._sized:
            whole = None
            for start in range(0, minibatch_size, self._rows):
                size = min(self._rows, minibatch_size - start)
                seed = int(torch.randint(2**62, ()))
                if 0 < left < size:
                    raise ValueError(
                        f"resume holds {self._num_done} data, which end inside of a pass: resume "
                        "with the data, the batch_size and the method that were stopped"
                    )
                if left:
                    left -= size
                    self._advance(size)
                else:
                    mine = self.num_parts % self._together.num_processes == self._together.rank
                    self.num_parts += 1
                    self.num_data += size
                    if mine:
                        whole = read() if whole is None else whole
                        rows = slice(start, start + size)
                        yield Part(first, tuple(column[rows] for column in whole), seed)
                    self._advance(size)
                first += size
        if left:
            raise ValueError(f"resume holds {left} data more than there are")

    def require_same(self, counts: Sequence[Tensor]) -> None:
        """Refuse data that are not the same in all processes.

        Raises:
            ValueError: other processes met other numbers of parts or data.
        """
        if any(not torch.equal(other, counts[0]) for other in counts):
            met = [f"{data} data in {parts} parts" for parts, data in map(Tensor.tolist, counts)]
            raise ValueError(
                f"the processes of a group must be given the same data, got {', '.join(met)}: each "
                "takes its own share of them"
            )


def walk(
    together: Together,
    sized: Iterable[Sized],
    estimate: Callable[[Batch], Sequence[Tensor]],
    *,
    rows: int = sys.maxsize,
    done: Sequence[tuple[Tensor, ...]] = (),
    advance: Callable[[int], None] = lambda count: None,
    last: bool = True,
) -> tuple[list[tuple[Tensor, ...]], bool]:
    """Estimate part after part; return all parts' tensors in order, and whether it was stopped.

    What the processes find is gathered here.

    Args:
        together: the processes.
        sized: the data, in an order that is the same in all processes.
        estimate: gives tensors for a part; the first has a row for each datum.
        rows: data of a part at most.
        done: the tensors of the first parts, if these are done already.
        advance: called with the number of data that are done.
        last: whether it is the last thing that the processes do together; it is, where it is
            stopped.

    Raises:
        KeyboardInterrupt: it was interrupted before anything was done.
    """
    num_done = sum(len(part[0]) for part in done)
    steps = Walk(together, sized, rows=rows, num_done=num_done, advance=advance)
    share: list[tuple[Tensor, ...]] = []
    try:
        for part in steps:
            with seeded(part.seed):
                share.append(tuple(tensor.cpu() for tensor in estimate(part.batch)))
        stopped = False
    except KeyboardInterrupt:
        stopped = True
        together.stop()
    if together.num_processes > 1:
        met = torch.tensor([steps.num_parts, steps.num_data])
        shares, stopped = _gathered(together, share, met, steps, last)
    else:
        shares = [share]
    parts = [*done, *processes.interleave(shares)]
    if stopped and not parts:
        raise KeyboardInterrupt
    return parts, stopped


def _gathered(
    together: Together, share: list[tuple[Tensor, ...]], met: Tensor, steps: Walk, last: bool
) -> tuple[list[list[tuple[Tensor, ...]]], bool]:
    """Return the parts of each process, and whether any was stopped."""
    flat = [tensor for part in share for tensor in part]
    found, stopped = together.gather_last([met, torch.tensor(len(share)), *flat], last)
    if not stopped:
        steps.require_same([counts for counts, *_ in found])
    shares = []
    for _, count, *tensors in found:
        width = len(tensors) // max(1, int(count))
        shares.append(
            [tuple(tensors[n : n + width]) for n in range(0, len(tensors), max(1, width))]
        )
    return shares, stopped
