"""A user's own pairs, from a function in a file or a module."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pyro
from torch import Tensor

import pyro_vae as pv
from pyro_vae._utils.messages import first_line
from pyro_vae._utils.modules import modules
from pyro_vae._utils.random import seeded
from pyro_vae.cli._arms import Arm

_EXAMPLE = "expected FILE.py:FUNCTION or package.module:FUNCTION, such as mypairs.py:pairs"
_RESULT = (
    "a dictionary from names to pairs (model, guide), or (model, guide, options) with arguments of "
    "pv.fit"
)
_LIBRARY = str(Path(pv.__file__).parent)
_ROWS = 20  # of the data, to run a pair before its fit
# Arguments of pv.fit that the command sets for all pairs.
_SET_BY_COMMAND = {
    "model", "guide", "data", "validation", "seed", "checkpoint", "progress", "description",
    "device", "transform",
}  # fmt: skip


def arms_of(reference: str, train: Tensor, seed: int) -> list[Arm]:
    """Return the methods of a user's function.

    Args:
        reference: file or module, and function, as in ``"mypairs.py:pairs"``.
        train: training data, passed to the function if it has an argument.
        seed: seed of torch for the first call.

    Raises:
        ValueError: There is no such function, it raises an error, or it returns something else. A
            pair cannot run on the data. Two calls return the same networks.
        TypeError: A value is not callable, or options are not a dictionary.
    """
    root = str(Path.cwd())
    with seeded(seed):
        pairs = call(reference, train, root)
    with seeded(seed):
        again = call(reference, train, root)
    for name, (model, guide, _) in pairs.items():
        _require_new_networks(reference, name, (model, guide), again[name][:2])
        _require_runs(reference, name, model, guide, train)
    return [
        Arm(name, functools.partial(pair_of, reference, name, train, root), options)
        for name, (_, _, options) in pairs.items()
    ]


def pair_of(reference: str, name: str, train: Tensor, root: str) -> tuple[Any, Any]:
    """Call the function and return one of its pairs. A worker process may be in another folder."""
    pairs = call(reference, train, root)
    if name not in pairs:
        raise ValueError(
            f"{reference} must return the same names in each call, but {name!r} is missing"
        )
    return pairs[name][:2]


def call(reference: str, train: Tensor, root: str) -> dict[str, tuple[Any, Any, dict[str, Any]]]:
    """Call a user's function, and return its checked result.

    Args:
        reference: file or module, and function.
        train: training data.
        root: the folder from which the command was started.

    Raises:
        ValueError: See :func:`arms_of`.
        TypeError: See :func:`arms_of`.
    """
    function = _function(reference, Path(root))
    arguments = (train,) if _num_arguments(reference, function) else ()
    try:
        result = function(*arguments)
    except Exception as error:  # of the user's code
        raise ValueError(f"{reference} raised {type(error).__name__}: {_where(error)}") from error
    if not isinstance(result, Mapping) or not result:
        raise ValueError(f"{reference} must return {_RESULT}, got {_shown(result)}")
    return {str(name): _checked_pair(reference, name, pair) for name, pair in result.items()}


def _function(reference: str, root: Path) -> Callable[..., Any]:
    place, _, name = reference.rpartition(":")
    if not place or not name:
        raise ValueError(f"{reference!r} does not name a function: {_EXAMPLE}")
    is_file = place.endswith(".py") or "/" in place or "\\" in place
    module = _module_of_file(place, root) if is_file else _module(place, place, root)
    if not hasattr(module, name):
        known = [
            each
            for each, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__
        ]
        raise ValueError(
            f"{place} has no function {name!r}. Its functions are {', '.join(known) or 'none'}"
        )
    function = getattr(module, name)
    if not callable(function):
        raise TypeError(
            f"{reference} must be a function that returns {_RESULT}, got {_shown(function)}"
        )
    return function


def _module_of_file(shown: str, root: Path) -> ModuleType:
    path = (root / shown).resolve()
    if not path.is_file():
        raise ValueError(f"there is no file {shown}: {_EXAMPLE}")
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise ValueError(f"{shown} must be a Python file with a name such as mypairs.py")
    module = _module(path.stem, shown, path.parent)
    if Path(getattr(module, "__file__", None) or "").resolve() != path:
        raise ValueError(f"{shown} has the name of another module, {path.stem!r}. Rename the file")
    return module


def _module(name: str, shown: str, folder: Path) -> ModuleType:
    """Import a module, with a folder in the search path, as a worker process does too."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        # The import must not change the random numbers of a pair: a process imports only once.
        with seeded(0):
            return importlib.import_module(name)
    except Exception as error:  # of the user's code
        raise ValueError(
            f"cannot import {shown}: {type(error).__name__}: {_where(error)}"
        ) from error


