"""Arguments held to the annotations of a signature: one check for the constructors of all parts."""

from __future__ import annotations

import functools
import inspect
import numbers
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
from torch import nn

Function = TypeVar("Function", bound=Callable[..., Any])

_FULL = (RuntimeError, MemoryError, OverflowError)  # what torch raises for sizes beyond memory
_LONGEST = 60
_LARGEST = 3.4e38  # of float32


def checked(function: Function) -> Function:
    """Let a function refuse arguments that its annotations rule out, before it runs.

    ``int`` is a whole number and ``float`` a finite number, of Python or numpy, and neither is a
    truth value; ``bool`` is a truth value; what is to be a module or ``Callable`` can be called;
    a ``Sequence`` of numbers or names holds these, and is no string. Other classes and what numbers
    are in range, the function checks itself.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: a number is NaN or infinite; sizes are beyond the memory that there is.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def held(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # Python says what is wrong
        given = bound.arguments
        for name, value in given.items():
            given[name] = value = _plain(value)
            several = signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
            for each in value if several else (value,):
                _check(name, each, _annotations(function).get(name, Any))
        try:
            return function(*bound.args, **bound.kwargs)
        except _FULL as error:
            numbers_given = {n: v for n, v in given.items() if _holds_numbers(v)}
            if not numbers_given:
                raise
            told = ", ".join(f"{name}={shown(value)}" for name, value in numbers_given.items())
            raise ValueError(f"nothing can be made with {told}: {error}") from error

    return typing.cast(Function, held)


def shown(value: Any) -> str:
    """Show an argument in a message, by its kind if it is long."""
    if hasattr(value, "shape"):
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= _LONGEST else f"an object of {type(value).__name__}"


@functools.cache
def _annotations(function: Callable[..., Any]) -> dict[str, Any]:
    return typing.get_type_hints(function)


def _check(name: str, value: Any, wanted: Any) -> None:
    if not _fits(value, wanted):
        raise TypeError(f"{name} must be {_described(wanted)}, got {shown(value)}")
    limited = wanted in (int, float, int | None, float | None)
    if limited and value is not None and not _finite(value):
        raise ValueError(f"{name} must be finite, got {shown(value)}")
    if _may_hold_floats(wanted) and not isinstance(value, str) and isinstance(value, Iterable):
        for each in value:
            if not _finite(each):
                raise ValueError(f"{name} must hold finite numbers, got {shown(value)}")


def _fits(value: Any, wanted: Any) -> bool:
    origin, inside = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in inside)
    if wanted is Any:  # a class, in some Pythons
        return True
    if wanted is None or wanted is type(None):
        return value is None
    if wanted is bool:
        return isinstance(value, bool)
    if wanted in (int, float):
        kind = numbers.Integral if wanted is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool)
    if Callable in (wanted, origin) or wanted is nn.Module:
        return callable(value)
    if origin in (Sequence, tuple) and inside[0] in _KINDS:
        each = inside[0]
        rows = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        return rows and all(_fits(one, each) for one in value)
    return wanted is not str or isinstance(value, str)


def _may_hold_floats(wanted: Any) -> bool:
    each = typing.get_args(wanted)
    if typing.get_origin(wanted) in (typing.Union, types.UnionType):
        return any(map(_may_hold_floats, each))
    return typing.get_origin(wanted) in (Sequence, tuple) and float in each


def _finite(value: numbers.Real) -> bool:
    """Tell whether tensors can hold a number."""
    limit = 2**63 - 1 if isinstance(value, numbers.Integral) else _LARGEST
    return abs(value) <= limit  # NaN is not


def _plain(value: Any) -> Any:
    """Return numpy's numbers as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    return value


def _holds_numbers(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return bool(value) and all(map(_holds_numbers, value))
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a string",
    type(None): "None",
}
_EXAMPLES = {int: ", such as [8]", float: ", such as [0.5]"}


def _described(wanted: Any) -> str:
    origin, inside = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_described, inside))
    if wanted is nn.Module:
        return "a module, or a function of tensors"
    if Callable in (wanted, origin):
        return "something to call"
    if origin in (Sequence, tuple):
        return f"a sequence{_EXAMPLES.get(inside[0], '')}"
    return _KINDS.get(wanted, getattr(wanted, "__name__", str(wanted)))
