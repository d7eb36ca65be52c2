"""Checks of arguments that many functions share."""

from __future__ import annotations

import math
import numbers
from typing import Any

_SMALLEST, _LARGEST = 1.2e-38, 3.4e38  # of float32


def positive_integer(name: str, value: Any, least: int = 1) -> int:
    """Return a whole number of at least one, or of at least some other.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is less.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value >= 2**63:
        raise ValueError(
            f"{name} must be below 2**63, got a number of {int(value).bit_length()} bits"
        )
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
    if not 0 < (number := _as_float(value)) < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return number


def real_number(name: str, value: Any) -> float:
    """Return a finite number.

    Raises:
        TypeError: it is no number.
        ValueError: it is infinite or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(number := _as_float(value)):
        raise ValueError(f"{name} must be finite, got {value}")
    return number


def _as_float(value: numbers.Real) -> float:
    """Return a number as float32 has it: zero or infinite where it is too small or too large."""
    if abs(value) < _SMALLEST:
        return 0.0
    if abs(value) > _LARGEST:
        return math.inf if value > 0 else -math.inf
    return float(value)
