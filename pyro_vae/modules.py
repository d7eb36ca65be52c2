"""Find the torch modules that a program uses, wherever it keeps them.

Evaluation mode, devices and running averages belong to modules, and Pyro does not say which
modules a plain function runs: so they are looked for where its code can reach them by name.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pyro import poutine
from torch import nn


def modules(*programs: Any) -> list[nn.Module]:
    """Return the modules that programs are, are methods of, hold, or refer to by name.

    A function's are found in its closure and its globals, and in those of the functions it calls
    or defines; also inside lists, dictionaries and plain objects that it names.

    Args:
        *programs: callables.
    """
    found: dict[nn.Module, None] = {}
    waiting: deque[Any] = deque(programs)
    seen: dict[int, Any] = {}  # by id, and kept alive, lest an id be given anew
    while waiting:
        thing = waiting.popleft()
        if id(thing) in seen or isinstance(thing, _LEAVES):
            continue
        seen[id(thing)] = thing
        if isinstance(thing, nn.Module):
            found[thing] = None
        waiting.extend(_reachable(thing))
    inner = {id(child) for module in found for child in module.modules() if child is not module}
    return [module for module in found if id(module) not in inner]


def _reachable(thing: Any) -> Iterator[Any]:
    if isinstance(thing, functools.partial):
        yield from (thing.func, *thing.args, *thing.keywords.values())
    elif inspect.ismethod(thing):
        yield from (thing.__self__, thing.__func__)
    elif inspect.isfunction(thing):
        if _package(thing) not in _MACHINERY:
            yield from _names_of(inspect.unwrap(thing))
    elif isinstance(thing, Mapping):
        yield from thing.values()
    elif isinstance(thing, list | tuple | set):
        yield from thing
    elif _is_plain_object(thing):
        yield from vars(thing).values()
        # What its code refers to, as a function's does.
        yield getattr(type(thing), "forward" if isinstance(thing, nn.Module) else "__call__", None)


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
    known = isinstance(thing, nn.Module | types.SimpleNamespace | poutine.messenger.Messenger)
    return known or _package(type(thing)) not in _MACHINERY


def _package(thing: Any) -> str:
    return (getattr(thing, "__module__", None) or "").split(".")[0]


_MACHINERY = {"builtins", "numpy", "pandas", "pyro", "torch"}
_LEAVES = (str, bytes, bool, int, float, complex, type(None), torch.Tensor)
