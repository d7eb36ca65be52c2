"""Watch the objects that a function depends on besides its arguments."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, strided

from pyro_vae._utils.modules import unnamed
from pyro_vae._utils.referenced_objects import VALUES, referenced_objects

_BYTES_LOOKED_AT = 1 << 20  # larger arrays are compared by identity

State = dict[str, list[Any]]


def tensors_that_may_change(watch: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors that a call might change, such as running averages."""
    reached = [thing for _, thing in _reached(watch) if isinstance(thing, Tensor)]
    return [tensor for tensor in reached if not tensor.requires_grad]


def state_of(watch: Mapping[str, Any]) -> State:
    """Return marks of all reachable objects. Unchanged objects have equal marks."""
    state: State = {}
    for name, thing in _reached(watch):
        state.setdefault(name, []).append(_mark(thing))
    return state


def _reached(watch: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    met = {f"unnamed module {n}": m for n, m in enumerate(unnamed(*watch.values()), 1)}
    return referenced_objects(**watch, **met)


def change(before: State, after: State) -> str | None:
    """Describe the first difference between two states. Return None if they are equal."""
    for name in sorted(before.keys() | after.keys()):
        if name not in after:
            return f"{name} was removed"
        if name not in before:
            return f"{name} was added"
        if before[name] != after[name]:
            old, new = before[name][0], after[name][0]
            if len(before[name]) == len(after[name]) == 1 and isinstance(old, _TensorMark):
                return f"{name} {old.change_to(new)}"
            return f"{name} changed from {_shown(before[name])} to {_shown(after[name])}"
    return None


def _shown(marks: list[Any]) -> str:
    return ", ".join(str(mark) for mark in marks)


def _mark(thing: Any) -> Any:
    """Return a value that stays equal while an object, without its parts, does not change."""
    if isinstance(thing, Tensor):
        storage = thing.data_ptr() if thing.layout == strided else None
        return _TensorMark(_Same(thing), storage, thing.requires_grad)
    if isinstance(thing, float | complex | np.generic):
        return repr(thing)  # so that NaN equals itself
    if isinstance(thing, VALUES):
        return thing
    if isinstance(thing, np.ndarray) and thing.nbytes <= _BYTES_LOOKED_AT:
        return thing.dtype, thing.shape, thing.tobytes()
    if isinstance(thing, Mapping | list | tuple | set | deque):
        return type(thing), len(thing)
    if inspect.ismethod(thing):
        return None  # created at each access; its function and owner have marks
    return _Same(thing)


class _Same:
    """An object that is compared by identity and kept alive."""

    def __init__(self, thing: Any):
        self._thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._thing is other._thing

    __hash__ = None

    def __repr__(self) -> str:
        return f"{type(self._thing).__name__} object"


@dataclass
class _TensorMark:
    same: _Same
    storage: int | None
    requires_grad: bool

    __hash__ = None

    def __repr__(self) -> str:
        return repr(self.same)

    def change_to(self, other: Any) -> str:
        """Describe the difference from another mark."""
        if not isinstance(other, _TensorMark) or self.same != other.same:
            return f"was replaced by {other}"
        if self.storage != other.storage:
            return "moved to other memory"
        return "was thawed" if other.requires_grad else "was frozen"
