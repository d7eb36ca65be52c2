"""Whether to capture the step of a run."""

from __future__ import annotations

import time
from collections import deque
from itertools import pairwise
from statistics import median
from typing import Literal

Capture = bool | Literal["auto"]

# A capture takes from 4 to 20 seconds, and saves between a fifth and four fifths of a step.
_REPAYING_SECONDS = 30.0
_STEPS_TO_TIME = 10


class CapturePolicy:
    """Says when to capture: at once, never, or where the steps that are left repay it.

    Args:
        capture: ``"auto"`` times the first steps that could be captured, then decides.
    """

    def __init__(self, capture: Capture):
        self._decision = None if capture == "auto" else capture
        self._times: deque[float] = deque(maxlen=_STEPS_TO_TIME + 1)
        self.reason = "capture=False" if capture is False else "no step was left to capture"

    def __call__(self, steps_left: int | None) -> bool:
        """Tell whether to capture the step about to be taken.

        Args:
            steps_left: this one and those to come, None if that is not known.
        """
        if self._decision is not None:
            return self._decision
        self._times.append(time.perf_counter())
        if steps_left is None or len(self._times) <= _STEPS_TO_TIME:
            return False
        seconds = steps_left * median(after - before for before, after in pairwise(self._times))
        self._decision = seconds >= _REPAYING_SECONDS
        self.reason = (
            f"the {seconds:.0f} s of steps that were left would not repay a capture "
            f"({_REPAYING_SECONDS:.0f} s would)"
        )
        return self._decision
