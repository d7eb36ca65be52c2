"""Independent pieces of work on a processor's cores, one thread each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def in_threads(
    function: Callable[[Piece], Result], pieces: Sequence[Piece], device: torch.device
) -> Iterator[Result]:
    """Yield the function of each piece, in order.

    On a CPU as many pieces are worked on at once as torch has threads, each by one thread. Torch by
    itself splits every operation over its threads, which wait for each other after each; where
    operations are short, or other programs want the cores too, they wait for most of the time.
    Elsewhere the pieces are taken one after the other.

    An exception, or an interrupt, ends the work after the pieces that have been begun, and the
    number of torch's threads is what it was. Who may be interrupted between the results closes
    the generator.

    Args:
        function: of tensors on the device; without gradients, unless it turns them on itself.
        pieces: what it is called with.
        device: where it works.
    """
    count = min(torch.get_num_threads(), len(pieces))
    if device.type != "cpu" or count < 2:
        yield from map(function, pieces)
        return
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from pool.map(function, pieces)
    finally:
        try:
            pool.shutdown(cancel_futures=True)
        finally:  # though a second interrupt comes while the pieces end
            torch.set_num_threads(threads)
