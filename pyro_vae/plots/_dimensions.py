"""Dimensions of a latent, which a user or their activity selects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from pyro_vae._utils.checks import is_whole_number
from pyro_vae.plots._arguments import as_list
from pyro_vae.plots._axes import literal

_MOST = 10


def choose_dimensions(dimensions: Any, activity: Tensor, count: int | None = None) -> list[int]:
    """Return positions in a latent: those given, or the ones with the largest activity, in order.

    Args:
        dimensions: positions, or None.
        activity: a number for each dimension.
        count: the number of dimensions. If None, at most ten are chosen and any number is valid.

    Raises:
        TypeError: A position is not a whole number.
        ValueError: A position does not exist or is given twice, or there are not ``count`` ones.
    """
    if dimensions is None:
        most = min(len(activity), _MOST if count is None else count)
        return sorted(activity.nan_to_num(nan=-np.inf).topk(most).indices.tolist())
    dimensions = as_list("dimensions", dimensions, "[0, 1]")
    if not all(map(is_whole_number, dimensions)):
        raise TypeError(f"dimensions must hold whole numbers, got {dimensions!r}")
    chosen = [int(each) for each in dimensions]
    inside = all(0 <= each < len(activity) for each in chosen)
    if not inside or len(set(chosen)) < len(chosen) or len(chosen) != (count or len(chosen) or 1):
        number = "some" if count is None else count
        raise ValueError(
            f"dimensions must be {number} different numbers from 0 to {len(activity) - 1}, got "
            f"{dimensions!r}"
        )
    return chosen


def names_of(site: str, dimensions: Sequence[int], size: int) -> list[str]:
    """Return the names of dimensions of a latent with that many numbers."""
    return [literal(site if size == 1 else f"{site}[{each}]") for each in dimensions]
