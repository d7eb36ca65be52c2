"""Short texts for our own messages: of errors from torch, Pyro and user programs, and names."""

from __future__ import annotations

import functools
from typing import Any


def first_line(error: BaseException) -> str:
    r"""Return the first line of an error's message, without its final punctuation.

    torch appends values of tensors to a message, and Pyro the shapes of all sites. The whole
    message remains in the ``__cause__`` of the error that quotes it.

    Example:
        >>> first_line(ValueError("sizes differ:\n Trace Shapes: ..."))
        'sizes differ'
        >>> first_line(KeyError())
        'KeyError'
    """
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .:,") if lines else type(error).__name__


def program_name(program: Any) -> str:
    """Return a short name of a program: of its class, or of a function.

    Example:
        >>> program_name(functools.partial(print, 3))
        'print'
    """
    while isinstance(program, functools.partial):
        program = program.func
    return getattr(program, "__name__", None) or type(program).__name__
