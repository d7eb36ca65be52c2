"""A limit on the memory and modules that loading a file may use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

MAX_PARTS = 10_000  # modules and parameters


class MemoryLimit(TorchDispatchMode):
    """Raise ValueError before torch uses too much memory, or if there are too many modules.

    Each operation first runs on the device ``"meta"``, without data, to find its output size. The
    outputs of operations without tensor inputs, mainly parameters, are limited in total. All other
    outputs are limited one by one.

    Args:
        memory: limit in bytes.

    Raises:
        ValueError: An operation in the block exceeds the memory limit. Or the block creates more
            than 10,000 modules and parameters.
    """

    def __init__(self, memory: int):
        super().__init__()
        self._memory, self._left, self._parts = memory, memory, 0

    def __enter__(self) -> MemoryLimit:
        """Enable the limit."""
        self._hooks = [
            register_module_module_registration_hook(self._count),
            register_module_parameter_registration_hook(self._count),
        ]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Disable the limit."""
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Check the output size of an operation, then run it."""
        kwargs = kwargs or {}
        if not func._schema.is_mutable:
            inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
            size = _size(func, args, kwargs)
            if not inputs:
                self._left -= size
            if self._left < 0 or size > self._memory:
                raise ValueError(
                    f"it would take more than {self._memory} bytes of memory, too much for the "
                    "tensors saved with it"
                )
        return func(*args, **kwargs)

    def _count(self, *_: Any) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise ValueError(f"it would take more than {MAX_PARTS} modules and parameters")


def _size(func: Callable, args: tuple, kwargs: dict[str, Any]) -> int:
    """Return an operation's output size in bytes, or zero if the size depends on values."""

    def without_data(leaf: Any) -> Any:
        return leaf.to("meta") if isinstance(leaf, Tensor) else leaf

    args, kwargs = tree_map(without_data, (args, kwargs))
    if any(argument.name == "device" for argument in func._schema.arguments):
        kwargs = {**kwargs, "device": torch.device("meta")}
    try:
        outputs = tree_leaves(func(*args, **kwargs))
    except (NotImplementedError, RuntimeError):
        return 0
    return sum(each.numel() * each.element_size() for each in outputs if isinstance(each, Tensor))
