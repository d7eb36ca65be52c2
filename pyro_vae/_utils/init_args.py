"""How an object was made: its class and its arguments, remembered for whoever makes it again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributions.transforms import Transform

from pyro_vae._utils import transform_config as mappings
from pyro_vae._utils.checks import checked

Class = TypeVar("Class", bound=type)
_INIT_ARGS = "_making"


@dataclass(frozen=True)
class Unknown:
    """In place of an argument that no recipe can tell: what kind of thing it was."""

    kind: str


@dataclass(frozen=True)
class Described:
    """In place of a transform: what :mod:`pyro_vae._utils.transform_config` says of it."""

    structure: Any


class InitArgs:
    """The call that made an object.

    It holds the arguments by reference. Walks over the object's attributes do not look into it:
    what the object needs of them, it holds itself.

    Args:
        cls: class of the object.
        args: positional arguments.
        kwargs: keyword arguments.
    """

    __slots__ = ("args", "cls", "kwargs")

    def __init__(self, cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.cls, self.args, self.kwargs = cls, args, kwargs

    def __deepcopy__(self, memo: dict[int, Any]) -> InitArgs:
        """Refer to the copies of what was copied with the object, before, and to all else as is."""

        def copied(leaf: Any) -> Any:
            return memo.get(id(leaf), leaf)

        return InitArgs(self.cls, _map(copied, self.args), _map(copied, self.kwargs))

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave functions out that cannot be pickled: the object may well be without them."""
        return InitArgs, (self.cls, _map(_picklable, self.args), _map(_picklable, self.kwargs))


def records_init_args(cls: Class) -> Class:
    """Let the objects of a class remember the arguments that they were made with.

    Its constructor refuses arguments that its annotations rule out; see
    :func:`pyro_vae._utils.checks.checked`. Nothing else changes: neither the signature nor what
    a ``state_dict`` holds. A subclass remembers its own arguments if it is recorded, too.
    """
    original = checked(cls.__init__)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - it becomes it
        original(self, *args, **kwargs)
        making = InitArgs(cls, _map(_kept, args), _map(_kept, kwargs))
        object.__setattr__(
            self, _INIT_ARGS, making
        )  # the last attribute, so that it is copied last

    cls.__init__ = __init__
    return cls


def init_args_of(thing: Any) -> dict[str, Any] | None:
    """Return the arguments that an object is made of, by name; None if it does not tell.

    A class may tell others than it was made with, by a method ``as_arguments``; what makes an
    object of those is its class method ``of_arguments``, if it has one, or its constructor.
    """
    if hasattr(type(thing), "as_arguments"):
        return _map(_kept, thing.as_arguments())
    making = getattr(thing, "__dict__", {}).get(_INIT_ARGS)
    if making is None or making.cls is not type(thing):
        return None
    return inspect.signature(making.cls).bind(*making.args, **making.kwargs).arguments


def kind_of(thing: Any) -> str:
    """Name an object's kind for a message: its name, if it has one, or its class."""
    name = getattr(thing, "__qualname__", None)
    return f"the {type(thing).__name__} {name}" if name else f"a {type(thing).__name__}"


def _kept(leaf: Any) -> Any:
    """What is remembered of an argument."""
    if isinstance(leaf, torch.Tensor):
        return leaf.detach()
    if isinstance(leaf, Transform) and not isinstance(leaf, nn.Module):  # inverses are not copied
        try:
            return Described(mappings.to_config(leaf))
        except TypeError as error:
            return Unknown(str(error))
    return leaf


def _picklable(leaf: Any) -> Any:
    function = leaf
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__qualname__", "") if inspect.isroutine(function) else ""
    return Unknown(kind_of(function)) if "<" in name else leaf  # <lambda> and <locals>


def _map(function: Callable[[Any], Any], thing: Any) -> Any:
    """Apply a function to what lists, tuples and dictionaries hold."""
    if isinstance(thing, list | tuple):
        return (list if isinstance(thing, list) else tuple)(_map(function, each) for each in thing)
    if isinstance(thing, dict):
        return {key: _map(function, each) for key, each in thing.items()}
    return function(thing)
