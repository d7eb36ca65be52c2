"""Run independent pieces of work on the cores of a processor, in one thread each."""

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
    """Yield the result of the function for each piece, in order.

    On a CPU, as many pieces run at once as torch has threads, each in one thread. By default, torch
    splits every operation over its threads, and they wait for each other after each operation. If
    operations are short, or other programs use the cores, most of the time is waiting. On other
    devices, the pieces run one after the other.

    After an exception or an interrupt, the pieces that have started are completed. Then the number
    of torch's threads is restored. A caller that may be interrupted between results must close the
    generator.

    Args:
        function: called in new threads, which have gradients enabled. It must disable them itself.
        pieces: its arguments, one per call.
        device: the device of the tensors.
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
        finally:  # also if a second interrupt comes during the shutdown
            torch.set_num_threads(threads)
