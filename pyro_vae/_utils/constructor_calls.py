"""Print an object as the constructor call that makes it."""

from __future__ import annotations

import functools
import inspect
import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

_WIDTH = 88  # characters of a line
_MOST_NUMBERS = 16  # of a tensor that is shown in full


def constructor_call(cls: type, given: Mapping[str, Any]) -> str:
    """Return the text of a constructor call, with the first required argument by position.

    If the text is longer than a line, each argument has its own line.

    Args:
        cls: the class.
        given: the arguments by name, as ``inspect.Signature.bind`` returns them.

    Example:
        >>> class Net:
        ...     def __init__(self, size, hidden, bias=True): ...
        >>> constructor_call(Net, {"size": 3, "hidden": [4, 5], "bias": False})
        'Net(3, hidden=[4, 5], bias=False)'
    """
    parameters = inspect.signature(cls).parameters
    others = next((n for n, p in parameters.items() if p.kind is p.VAR_POSITIONAL), None)
    needed = [n for n, p in parameters.items() if p.default is p.empty]
    before = [*parameters][: [*parameters].index(others)] if given.get(others) else needed[:1]
    parts: list[str] = []
    for name, value in given.items():
        if name == others:
            parts += map(shown_value, value)
        else:
            parts.append(shown_value(value) if name in before else f"{name}={shown_value(value)}")
    return _call(cls.__name__, parts)


def shown_value(value: Any) -> str:
    """Return the text of an argument: an expression if it is plain, else a short description."""
    if isinstance(value, torch.Tensor):
        return _tensor(value)
    if isinstance(value, np.ndarray):
        return f"<array of shape {value.shape}>"
    if isinstance(value, np.generic):
        return repr(value.item())
    if isinstance(value, functools.partial):
        options = [f"{name}={shown_value(each)}" for name, each in value.keywords.items()]
        return _call("partial", [*map(shown_value, (value.func, *value.args)), *options])
    if type(value) in (list, tuple):
        inside = ", ".join(map(shown_value, value))
        if isinstance(value, list):
            return f"[{inside}]"
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    if type(value) is dict:
        return "{" + ", ".join(f"{key!r}: {shown_value(v)}" for key, v in value.items()) + "}"
    if inspect.isclass(value) or inspect.isroutine(value):
        return value.__name__
    return repr(value)


def _tensor(value: torch.Tensor) -> str:
    if value.numel() > _MOST_NUMBERS:
        return f"<tensor of shape {tuple(value.shape)}>"
    made = torch.tensor(value.tolist())
    dtype = "" if made.dtype == value.dtype else f", dtype={value.dtype}"
    return f"tensor({value.tolist()}{dtype})"


def _call(name: str, parts: list[str]) -> str:
    line = f"{name}({', '.join(parts)})"
    if len(line) <= _WIDTH and "\n" not in line:
        return line
    return f"{name}(\n" + "".join(textwrap.indent(f"{part},\n", "  ") for part in parts) + ")"
