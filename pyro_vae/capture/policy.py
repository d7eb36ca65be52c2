"""Whether what is left of a run repays a capture."""

from __future__ import annotations

import time
from collections import deque
from itertools import pairwise
from statistics import median
from typing import Literal

Capture = bool | Literal["auto"]

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
