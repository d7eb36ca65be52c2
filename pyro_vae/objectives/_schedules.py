"""Schedules of weights, as functions of the training step."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pyro_vae._utils.checks import nonnegative_number, positive_integer, real_number
from pyro_vae._utils.init_args import records_init_args

LAST_STEP = float(2**24)  # a float32 counter stops here
_SPACING = 0.6180339887  # golden ratio; steps with this spacing cover every part of any period


class Schedule(ABC):
    """A number for each step. A subclass computes it by tensor operations without branches."""

    @abstractmethod
    def __call__(self, step: Tensor) -> Tensor:
        """Return the value at a step; both are scalar tensors."""

    def last_value(self) -> float:
        """Return the value at the end of the schedule, or the largest value if it repeats.

        Validation computes the objective at this value. The base class finds it by calling the
        schedule. The end is evaluated at steps up to 2^24, where the counter stops, and the
        largest value at steps between 2^17 and 2^19. A subclass may return the value directly.

        Raises:
            ValueError: The schedule neither ends nor repeats.
        """
        late = self._values_from(LAST_STEP / 4) + self._values_from(LAST_STEP / 2)
        if max(late) - min(late) <= 1e-3 * (1 + max(map(abs, late))):
            return late[-1]
        before, after = self._values_from(2.0**17), self._values_from(2.0**18)
        spread = max(before + after) - min(before + after)
        if not abs(max(before) - max(after)) <= 0.02 * spread:  # NaN raises too
            raise ValueError(
                f"the schedule {self!r} neither ends nor repeats: at steps {LAST_STEP / 2:g} and "
                f"{LAST_STEP:g} it is {late[len(late) // 2 - 1]:g} and {late[-1]:g}. Add to its "
                "class a method last_value(self) that returns the value for validation"
            )
        return max(before + after)

    def least_value(self) -> float:
        """Return the smallest value if it is known, and else zero."""
        return 0.0

    @torch.no_grad()
    def has_settled(self, step: float) -> bool:
        """Return whether the schedule has come within 1% of its last value by a step.

        A schedule that repeats has settled after the first time. Patience starts to count then.
        """
        last, now = self.last_value(), float(self(torch.tensor(step)))
        near = 0.01 * max(abs(last), abs(last - float(self(torch.zeros(())))))
        if abs(now - last) <= near:
            return True
        late = float(self(torch.tensor(LAST_STEP)))
        if (
            abs(late - last) <= near
            and abs(float(self(torch.tensor(LAST_STEP / 2))) - last) <= near
        ):
            return False  # the end comes later
        steps = torch.linspace(0.0, step, 256)[1:]
        return any(abs(float(self(each)) - last) <= near for each in steps)

    @torch.no_grad()
    def _values_from(self, first: float) -> list[float]:
        """Return the values at steps between ``first`` and its double, the double last."""
        steps = [first + float(int(first * (n * _SPACING % 1))) for n in range(256)]
        return [float(self(torch.tensor(step))) for step in [*steps, 2 * first]]


@records_init_args
class Constant(Schedule):
    """A schedule with the same number at every step.

    Args:
        value: the number.
    """

    def __init__(self, value: float):
        self.value = real_number("value", value)

    def __call__(self, step: Tensor) -> Tensor:
        """Return the number."""
        return torch.full_like(step, self.value)

    def last_value(self) -> float:
        """Return the number."""
        return self.value

    least_value = last_value


@records_init_args
class Linear(Schedule):
    """A linear change from one number to another, then constant (Bowman et al. 2016, sec. 3.1).

    Args:
        steps: number of steps from ``start`` to ``end``.
        start: the first number.
        end: the last number.

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

    def __call__(self, step: Tensor) -> Tensor:
        """Return the number at a step."""
        return self.start + (self.end - self.start) * (step / self.steps).clamp(max=1.0)

    def last_value(self) -> float:
        """Return the last number."""
        return self.end if type(self).__call__ is Linear.__call__ else super().last_value()

    def least_value(self) -> float:
        """Return the smaller of the two numbers."""
        return min(self.start, self.end) if type(self).__call__ is Linear.__call__ else 0.0


@records_init_args
class Cyclical(Schedule):
    """A cycle that rises linearly, stays constant, and starts again (Fu et al. 2019).

    Args:
        period: number of steps of a cycle.
        rise: fraction of the cycle that rises.
        start: the number at the beginning of a cycle.
        end: the number at the end of the rise.

    Raises:
        ValueError: ``period`` is less than one, or ``rise`` is not in (0, 1].
    """

    def __init__(self, period: int, rise: float = 0.5, start: float = 0.0, end: float = 1.0):
        self.period = positive_integer("period", period)
        self.rise = real_number("rise", rise)
        if not 0 < rise <= 1:
            raise ValueError(f"rise must be a fraction of the period, in (0, 1], got {rise}")
        self.start, self.end = real_number("start", start), real_number("end", end)

    def __call__(self, step: Tensor) -> Tensor:
        """Return the number at a step."""
        done = (step % self.period) / (self.period * self.rise)
        return self.start + (self.end - self.start) * done.clamp(max=1.0)

    def last_value(self) -> float:
        """Return the larger of the two numbers."""
        if type(self).__call__ is Cyclical.__call__:
            return max(self.start, self.end)
        return super().last_value()

    def least_value(self) -> float:
        """Return the smaller of the two numbers."""
        return min(self.start, self.end) if type(self).__call__ is Cyclical.__call__ else 0.0

    def has_settled(self, step: float) -> bool:
        """Return whether the first rise is over."""
        if type(self).__call__ is Cyclical.__call__:
            return self.start >= self.end or step >= self.period * self.rise
        return super().has_settled(step)


def as_schedule(name: str, value: float | Schedule) -> Schedule:
    """Return a schedule unchanged, and a number as a constant schedule.

    Raises:
        ValueError: The number, or a value of the schedule, is negative.
    """
    if not isinstance(value, Schedule):
        return Constant(nonnegative_number(name, value))
    if (least := value.least_value()) < -1e-6:  # not from rounding
        raise ValueError(
            f"{name} must be a schedule of numbers of at least 0, got {value!r}, whose smallest "
            f"value is {least:g}. Change its numbers"
        )
    return value


def schedules_in(value: Any) -> Iterator[Schedule]:
    """Yield the schedules in a value, itself included, except constants."""
    if isinstance(value, Schedule) and not isinstance(value, Constant):
        yield value
    elif isinstance(value, dict | list | tuple):
        parts = value.values() if isinstance(value, dict) else value
        yield from itertools.chain.from_iterable(map(schedules_in, parts))
