"""Record the class and constructor arguments of an object, so that it can be rebuilt."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributions.transforms import Transform

from pyro_vae._utils import transform_config
from pyro_vae._utils.checks import checked
from pyro_vae._utils.constructor_calls import constructor_call, shown_value

Class = TypeVar("Class", bound=type)
_INIT_ARGS = "_making"


@dataclass(frozen=True, repr=False)
class Unknown:
    """Placeholder for an argument that a recipe cannot hold, with the kind of the argument."""

    kind: str

    def __repr__(self) -> str:
        return f"<{self.kind}>"


@dataclass(frozen=True, repr=False)
class Described:
    """Placeholder for a transform, with its :mod:`pyro_vae._utils.transform_config`."""

    structure: Any

    def __repr__(self) -> str:
        return _transform_call(self.structure)


class InitArgs:
    """The constructor call that made an object.

    It refers to the arguments without copies. Searches of the object's attributes skip it, because
    the object itself has the arguments that it uses.

    Args:
        cls: class of the object.
        args: positional arguments.
        kwargs: keyword arguments.
    """

    __slots__ = ("args", "cls", "kwargs")

    def __init__(self, cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.cls, self.args, self.kwargs = cls, args, kwargs

    def __deepcopy__(self, memo: dict[int, Any]) -> InitArgs:
        """Refer to arguments' copies if they were copied with the object, else to the originals."""

        def copied(leaf: Any) -> Any:
            return memo.get(id(leaf), leaf)

        return InitArgs(self.cls, _map(copied, self.args), _map(copied, self.kwargs))

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave out functions that cannot be pickled, because the object may not hold them."""
        return InitArgs, (self.cls, _map(_picklable, self.args), _map(_picklable, self.kwargs))


def records_init_args(cls: Class) -> Class:
    """Make the objects of a class record their constructor arguments.

    The constructor also checks arguments against its annotations; see
    :func:`pyro_vae._utils.checks.checked`. The signature and the ``state_dict`` do not change. A
    subclass records its own arguments only if it is decorated, too.

    The objects print as their constructor calls; see :func:`shown_call`.
    """
    original = checked(cls.__init__)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - it replaces it
        original(self, *args, **kwargs)
        making = InitArgs(cls, _map(_kept, args), _map(_kept, kwargs))
        object.__setattr__(
            self, _INIT_ARGS, making
        )  # the last attribute, so that it is copied last

    def __repr__(self: Any) -> str:  # noqa: N807
        return shown_call(self) or super(cls, self).__repr__()

    cls.__init__ = __init__
    if "__repr__" not in vars(cls):
        cls.__repr__ = __repr__
    return cls


def shown_call(thing: Any) -> str | None:
    """Return the constructor call that made an object, or None if no arguments are recorded.

    If an argument is a module, and the object's attribute of the same name is now another module,
    the text shows the present one. Other arguments are those of the call.
    """
    making = getattr(thing, "__dict__", {}).get(_INIT_ARGS)
    if making is None or making.cls is not type(thing):
        return None
    given = inspect.signature(making.cls).bind(*making.args, **making.kwargs).arguments
    for name, value in given.items():
        present = getattr(thing, name, None) if isinstance(value, nn.Module) else None
        if isinstance(present, nn.Module):
            given[name] = present
    return constructor_call(making.cls, given)


def init_args_of(thing: Any) -> dict[str, Any] | None:
    """Return the constructor arguments of an object by name, or None if none are recorded.

    A class may define a method ``as_arguments`` that returns other arguments. Its class method
    ``of_arguments`` then rebuilds the object from them. Without it, the constructor does.
    """
    if hasattr(type(thing), "as_arguments"):
        return _map(_kept, thing.as_arguments())
    making = getattr(thing, "__dict__", {}).get(_INIT_ARGS)
    if making is None or making.cls is not type(thing):
        return None
    return inspect.signature(making.cls).bind(*making.args, **making.kwargs).arguments


def kind_of(thing: Any) -> str:
    """Return an object's kind for a message: its class, and its name if it has one."""
    name = getattr(thing, "__qualname__", None)
    return f"the {type(thing).__name__} {name}" if name else f"a {type(thing).__name__}"


def _transform_call(structure: Any) -> str:
    """Return a constructor call from a structure of :mod:`pyro_vae._utils.transform_config`."""
    if not isinstance(structure, list):
        return shown_value(structure)
    name, *arguments = structure
    options = arguments.pop() if arguments and isinstance(arguments[-1], dict) else {}
    parts = [*map(_transform_call, arguments), *(f"{key}={v}" for key, v in options.items())]
    return f"{name}({', '.join(parts)})"


def _kept(leaf: Any) -> Any:
    """Return the recorded form of an argument."""
    if isinstance(leaf, torch.Tensor):
        return leaf.detach()
    if isinstance(leaf, Transform) and not isinstance(leaf, nn.Module):  # inverses are not copied
        try:
            return Described(transform_config.to_config(leaf))
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
    """Apply a function to the leaves of nested lists, tuples and dictionaries."""
    if isinstance(thing, list | tuple):
        return (list if isinstance(thing, list) else tuple)(_map(function, each) for each in thing)
    if isinstance(thing, dict):
        return {key: _map(function, each) for key, each in thing.items()}
    return function(thing)
