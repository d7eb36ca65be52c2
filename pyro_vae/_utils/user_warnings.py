"""Warnings that name the user's line, at most once in a call of a public function."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])

_PACKAGE = __name__.split(".")[0]
_BETWEEN = (_PACKAGE, "contextlib", "functools", "torch")  # modules of frames below the user's
_issued: ContextVar[set[str] | None] = ContextVar("issued", default=None)


def warn_user(message: str, category: type[Warning] = UserWarning, *, key: str = "") -> None:
    """Issue a warning at the line of the user's code that called the library.

    Args:
        message: the text of the warning.
        category: the class of the warning.
        key: warnings with the same key are issued once in a call of a function that
            :func:`warns_once` decorates. An empty key does not limit them.
    """
    issued = _issued.get()
    if key and issued is not None:
        if key in issued:
            return
        issued.add(key)
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_between(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def warns_once(function: Function) -> Function:
    """Issue each warning with a key once in a call, also if the function calls others."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if _issued.get() is not None:
            return function(*args, **kwargs)
        token = _issued.set(set())
        try:
            return function(*args, **kwargs)
        finally:
            _issued.reset(token)

    return cast(Function, run)


@contextmanager
def ignores_frozen_parameters() -> Iterator[None]:
    """Ignore Pyro's warning for each parameter that has no gradient: a part may be frozen."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not registered in the param store")
        yield


def _is_between(module: str) -> bool:
    return module.split(".")[0] in _BETWEEN
