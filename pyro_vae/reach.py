"""What a program's code can reach by name: closures, globals, attributes, containers.

A plain function does not say which modules it runs or on which numbers it depends; this walk
finds them, for whoever moves modules to a device or watches for numbers that change.
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


def reach(**roots: Any) -> Iterator[tuple[str, Any]]:
    """Yield what the roots are, hold, or refer to by name, each once, with a name for it.

    A function's names are looked up in its closure and its globals, and so are those of the
    functions it calls or defines, and of the methods of objects; lists, dictionaries, modules and
    plain objects are looked into.

    Args:
        **roots: callables, by the name that their own names begin with.
    """
    waiting: deque[tuple[str, Any]] = deque(roots.items())
    seen: dict[int, Any] = {}  # by id, and kept alive, lest an id be given anew
    while waiting:
        name, thing = waiting.popleft()
        if isinstance(thing, VALUES):
            yield name, thing
            continue
        if id(thing) in seen:
            continue
        seen[id(thing)] = thing
        yield name, thing
        waiting.extend((name + suffix, each) for suffix, each in _parts(thing))


# Things without parts.
VALUES = (str, bytes, bool, int, float, complex, type(None), torch.Tensor)


def _parts(thing: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(thing, functools.partial):
        yield "", thing.func
        yield from _items(thing.args)
        yield from _items(thing.keywords)
    elif inspect.ismethod(thing):
        yield "", thing.__self__
        yield "", thing.__func__
    elif inspect.isfunction(thing):
        if _package(thing) not in _MACHINERY:
            yield from _names_of(inspect.unwrap(thing))
    elif isinstance(thing, Mapping | list | tuple | set | deque):
        yield from _items(thing)
    elif isinstance(thing, nn.Module):
        yield from _parts_of_module(thing)
    elif _is_plain_object(thing):
        yield from _attributes(vars(thing))
        yield from _parts_of_class(type(thing), vars(thing))


def _items(things: Any) -> Iterator[tuple[str, Any]]:
    pairs = things.items() if isinstance(things, Mapping) else enumerate(things)
    return ((f"[{key!r}]", value) for key, value in pairs)


def _attributes(things: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((f".{name}", value) for name, value in things.items())


def _parts_of_module(module: nn.Module) -> Iterator[tuple[str, Any]]:
    attributes = dict(vars(module))
    for kind in ("_parameters", "_buffers", "_modules"):
        yield from _attributes(attributes.pop(kind))
    if _package(type(module)) in _MACHINERY:  # its own affairs, but for its settings
        attributes = {name: v for name, v in attributes.items() if isinstance(v, VALUES)}
    # Transforms of Pyro keep their last input and output there.
    yield from _attributes({n: v for n, v in attributes.items() if not n.startswith("_cached")})
    yield "", getattr(type(module), "forward", None)
    yield from _parts_of_class(type(module), vars(module))


def _parts_of_class(cls: type, hidden: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What its methods refer to, and its own values; not those of libraries' classes.

    Args:
        cls: of an object.
        hidden: the object's own attributes, behind which those of the class are not seen.
    """
    for base in cls.__mro__:
        if _package(base) in _MACHINERY or _package(base) == __package__:
            continue
        for name, value in vars(base).items():
            if isinstance(value, staticmethod | classmethod):
                value = value.__func__
            elif isinstance(value, property):
                value = value.fget
            if inspect.isfunction(value):
                yield "", value
            elif isinstance(value, VALUES) and not name.startswith("__") and name not in hidden:
                yield f".{name}", value


def _names_of(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
    for name, cell in cells:
        with contextlib.suppress(ValueError):  # a name that is not assigned yet
            yield f".{name}", cell.cell_contents
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        for name in code.co_names:
            value = function.__globals__.get(name, types)  # a module, if there is none
            if not isinstance(value, types.ModuleType | type):
                yield f".{name}", value


def _is_plain_object(thing: Any) -> bool:
    """Whether to look into an object's attributes: not into those of a library's own machinery."""
    if isinstance(thing, types.ModuleType | type) or not hasattr(thing, "__dict__"):
        return False
    known = isinstance(thing, types.SimpleNamespace | poutine.messenger.Messenger)
    return known or _package(type(thing)) not in _MACHINERY


def _package(thing: Any) -> str:
    return (getattr(thing, "__module__", None) or "").split(".")[0]


_MACHINERY = {"builtins", "numpy", "pandas", "pyro", "torch"}
