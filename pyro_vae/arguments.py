"""Checks of arguments that many functions share."""

from __future__ import annotations

import math
import numbers
from typing import Any


def positive_integer(name: str, value: Any) -> int:
    """Return a whole number of at least one.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is less than one.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)


def positive_number(name: str, value: Any) -> float:
    """Return a number above zero.

    Raises:
        TypeError: it is no number.
        ValueError: it is not above zero, or is NaN.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return float(value)


def real_number(name: str, value: Any) -> float:
    """Return a finite number.

    Raises:
        TypeError: it is no number.
        ValueError: it is infinite or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)
