"""Leave out columns of the data that the programs do not take, such as labels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from pyro_vae._utils.identity import without_handlers
from pyro_vae._utils.user_warnings import warn_user

Program = Callable[..., Any]


class UnusedColumnsWarning(UserWarning):
    """Columns of the data are left out, because the model or the guide does not take them."""


def takes(program: Program, count: int) -> bool:
    """Return whether the signature of a program takes ``count`` columns.

    A program without a signature takes any number.
    """
    program = without_handlers(program)
    function = program.forward if isinstance(program, nn.Module) else program
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # it has no signature
        return True
    return True


def num_columns_taken(programs: Sequence[Program], count: int) -> int:
    """Return the largest number of columns, up to ``count``, that all programs take.

    If there is no such number, it is ``count``, so that calling a program raises the error.
    """
    numbers = range(count, 0, -1)
    return next((n for n in numbers if all(takes(each, n) for each in programs)), count)


def columns_taken(programs: Sequence[Program], columns: Sequence[Any]) -> Sequence[Any]:
    """Return the first columns, those that all programs take, and warn if there are others.

    Args:
        programs: programs that are called with the columns.
        columns: x and covariates.
    """
    taken = num_columns_taken(programs, len(columns))
    if taken < len(columns):
        _warn(len(columns), taken)
    return columns[:taken]


def _warn(count: int, taken: int) -> None:
    first = "x alone" if taken == 1 else f"the first {taken}"
    warn_user(
        f"the data have {count} columns, but model and guide take {first}. The others, such as "
        f"labels, are left out. To use them, add arguments to both programs",
        UnusedColumnsWarning,
        key="unused columns",
    )
