"""Checks of arguments that several plots take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pyro_vae._utils.checks import shown


def as_list(name: str, value: Any, example: str) -> list[Any]:
    """Return a sequence, or an array of one dimension, as a list.

    Raises:
        TypeError: The value is another object.
    """
    if isinstance(value, np.ndarray) and value.ndim == 1:
        return value.tolist()
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence, such as {example}, got {shown(value)}")
    return list(value)
