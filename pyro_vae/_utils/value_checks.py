"""Switch Pyro's and torch's value checks for a block, then restore them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
from pyro import infer, poutine
from torch.distributions import Distribution


@contextlib.contextmanager
def values_checked(on: bool) -> Iterator[None]:
    """Switch value checks on or off inside the block, then restore the previous state.

    Each of the four switches is restored to its own state, even after an error. In contrast,
    ``pyro.validation_enabled`` sets torch's switch to the state of Pyro's.

    Args:
        on: whether distributions and Pyro check values. False holds for all distributions made
            before the block, even those with their own setting, such as copies by ``expand``. A
            distribution made inside the block with ``validate_args=True`` does check values.

    Example:
        >>> import pyro.distributions as dist
        >>> prior = dist.Normal(0.0, 1.0).expand([2])
        >>> with values_checked(False):
        ...     prior._validate_args
        False
        >>> prior._validate_args
        True
    """
    of_torch = vars(Distribution)["_validate_args"]
    of_pyro = [
        (module.enable_validation, module.is_validation_enabled())
        for module in (dist, infer, poutine)
    ]
    try:
        pyro.enable_validation(on)
        if not on:
            Distribution._validate_args = _Off()
        yield
    finally:
        for enable, before in of_pyro:
            enable(before)
        Distribution._validate_args = of_torch


class _Off:
    """A descriptor ``_validate_args`` that hides the distributions' own values."""

    def __get__(self, distribution: Distribution | None, owner: type | None = None) -> bool:
        return distribution is not None and vars(distribution).get(_ASKED, False)

    def __set__(self, distribution: Distribution, value: Any) -> None:
        vars(distribution)["_validate_args"] = value
        if value:
            vars(distribution)[_ASKED] = True


_ASKED = "_validate_args_inside"
