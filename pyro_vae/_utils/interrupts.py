"""Ctrl-C that waits for the end of a step."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def defer_keyboard_interrupt() -> Iterator[Callable[[], bool]]:
    """Hold the first Ctrl-C back, and yield what tells whether it came; a second one comes through.

    Only where Ctrl-C would raise a KeyboardInterrupt, in the main thread: handlers of somebody
    else's stay. An interrupt that nobody asked for until the end of the block is raised there.
    """
    came = told = False

    def hold(signum, frame) -> None:
        nonlocal came, told
        if came:
            told = True
            raise KeyboardInterrupt
        came = True

    def interrupted() -> bool:
        nonlocal told
        told = came
        return came

    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    signal.signal(signal.SIGINT, hold)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if came and not told:
        raise KeyboardInterrupt
