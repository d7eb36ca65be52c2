"""Checks of arguments and tensors, whose errors name the argument."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyro_vae._utils.messages import first_line

Function = TypeVar("Function", bound=Callable[..., Any])

_SMALLEST, _LARGEST = 1.2e-38, 3.4e38  # of float32
_TOO_LARGE = 2**63  # for an integer of torch
_FULL = (RuntimeError, MemoryError, OverflowError)  # errors of torch for sizes beyond memory
_LONGEST = 60  # characters of a value in a message


# Numbers


def is_whole_number(value: Any) -> bool:
    """Return True if a value is an integer of Python or numpy, and not a Boolean."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Return True if a value is a real number of Python or numpy, and not a Boolean."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_finite(value: numbers.Real) -> bool:
    """Return True if torch can hold a number: an integer in int64, others in float32."""
    # NaN compares as False.
    return abs(value) < _TOO_LARGE if is_whole_number(value) else abs(value) <= _LARGEST


def positive_integer(name: str, value: Any, minimum: int = 1) -> int:
    """Return the value as an int, if it is an integer of at least ``minimum``.

    Raises:
        TypeError: The value is not an integer.
        ValueError: The value is below the minimum, or at least 2**63.
    """
    if not is_whole_number(value):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value >= _TOO_LARGE:
        raise ValueError(f"{name} must be below 2**63, got {shown(int(value))}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return int(value)


def positive_number(name: str, value: Any) -> float:
    """Return the value as a float, if it is finite and above zero.

    Raises:
        TypeError: The value is not a number.
        ValueError: The value is not above zero, or is infinite, or NaN.
    """
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 < (number := _in_float32(value)) < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return number


def nonnegative_number(name: str, value: Any) -> float:
    """Return the value as a float, if it is finite and not below zero.

    Raises:
        TypeError: The value is not a number.
        ValueError: The value is below zero, or is infinite, or NaN.
    """
    if (number := real_number(name, value)) < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
    return number


def real_number(name: str, value: Any) -> float:
    """Return the value as a float, if it is finite.

    Raises:
        TypeError: The value is not a number.
        ValueError: The value is infinite or NaN.
    """
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(number := _in_float32(value)):
        raise ValueError(f"{name} must be finite, got {value}")
    return number


def _in_float32(value: numbers.Real) -> float:
    """Return zero or infinity if torch cannot hold a number; see :func:`is_finite`."""
    if abs(value) < _SMALLEST:
        return 0.0
    if value == value and not is_finite(value):  # NaN stays
        return math.inf if value > 0 else -math.inf
    return float(value)


def truth_value(name: str, value: Any) -> bool:
    """Return the value as a bool, if it is a Boolean of Python or numpy.

    Raises:
        TypeError: The value is not a Boolean.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def require_callable(name: str, value: Any) -> None:
    """Raise TypeError if a value cannot be called."""
    if not callable(value):
        raise TypeError(f"{name} must be callable, got {shown(value)}")


def require_distribution(name: str, value: Any) -> TorchDistributionMixin:
    """Return the distribution that a component of a model has returned.

    Raises:
        TypeError: The value is not a distribution of Pyro.
    """
    if not isinstance(value, TorchDistributionMixin):
        raise TypeError(
            f"{name} must be a function or a module that returns a distribution of "
            f"pyro.distributions, but it returned {shown(value)}. Make the distribution with "
            "pyro.distributions instead of torch.distributions, and pass a function that "
            "returns it instead of the distribution itself"
        )
    return value


# Tensors. These checks use dtypes and shapes but no values, so that they do not synchronize with a
# device. A captured step runs without them.


class ShapeError(ValueError):
    """Error for a tensor whose shape a component does not accept."""


def require_word(name: str, value: Any, words: Sequence[str], other: str | None = None) -> None:
    """Raise ValueError if an argument is not one of a few words.

    Args:
        name: of the argument.
        value: of the argument, of any type.
        words: allowed values.
        other: text of another allowed value, which the caller has excluded.
    """
    if isinstance(value, str) and value in words:
        return
    choices = [f'"{word}"' for word in words] + ([] if other is None else [other])
    text = " or ".join([", ".join(choices[:-1]), choices[-1]])
    raise ValueError(f"{name} must be {text}, got {shown(value)}")


def require_tensor(name: str, value: Any) -> Tensor:
    """Return the value, if it is a dense tensor of real numbers or Booleans.

    Raises:
        TypeError: The value is not such a tensor.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested or value.is_complex() or value.is_quantized:
        raise TypeError(
            f"{name} must be a dense tensor of real numbers, got layout {value.layout} and dtype "
            f"{value.dtype}"
        )
    return value


def require_batch(name: str, value: Any) -> int:
    """Return the number of rows of a minibatch.

    Raises:
        TypeError: The value is not a dense tensor of real numbers.
        ShapeError: The minibatch is empty.
    """
    shape = require_tensor(name, value).shape
    if not shape or 0 in shape:
        raise ShapeError(
            f"{name} must be of shape (B, *event) and not empty, got shape {tuple(shape)}"
        )
    return shape[0]


def require_floats(name: str, value: Any, last: tuple[int, ...]) -> Tensor:
    """Return the value, if it is a floating-point tensor with given last dimensions.

    Args:
        name: name of the argument in messages.
        value: the tensor.
        last: sizes of the last dimensions.

    Raises:
        TypeError: The value is not a dense tensor of floating-point numbers.
        ShapeError: The last dimensions have other sizes.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = f"dtype {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a tensor of floating-point numbers, got {kind}")
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    if value.shape[max(0, value.dim() - len(last)) :] != last:
        sizes = ", ".join(map(str, last))
        raise ShapeError(f"{name} must be of shape (..., {sizes}), got {tuple(value.shape)}")
    return value


def require_same_type(name: str, value: Tensor, parameter: Tensor) -> None:
    """Raise TypeError if the dtype or device of a value differs from the parameters'."""
    if value.dtype != parameter.dtype or value.device != parameter.device:
        raise TypeError(
            f"{name} must be of the parameters' {parameter.dtype} and on their "
            f"{parameter.device}, got {value.dtype} on {value.device}"
        )


# Signatures


def checked(function: Function) -> Function:
    """Check the arguments of each call against the annotations of a function.

    ``int`` means an integer and ``float`` a finite number, of Python or numpy, but not a Boolean.
    ``bool`` means a Boolean. A module or ``Callable`` must be callable. A ``Sequence`` of numbers
    or names contains these and is not a string. It may be an array of one dimension. A ``Path`` may
    be any path, and a device may be a number. The function itself checks classes of torch, Pyro and
    this package, and the range of a number.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A number is NaN or infinite, or sizes exceed the memory of the machine.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def held(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # raises Python's own error
        given = bound.arguments
        for name, value in given.items():
            wanted, kind = annotations_of(function).get(name, Any), signature.parameters[name].kind
            if wanted is Any or kind is inspect.Parameter.VAR_KEYWORD:
                continue
            given[name] = value = _plain(value, wanted)
            for each in value if kind is inspect.Parameter.VAR_POSITIONAL else (value,):
                _check(name, each, wanted)
        try:
            return function(*bound.args, **bound.kwargs)
        except _FULL as error:
            found = {name: value for name, value in given.items() if _holds_numbers(value)}
            if not found:
                raise
            text = ", ".join(f"{name}={shown(value)}" for name, value in found.items())
            raise ValueError(f"cannot run with {text}: {first_line(error)}") from error

    return typing.cast(Function, held)


def check_call(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Check the arguments of one call against the annotations of a function, inside the function.

    A decorator would change the line that a warning refers to. Callables, mappings and sequences
    are not checked, because the function itself has better messages for them.

    Args:
        function: the function.
        given: its arguments by name, such as ``locals()`` in its first line.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A number is NaN or infinite.
    """
    for name, wanted in annotations_of(function).items():
        if name in given and wanted is not Any and not _holds_others(wanted):
            value = given[name]
            # The function receives the original value, and may test whether it ``is`` True.
            of_numpy = isinstance(value, np.bool_) and wanted is not bool
            _check(name, value if of_numpy else _plain(value, wanted), wanted)


def shown(value: Any) -> str:
    """Return the text of an argument for a message, or its type if the text is long."""
    if isinstance(value, Tensor) and value.is_nested:
        return "a nested tensor"
    if hasattr(value, "shape"):
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= _LONGEST else f"an object of {type(value).__name__}"


@functools.cache
def annotations_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations of a function, with Any for names only type checkers import."""
    try:
        return typing.get_type_hints(function)
    except NameError:
        names = inspect.unwrap(function).__globals__
        return {
            argument: _resolved(argument, annotation, names)
            for argument, annotation in function.__annotations__.items()
        }


def _resolved(argument: str, annotation: Any, names: dict[str, Any]) -> Any:
    holder = types.SimpleNamespace(__annotations__={argument: annotation})
    try:
        return typing.get_type_hints(holder, names)[argument]
    except NameError:
        return Any


def _check(name: str, value: Any, wanted: Any) -> None:
    if not _fits(value, wanted):
        raise TypeError(f"{name} must be {_described(wanted)}, got {shown(value)}")
    limited = wanted in (int, float, int | None, float | None)
    if limited and value is not None and not is_finite(value):
        raise ValueError(f"{name} must be finite, got {shown(value)}")
    if _may_hold_numbers(wanted) and isinstance(value, Sequence) and not isinstance(value, str):
        for each in value:
            if not is_finite(each):
                raise ValueError(f"{name} must hold finite numbers, got {shown(value)}")


def _fits(value: Any, wanted: Any) -> bool:
    origin, inside = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in inside)
    if wanted is Any:  # a class, in some versions of Python
        return True
    if wanted is None or wanted is type(None):
        return value is None
    if wanted is bool:
        return isinstance(value, bool)
    if wanted in (int, float):
        return is_whole_number(value) if wanted is int else is_number(value)
    if Callable in (wanted, origin) or wanted is nn.Module:
        return callable(value)
    if origin in (Sequence, tuple) and inside[0] in _KINDS:
        each = inside[0]
        rows = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        return rows and all(_fits(one, each) for one in value)
    if wanted is torch.device:
        return isinstance(value, torch.device) or is_whole_number(value)
    if wanted is Path:
        return isinstance(value, os.PathLike)
    wanted = origin or wanted
    if not isinstance(wanted, type) or wanted.__module__.startswith(("torch", "pyro")):
        return True
    return origin in (Sequence, tuple) or isinstance(value, wanted)


def _holds_others(wanted: Any) -> bool:
    origin, inside = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return any(map(_holds_others, inside))
    return origin in (Callable, Mapping, Sequence, tuple)


def _may_hold_numbers(wanted: Any) -> bool:
    origin, inside = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return any(map(_may_hold_numbers, inside))
    return origin in (Sequence, tuple) and inside[0] in (int, float)


def _plain(value: Any, wanted: Any) -> Any:
    """Return numpy numbers as Python numbers, and a vector as a list if a sequence is wanted."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.ndim == 1 and _may_hold_numbers(wanted):
        return value.tolist()
    if type(value) in (list, tuple):
        return type(value)(_plain(each, None) for each in value)
    return value


def _holds_numbers(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return bool(value) and all(map(_holds_numbers, value))
    return is_number(value)


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
        return "callable"
    if Mapping in (wanted, origin):
        return "a dictionary"
    if origin in (Sequence, tuple):
        return f"a sequence{_EXAMPLES.get(inside[0], '')}"
    return _KINDS.get(wanted, getattr(wanted, "__name__", str(wanted)))
