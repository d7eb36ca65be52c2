"""Weights that change as training goes on: functions of the number of steps taken."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from pyro_vae.arguments import positive_integer, real_number


class Schedule(ABC):
    """A number for each step. A subclass computes it by tensor operations, without branches."""

    @abstractmethod
    def __call__(self, step: Tensor) -> Tensor:
        """Return the value after so many steps, a scalar of a scalar."""


class Constant(Schedule):
    """The same number at every step.

    Args:
        value: the number.
    """

    def __init__(self, value: float):
        self.value = real_number("value", value)

    def __repr__(self) -> str:
        return f"{self.value:g}"

    def __call__(self, step: Tensor) -> Tensor:
        """Return the number."""
        return torch.full_like(step, self.value)


class Linear(Schedule):
    """From one number to another at an even pace, then the latter (Bowman et al. 2016, sec. 3.1).

    Args:
        steps: how many the way takes.
        start: the first number.
        end: the last.

    Raises:
        ValueError: ``steps`` is less than one.

    Example:
        >>> import torch, pyro_vae as pv
        >>> warm_up = pv.objectives.Linear(steps=100)
        >>> [warm_up(torch.tensor(float(step))).item() for step in (0, 50, 100, 200)]
        [0.0, 0.5, 1.0, 1.0]
    """

    def __init__(self, steps: int, start: float = 0.0, end: float = 1.0):
        self.steps = positive_integer("steps", steps)
        self.start, self.end = real_number("start", start), real_number("end", end)

    def __repr__(self) -> str:
        return f"Linear(steps={self.steps}, start={self.start:g}, end={self.end:g})"

    def __call__(self, step: Tensor) -> Tensor:
        """Return the number after so many steps."""
        return self.start + (self.end - self.start) * (step / self.steps).clamp(max=1.0)


class Cyclical(Schedule):
    """Rises linearly, stays, and begins again (Fu et al. 2019).

    Args:
        period: steps of a cycle.
        rise: the share of it that rises.
        start: the number at the beginning of a cycle.
        end: the number that it rises to.

    Raises:
        ValueError: ``period`` is less than one, or ``rise`` not in (0, 1].
    """

    def __init__(self, period: int, rise: float = 0.5, start: float = 0.0, end: float = 1.0):
        self.period = positive_integer("period", period)
        self.rise = real_number("rise", rise)
        if not 0 < rise <= 1:
            raise ValueError(f"rise must be a share of the period, in (0, 1], got {rise}")
        self.start, self.end = real_number("start", start), real_number("end", end)

    def __repr__(self) -> str:
        return (
            f"Cyclical(period={self.period}, rise={self.rise:g}, start={self.start:g}, "
            f"end={self.end:g})"
        )

    def __call__(self, step: Tensor) -> Tensor:
        """Return the number after so many steps."""
        done = (step % self.period) / (self.period * self.rise)
        return self.start + (self.end - self.start) * done.clamp(max=1.0)


def as_schedule(name: str, value: float | Schedule) -> Schedule:
    """Return a schedule as it is, and a number as one."""
    return value if isinstance(value, Schedule) else Constant(real_number(name, value))
