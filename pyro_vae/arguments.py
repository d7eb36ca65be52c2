"""Checks of arguments that many functions share."""

from __future__ import annotations

import math
import numbers
from typing import Any


def positive_integer(name: str, value: Any, least: int = 1) -> int:
    """Return a whole number of at least one, or of at least some other.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is less.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def positive_number(name: str, value: Any) -> float:
    """Return a finite number above zero.

    Raises:
        TypeError: it is no number.
        ValueError: it is not above zero, or infinite, or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
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
