"""Find the objects that a program's code can reach by name.

A plain function does not list the modules that it runs or the numbers that it uses. This search
finds them in closures, globals, attributes and containers. It is used to move modules to a device
and to detect numbers that change.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from pyro import poutine
from torch import nn
from torch.distributions import Distribution, Transform

from pyro_vae._utils.code_names import (
    MACHINERY,
    PACKAGE,
    is_installed,
    named_by,
    of_libraries,
    package,
)


def referenced_objects(**roots: Any) -> Iterator[tuple[str, Any]]:
    """Yield the roots and all objects that they hold or refer to, each once, with its name.

    A function's names are looked up in its closure, defaults, globals and imported modules. The
    same holds for functions that it calls, wraps or defines, and for methods of objects. Lists,
    dictionaries, modules, classes and plain objects are searched, too.

    Args:
        **roots: callables. Each keyword is the prefix of the yielded names.
    """
    waiting: deque[tuple[str, Any]] = deque(roots.items())
    seen: dict[int, Any] = {}  # by id, and kept alive so that no id is reused
    while waiting:
        name, thing = waiting.popleft()
        if isinstance(thing, VALUES):
            yield name, thing
            continue
        if type(thing) in weakref.ProxyTypes:
            thing = _behind(thing)
        if id(thing) in seen:
            continue
        seen[id(thing)] = thing
        yield name, thing
        if type(thing) not in _BUILT_IN or thing:
            waiting.extend((name + suffix, each) for suffix, each in _parts(thing))


# Types of objects without parts.
VALUES = (str, bytes, bool, int, float, complex, type(None), torch.Tensor)
_CONTAINERS = (Mapping, list, tuple, set, frozenset, deque)
_BUILT_IN = {dict, list, tuple, set, frozenset, deque, OrderedDict}
_BOUND = (types.MethodType, types.BuiltinMethodType, types.MethodWrapperType)
_OF_C = (types.MemberDescriptorType, types.GetSetDescriptorType)
_ITERATORS: tuple[type, ...] = (type(iter([])), type(iter(())))
_OF_DISTRIBUTIONS = (nn.Module, Distribution, Transform, list, tuple)


def _parts(thing: Any) -> Iterator[tuple[str, Any]]:
    if type(thing) in _BUILT_IN:
        yield from _items(thing)
    elif isinstance(thing, nn.Module):
        yield from _parts_of_module(thing)
    elif isinstance(thing, functools.partial):
        yield "", thing.func
        yield from _items(thing.args)
        yield from _items(thing.keywords)
    elif isinstance(thing, _BOUND):
        if not isinstance(thing.__self__, types.ModuleType):
            yield "", thing.__self__
        if isinstance(thing, types.MethodType):
            yield "", thing.__func__
    elif inspect.isfunction(thing):
        yield from named_by(thing)
    elif isinstance(thing, weakref.ref):
        yield "", thing()
    elif isinstance(thing, contextvars.ContextVar):
        yield "", thing.get(None)
    elif isinstance(thing, type):
        # An installed class may hold all of its objects, as that of a progress bar does.
        if not (of_libraries(thing) or is_installed(thing)):
            yield from _parts_of_class(thing, {})
            yield from _parts_of_class(type(thing), {})
    elif isinstance(thing, Distribution | Transform) and package(type(thing)) in MACHINERY:
        # Skip their tensors, which are temporary.
        found = vars(thing).items()
        yield from ((f".{n}", v) for n, v in found if isinstance(v, _OF_DISTRIBUTIONS))
    elif isinstance(thing, types.GeneratorType):
        yield from _attributes(thing.gi_frame.f_locals if thing.gi_frame else {})
    elif isinstance(thing, _ITERATORS):
        yield from _items(thing.__reduce__()[1])  # what it iterates over
    elif isinstance(thing, np.ndarray):
        yield from _items(thing.flat if thing.dtype.hasobject else ())
    else:
        if isinstance(thing, _CONTAINERS):
            yield from _items(thing)
        if _is_plain_object(thing):
            attributes = {**getattr(thing, "__dict__", {}), **_slots(thing)}
            yield from _attributes(attributes)
            yield from _parts_of_class(type(thing), attributes)
        elif "__wrapped__" in getattr(thing, "__dict__", {}):
            yield "", vars(thing)["__wrapped__"]


def _items(things: Any) -> Iterator[tuple[str, Any]]:
    pairs = things.items() if isinstance(things, Mapping) else enumerate(things)
    for number, (key, value) in enumerate(pairs):
        plain = isinstance(key, (*VALUES, tuple))
        yield f"[{key!r}]" if plain else f".values()[{number}]", value
        if not plain:
            yield f".keys()[{number}]", key


def _behind(proxy: Any) -> Any:
    """Return the object of a weak proxy, or None if it no longer exists."""
    try:
        return proxy.__repr__.__self__
    except ReferenceError:
        return None


def _attributes(things: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((f".{name}", value) for name, value in things.items())


def _slots(thing: Any) -> dict[str, Any]:
    """Return the values of an object's slots, by name."""
    cls = type(thing)
    if cls not in _slots_of:
        _slots_of[cls] = [
            name
            for base in cls.__mro__
            if package(base) not in (*MACHINERY, PACKAGE)
            for name, value in vars(base).items()
            if isinstance(value, types.MemberDescriptorType)
        ]
    return {name: getattr(thing, name) for name in _slots_of[cls] if hasattr(thing, name)}


_slots_of: weakref.WeakKeyDictionary[type, list[str]] = weakref.WeakKeyDictionary()


def _parts_of_module(module: nn.Module) -> Iterator[tuple[str, Any]]:
    attributes = dict(vars(module))
    for kind in ("_parameters", "_buffers", "_modules"):
        yield from _attributes(attributes.pop(kind))
    if package(type(module)) in MACHINERY:  # skip internals, except attributes that users set
        attributes = {
            name: v
            for name, v in attributes.items()
            if isinstance(v, VALUES) or name in _GIVEN or not name.startswith("_")
        }
    for name, value in attributes.items():
        # Pyro's transforms cache their last input and output in attributes with this name.
        if not (name.startswith("_cached") or (name in _HOOKS and not value)):
            yield f".{name}", value
    yield "", getattr(type(module), "forward", None)
    yield from _parts_of_class(type(module), vars(module))


# The dictionaries of hooks of each module, most of which are empty.
_HOOKS = frozenset(n for n, value in vars(nn.Module()).items() if isinstance(value, OrderedDict))
_GIVEN = {"_forward_hooks", "_forward_pre_hooks", "_pyro_samples"}


def _parts_of_class(cls: type, hidden: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the methods and values of a class, except those of libraries' classes.

    Args:
        cls: a class, or the class of an object.
        hidden: the object's own attributes, which hide class attributes of the same name.
    """
    for base in cls.__mro__:
        if of_libraries(base):
            continue
        for name, value in vars(base).items():
            if isinstance(value, staticmethod | classmethod):
                value = value.__func__
            elif isinstance(value, property):
                value = value.fget
            if inspect.isfunction(value):
                yield "", value
            elif not (name.startswith("__") or name in hidden or isinstance(value, _OF_C)):
                yield f".{name}", value


def _is_plain_object(thing: Any) -> bool:
    """Return True if an object's attributes should be searched: not those of library internals."""
    if isinstance(thing, types.ModuleType):
        return False
    known = isinstance(thing, types.SimpleNamespace | poutine.messenger.Messenger)
    return known or package(type(thing)) not in MACHINERY
