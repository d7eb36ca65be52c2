"""Read the modes and flags of programs, to see whether they may run differently than before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from pyro_vae._utils.identity import method_of, without_handlers
from pyro_vae._utils.modules import modules
from pyro_vae._utils.referenced_objects import referenced_objects

_FLAGS = (bool, str, type(None))


def flags_of(*programs: Callable[..., Any]) -> tuple[Any, list[nn.Module]]:
    """Return the modes and flags that programs refer to by name, and their modules.

    Flags are truth values, strings and small integers. A larger integer may count the steps.

    Args:
        *programs: callables.
    """
    found = modules(*programs)
    roots = {f"program {number}": program for number, program in enumerate(programs)}
    flags = [
        (name, value)
        for name, value in referenced_objects(**roots)
        if type(value) in _FLAGS or (type(value) is int and value in range(-1, 10))
    ]
    modes = [part.training for module in found for part in module.modules()]
    return (modes, [*map(key_of, programs)], flags), found


def key_of(program: Callable[..., Any]) -> int | None:
    """Return a number that differs for partials of one function with other arguments."""
    try:
        return hash(method_of(without_handlers(program)))
    except TypeError:  # an argument without a hash
        return None
