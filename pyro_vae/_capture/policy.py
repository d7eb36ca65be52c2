"""Thresholds and timing for ``capture="auto"``."""

from __future__ import annotations

import time
from collections import deque
from itertools import pairwise
from statistics import median
from typing import Literal

Capture = bool | Literal["auto"]


def check_capture(capture: Capture) -> None:
    """Raise ValueError if ``capture`` is not True, False or ``"auto"``."""
    if not (capture is True or capture is False or capture == "auto"):
        raise ValueError(f'capture must be True, False or "auto", got {capture!r}')


# Tracing a training step takes about half a second and saves up to a third of its time on small
# networks. Compilation takes from 4 to 20 seconds and saves up to three quarters.
SECONDS_THAT_REPAY_TRACING = 3.0
SECONDS_THAT_REPAY_COMPILING = 30.0


class Pace:
    """The median time of the last few calls."""

    def __init__(self, num_calls: int = 10):
        self._times: deque[float] = deque(maxlen=num_calls + 1)

    def tick(self) -> float | None:
        """Record the start of a call. Return the median seconds, or None after too few calls."""
        self._times.append(time.perf_counter())
        if len(self._times) < self._times.maxlen:
            return None
        return median(after - before for before, after in pairwise(self._times))
