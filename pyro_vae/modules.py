"""Find the torch modules that a program uses, wherever it keeps them.

Evaluation mode, devices and running averages belong to modules, and Pyro does not say which
modules a plain function runs: so they are looked for where its code can reach them by name.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn


def modules(*programs: Any) -> list[nn.Module]:
    """Return the modules that programs are, are methods of, hold, or refer to by name.

    A function's are found in its closure and its globals, and in those of the functions it calls
    or defines; also inside lists, dictionaries and plain objects that it names.

    Args:
        *programs: callables.
    """
    found: dict[nn.Module, None] = {}
    waiting, seen = list(programs), set()
    kept = []  # ids are those of living objects only
    while waiting:
        thing = waiting.pop(0)
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        kept.append(thing)
        if isinstance(thing, nn.Module):
            found[thing] = None
        waiting += _reachable(thing)
    inner = {id(child) for module in found for child in module.modules() if child is not module}
    return [module for module in found if id(module) not in inner]


def _reachable(thing: Any) -> Iterator[Any]:
    if isinstance(thing, functools.partial):
        yield from (thing.func, *thing.args, *thing.keywords.values())
    elif inspect.ismethod(thing):
        yield from (thing.__self__, thing.__func__)
    elif inspect.isfunction(thing):
        yield from _names_of(inspect.unwrap(thing))
    elif isinstance(thing, Mapping):
        yield from thing.values()
    elif isinstance(thing, list | tuple | set):
        yield from thing
    elif _is_plain_object(thing):
        yield from vars(thing).values()


def _names_of(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # a name that is not assigned yet
            yield cell.cell_contents
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        for name in code.co_names:
            value = function.__globals__.get(name)
            if not isinstance(value, types.ModuleType | type):
                yield value


def _is_plain_object(thing: Any) -> bool:
    """Whether to look into an object's attributes: not into those of a library's own machinery."""
    if isinstance(thing, types.ModuleType | type) or not hasattr(thing, "__dict__"):
        return False
    package = type(thing).__module__.split(".")[0]
    return isinstance(thing, nn.Module | types.SimpleNamespace) or package not in {
        "builtins",
        "numpy",
        "pandas",
        "torch",
    }
