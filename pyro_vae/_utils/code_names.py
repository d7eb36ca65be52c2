"""Find the objects that a function's code refers to by name.

These are in its closure, globals, defaults, imports and the function that it wraps.
"""

from __future__ import annotations

import contextlib
import dis
import sys
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

# The search skips the objects of these packages, and the code of their functions and classes.
PACKAGE = __name__.partition(".")[0]
MACHINERY = {"builtins", "numpy", "pandas", "pyro", "torch"}
_IMPORT = dis.opmap["IMPORT_NAME"]
_NOT_FOLLOWED = MACHINERY | {PACKAGE} | set(sys.stdlib_module_names)


def package(thing: Any) -> str:
    """Return the name of the package that defines a function, class or module."""
    name = thing.__name__ if isinstance(thing, types.ModuleType) else thing.__module__
    return (name if isinstance(name, str) else "").split(".")[0]


def of_libraries(thing: Any) -> bool:
    """Return True if a function, class or module is from a known library or this package."""
    return package(thing) in _NOT_FOLLOWED


def is_installed(thing: Any) -> bool:
    """Return True if a module, or the module that defines a class, is an installed package's."""
    if isinstance(thing, type):
        thing = sys.modules.get(thing.__module__)
    path = getattr(thing, "__file__", None) or ""
    return "site-packages" in path or "dist-packages" in path


def named_by(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the objects that a function's code refers to, each with the name that leads to it.

    Args:
        function: the function. Its defaults, closure, attributes and wrapped function are searched,
            and so are the globals and imported modules that its code and inner functions name.
    """
    if "__wrapped__" in vars(function):
        yield "", function.__wrapped__
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        with contextlib.suppress(ValueError):  # the name is not assigned yet
            yield f".{name}", cell.cell_contents
    if not of_libraries(function):
        yield from _globals(function)
        yield from _defaults(function)
    for name, value in vars(function).items():
        if name != "__wrapped__":
            yield f".{name}", value


def _defaults(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    code, values = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[: code.co_argcount][code.co_argcount - len(values) :]
    yield from ((f".{name}", value) for name, value in zip(names, values, strict=True))
    for name, value in (function.__kwdefaults__ or {}).items():
        yield f".{name}", value


def _globals(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    codes, imports = [function.__code__], False
    names: list[str] = []
    while codes:
        code = codes.pop()
        imports |= _IMPORT in code.co_code[::2]
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        names += code.co_names
    for name in dict.fromkeys(names):
        value = function.__globals__.get(name)
        if imports and name not in function.__globals__:
            value = sys.modules.get(name) or _sibling(name, function)
        if isinstance(value, types.ModuleType):
            yield from _attributes_of_module(value, f".{name}", names, {id(value)})
        elif name in function.__globals__ and not (isinstance(value, type) and of_libraries(value)):
            yield f".{name}", value


def _sibling(name: str, function: types.FunctionType) -> Any:
    """Return the module that the function imports from its own package, if it is imported."""
    parent = function.__globals__.get("__package__")
    return sys.modules.get(f"{parent}.{name}") if parent else None


def _attributes_of_module(
    module: types.ModuleType, name: str, names: list[str], seen: set[int]
) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of a module and its submodules that the code names.

    Args:
        module: module that the code names.
        name: name that leads to the module.
        names: all names in the code.
        seen: ids of the modules searched so far.
    """
    if of_libraries(module):
        return
    installed = is_installed(module)
    for attribute in dict.fromkeys(names):
        value = vars(module).get(attribute)
        if isinstance(value, types.ModuleType):
            if id(value) not in seen:
                seen.add(id(value))
                yield from _attributes_of_module(value, f"{name}.{attribute}", names, seen)
        elif isinstance(value, nn.Module) or (attribute in vars(module) and not installed):
            yield f"{name}.{attribute}", value