def _where(error: Exception) -> str:
    """Return the first line of a message, and the last line of code that is not a library's."""
    if isinstance(error, SyntaxError):
        return f"{error.msg} (line {error.lineno})"
    line, trace = None, error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith((_LIBRARY, "<")) and "site-packages" not in file:
            line = trace.tb_lineno
        trace = trace.tb_next
    return first_line(error) + (f" (line {line})" if line else "")


def _num_arguments(reference: str, function: Callable[..., Any]) -> int:
    """Return 0, or 1 if the function takes the training data."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 0
    needed = [
        p
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if len(needed) > 1 or any(p.kind is p.KEYWORD_ONLY for p in needed):
        raise ValueError(
            f"{reference} must have no argument, or one for the training data, got the arguments "
            f"{', '.join(p.name for p in needed)}"
        )
    return len(needed)


def _checked_pair(reference: str, name: Any, pair: Any) -> tuple[Any, Any, dict[str, Any]]:
    if not isinstance(pair, tuple | list) or len(pair) not in (2, 3):
        raise ValueError(f"{reference} must return {_RESULT}, but {name!r} is {_shown(pair)}")
    model, guide, *rest = pair
    for part, program in (("model", model), ("guide", guide)):
        if not callable(program):
            raise TypeError(
                f"{reference} must return {_RESULT}, but the {part} of {name!r} is "
                f"{_shown(program)}"
            )
    options = rest[0] if rest else {}
    if not isinstance(options, Mapping):
        raise TypeError(
            f'the options of {name!r} in {reference} must be a dictionary, such as {{"objective": '
            f"pv.objectives.IWAE(10)}}, got {_shown(options)}"
        )
    allowed = set(inspect.signature(pv.fit).parameters) - _SET_BY_COMMAND
    if unknown := [option for option in options if option not in allowed]:
        raise ValueError(
            f"{unknown[0]!r} is not an option of {name!r} in {reference}. The options are "
            f"{', '.join(sorted(allowed))}"
        )
    return model, guide, dict(options)


def _require_new_networks(reference: str, name: str, pair: tuple, again: tuple) -> None:
    first, second = (
        {id(p) for module in modules(*each) for p in module.parameters() if p.requires_grad}
        for each in (pair, again)
    )
    if first & second:
        raise ValueError(
            f"two calls of {reference} return the same networks for {name!r}. Make all networks "
            "inside of the function, because a fit trains its pair in place"
        )


def _require_runs(reference: str, name: str, model: Any, guide: Any, train: Tensor) -> None:
    try:
        with warnings.catch_warnings(), pyro.get_param_store().scope():
            warnings.simplefilter("ignore")
            pv.terms(model, guide, train[:_ROWS])
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{name!r} of {reference} cannot be fitted: {first_line(error)}"
        ) from error


def _shown(value: Any) -> str:
    if isinstance(value, tuple | list):
        inside = ", ".join(type(each).__name__ for each in value[:4])
        return f"a {type(value).__name__} of {len(value)} ({inside})"
    return f"an object of type {type(value).__name__}"
