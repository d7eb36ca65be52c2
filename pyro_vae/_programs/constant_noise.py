"""Replace random numbers by constants, so that two runs with other shapes have equal noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Operations whose result is filled with a constant, by name and without "_" at the end.
_FILLED = {
    "bernoulli": 1,
    "cauchy": 0.5,
    "exponential": 0.5,
    "geometric": 1,
    "log_normal": 0.5,
    "multinomial": 0,
    "poisson": 0,
    "binomial": 0,
    "rand": 0.5,
    "rand_like": 0.5,
    "randint": 0,
    "randint_like": 0,
    "randn": 0.5,
    "randn_like": 0.5,
    "random": 0,
    "uniform": 0.5,
}


class ConstantNoise(TorchDispatchMode):
    """Give each random number of torch in the block a constant value.

    Dropout keeps all numbers. Operations of other names keep their random results.
    """

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, and replace its random numbers."""
        out = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return out
        name = func.overloadpacket.__name__.rstrip("_")
        if name == "native_dropout":
            scaled = args[0] / (1 - args[1]) if args[2] is not False and args[1] < 1 else out[0]
            return scaled, torch.ones_like(out[1])
        if name in _FILLED and isinstance(out, Tensor):
            return out.fill_(_FILLED[name])
        if name == "randperm":
            return out.copy_(torch.arange(len(out), device=out.device))
        if name == "normal":
            mean, scale = (*args, *(kwargs or {}).values(), 0.0, 1.0)[:2]
            of_tensors = isinstance(mean, Tensor) and out is not mean
            return mean + 0.5 * scale if of_tensors else out.fill_(0.5)
        if name in ("_standard_gamma", "_sample_dirichlet"):
            return args[0] if name == "_standard_gamma" else args[0] / args[0].sum(-1, keepdim=True)
        return out
