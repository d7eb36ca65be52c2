"""Estimate the time of calls from their operations, for ``capture="auto"``."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
Capture = bool | Literal["auto"]


def check_capture(capture: Capture) -> None:
    """Raise ValueError if ``capture`` is not True, False or ``"auto"``."""
    if not (capture is True or capture is False or capture == "auto"):
        raise ValueError(f'capture must be True, False or "auto", got {capture!r}')


# Tracing a training step takes about half a second and saves up to a third of its time on small
# networks. Compilation takes from 4 to 20 seconds and saves up to three quarters.
SECONDS_THAT_REPAY_TRACING = 3.0
SECONDS_THAT_REPAY_COMPILING = 30.0

# A typical pace of eager calls on two CPU cores, including Pyro's handlers. The measured steps of
# docs/performance.md differ from it by less than a fifth. A device has a faster pace.
_SECONDS_PER_OPERATION = 1.2e-5
_SECONDS_PER_VALUE = {"cpu": 5e-10, "cuda": 1e-11}
_SECONDS_PER_PRODUCT = {"cpu": 1e-11, "cuda": 1e-13}

# The position of the factor whose last dimension is summed over.
_FIRST_FACTORS = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.baddbmm: 1}


# Devices on which ``capture="auto"`` captures nothing yet, and the reason.
_EAGER_DEVICES = {
    "cuda": (
        "captured and eager steps were never compared on CUDA. capture=True captures, and compares "
        "the first captured call with an eager one"
    )
}


def reason_for_eager(device: torch.device) -> str | None:
    """Return why ``capture="auto"`` runs eagerly on a device. Return None if it may capture."""
    return _EAGER_DEVICES.get(device.type)


class WorkCounter(TorchDispatchMode):
    """Count the operations inside the block and the sizes of their results.

    The counts depend on the program and the shapes of its tensors, not on the load of the machine.

    Attributes:
        operations: number of tensor operations, without views.
        values: number of values in their results.
        products: number of multiplications in matrix products and convolutions.
    """

    supports_higher_order_operators = True  # such as torch.cond; each counts as one operation

    def __init__(self):
        super().__init__()
        self.operations = self.values = self.products = 0

    def seconds(self, device: torch.device) -> float:
        """Return an estimate of the time of the block, which is the same in each run."""
        kind = device.type if device.type in _SECONDS_PER_VALUE else "cpu"
        return (
            self.operations * _SECONDS_PER_OPERATION
            + self.values * _SECONDS_PER_VALUE[kind]
            + self.products * _SECONDS_PER_PRODUCT[kind]
        )

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        results = operation(*args, **(kwargs or {}))
        if not _is_view(operation):
            self.operations += 1
            tensors = [each for each in tree_leaves(results) if isinstance(each, Tensor)]
            self.values += sum(tensor.numel() for tensor in tensors)
            self.products += _products(operation, args, results)
        return results


def _is_view(operation: Any) -> bool:
    return getattr(operation, "is_view", False) or operation is aten._unsafe_view.default


def _products(operation: Any, args: tuple, results: Any) -> int:
    """Return the number of multiplications of a matrix product or convolution, else 0."""
    operation = getattr(operation, "overloadpacket", operation)
    if operation in _FIRST_FACTORS:
        return results.numel() * args[_FIRST_FACTORS[operation]].shape[-1]
    if operation is aten.convolution:
        return _products_of_convolution(args[0], args[1], results, transposed=args[6])
    if operation is aten.convolution_backward:
        once = _products_of_convolution(args[1], args[2], args[0], transposed=args[7])
        return once * sum(result is not None for result in results[:2])
    return 0


def _products_of_convolution(x: Tensor, weight: Tensor, y: Tensor, *, transposed: bool) -> int:
    return (x if transposed else y).numel() * weight.numel() // max(1, weight.shape[0])
