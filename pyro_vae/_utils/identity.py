"""Identify the program inside partials and Pyro's handlers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import types
import weakref
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.messenger import Messenger
from torch.utils.weak import WeakIdKeyDictionary


def owner_of(program: Callable[..., Any]) -> Any:
    """Return the object whose lifetime a program shares: the function, or a method's instance."""
    core = _core(program)
    return getattr(core, "__self__", core)


def is_blocked(program: Callable[..., Any]) -> bool:
    """Return whether ``poutine.block`` is around a program, which may hide its parameters."""
    while isinstance(program, functools.partial):
        handler = _handler(program)
        if isinstance(handler, BlockMessenger):
            return True
        program = program.func if handler is None else program.args[-1]
    return False


def method_of(program: Callable[..., Any]) -> Any:
    """Return a key that distinguishes the programs of one owner.

    Two partials of a function with equal arguments are one program. Numbers, strings, arrays and
    containers of them are compared by type and value. Hashable objects are compared by ``==``,
    which is identity for tensors and modules. All other objects are compared by identity.
    """
    of_owner = getattr(_core(program), "__func__", None)
    if not isinstance(program, functools.partial):
        return of_owner
    if (handler := _handler(program)) is not None:
        return of_owner, handler  # no function, which would keep the owner alive
    try:
        return of_owner, (_key(program.args), _key(program.keywords))
    except RecursionError:  # an argument contains itself
        return of_owner, weakref.ref(program)  # weak, so that the owner is not kept alive


def without_handlers(program: Callable[..., Any]) -> Callable[..., Any]:
    """Return the program inside Pyro's handlers, which may be a partial."""
    while isinstance(program, functools.partial) and _handler(program) is not None:
        program = program.args[-1]
    return program


def function_of(method: Any) -> Any:
    """Return the function of a key from :func:`method_of`, without the arguments of a partial."""
    return method[0] if isinstance(method, tuple) else method


class ProgramMap:
    """Values by program, kept for as long as the programs exist.

    Programs are compared by owner and function, so all partials of a function share one value. A
    program without weak references gets no value.
    """

    def __init__(self) -> None:
        self._values = WeakIdKeyDictionary()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, program: Callable[..., Any]) -> bool:
        return function_of(method_of(program)) in self._of_owner(program)

    def __setitem__(self, program: Callable[..., Any], value: Any) -> None:
        with contextlib.suppress(TypeError):
            of_owner = self._values.setdefault(owner_of(program), {})
            of_owner[function_of(method_of(program))] = value

    def get(self, program: Callable[..., Any], default: Any = None) -> Any:
        """Return the value of a program, or a default."""
        return self._of_owner(program).get(function_of(method_of(program)), default)

    def _of_owner(self, program: Callable[..., Any]) -> dict[Any, Any]:
        try:
            return self._values.get(owner_of(program), {})
        except TypeError:
            return {}


def _core(program: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function or method inside partials and Pyro's handlers."""
    while isinstance(program, functools.partial):
        program = program.func if _handler(program) is None else program.args[-1]
    return program


def _handler(program: functools.partial) -> Messenger | None:
    """Return the Pyro handler if the partial is one applied to a function, or None."""
    return next((a for a in program.args if isinstance(a, Messenger)), None)


def _key(value: Any) -> Any:
    """Return a hashable key that is equal for equal values of one type."""
    kind = type(value)
    if isinstance(value, Mapping):
        return kind, frozenset((_key(k), _key(v)) for k, v in value.items())
    if isinstance(value, set | frozenset):
        return kind, frozenset(_keys(value))
    if isinstance(value, list | tuple):
        return kind, _keys(value)
    if isinstance(value, np.ndarray):
        values = _keys(value.flat) if value.dtype.hasobject else value.tobytes()
        return kind, value.dtype, value.shape, values
    if isinstance(value, slice):
        return kind, _keys((value.start, value.stop, value.step))
    if isinstance(value, types.SimpleNamespace | Namespace):
        return kind, _key(vars(value))
    try:
        hash(value)
    except TypeError:
        if dataclasses.is_dataclass(value):
            return kind, _keys(getattr(value, field.name) for field in dataclasses.fields(value))
        return _Same(value)
    return kind, value


def _keys(values: Iterable[Any]) -> tuple:
    return tuple(_key(value) for value in values)


class _Same:
    """A key that compares an object by identity and keeps it alive."""

    def __init__(self, thing: Any):
        self._thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._thing is other._thing

    def __hash__(self) -> int:
        return id(self._thing)
