"""Whether what is left of a run repays a capture."""

from __future__ import annotations

import time
from collections import deque
from itertools import pairwise
from statistics import median
from typing import Literal

Capture = bool | Literal["auto"]


def check_capture(capture: Capture) -> None:
    """Refuse what is no mode of capture.

    Raises:
        ValueError: it is something else than True, False and ``"auto"``.
    """
    if not (capture is True or capture is False or capture == "auto"):
        raise ValueError(f'capture must be True, False or "auto", got {capture!r}')


# To trace a training step takes about half a second, and saves up to a third of it on small
# networks; to compile it takes from 4 to 20 seconds, and saves up to three quarters.
SECONDS_THAT_REPAY_TRACING = 3.0
SECONDS_THAT_REPAY_COMPILING = 30.0


class Pace:
    """The time that calls take, from the last few of them."""

    def __init__(self, num_calls: int = 10):
        self._times: deque[float] = deque(maxlen=num_calls + 1)

    def tick(self) -> float | None:
        """Note a call that begins; return the median seconds of a call, None before enough."""
        self._times.append(time.perf_counter())
        if len(self._times) < self._times.maxlen:
            return None
        return median(after - before for before, after in pairwise(self._times))
