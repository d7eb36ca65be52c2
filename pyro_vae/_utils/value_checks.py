"""Pyro's and torch's checks of values, switched for a block and put back as they were."""

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
    """Switch the checks of values on or off inside the block, then restore the previous state.

    ``pyro.validation_enabled`` gives torch's distributions the state of Pyro's afterwards; here
    each of the four switches gets its own state back, after an error too.

    Args:
        on: whether distributions and Pyro check values. Off, it holds for all distributions that
            were made before the block, even those that keep a setting of their own: a copy by
            ``expand`` keeps the one that was valid when it was made. A distribution that is made
            inside the block with ``validate_args=True`` checks values.

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
    """The attribute ``_validate_args`` of all distributions, their own values hidden behind it."""

    def __get__(self, distribution: Distribution | None, owner: type | None = None) -> bool:
        return distribution is not None and vars(distribution).get(_ASKED, False)

    def __set__(self, distribution: Distribution, value: Any) -> None:
        vars(distribution)["_validate_args"] = value
        if value:
            vars(distribution)[_ASKED] = True


_ASKED = "_validate_args_inside"
