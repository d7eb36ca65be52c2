"""The precision of float32 matrix products."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from pyro_vae._utils.checks import require_word

Precision = Literal["highest", "high", "medium"]
_WORDS = ("highest", "high", "medium")

# The largest relative error of a factor that is rounded: half a unit in the last place.
_ROUNDING = {"tf32": 2.0**-11, "bf16": 2.0**-9}


def check_precision(precision: Precision | None) -> None:
    """Raise ValueError if ``precision`` is not None or a word that torch accepts."""
    if precision is not None:
        require_word("precision", precision, _WORDS, "None")


@contextlib.contextmanager
def matmul_precision(precision: Precision | None) -> Iterator[None]:
    """Set the precision of float32 matrix products inside the block, then restore it.

    Args:
        precision: as in ``torch.set_float32_matmul_precision``. None changes nothing.
    """
    check_precision(precision)
    if precision is None:
        yield
        return
    of_backends = [(backend, backend.fp32_precision) for backend in _backends()]
    before = _word()
    try:
        torch.set_float32_matmul_precision(precision)
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        for backend, each in of_backends:  # a user may have set them one by one
            backend.fp32_precision = each


def current_precision() -> str:
    """Return the precision in force, as torch names it.

    If a user has set the backends one by one, the text names the precision of each.
    """
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        on_cpu, on_cuda = (backend.fp32_precision for backend in _backends())
        return f"{on_cpu} on the CPU, {on_cuda} on CUDA"


def shared_precision(precision: Precision | None) -> Precision | None:
    """Return the precision that another process must set to compute as this one does.

    None if torch has no word for the settings in force.
    """
    in_force = current_precision()
    return in_force if precision is None and in_force in _WORDS else precision


def rounding_of_products(device: torch.device) -> float:
    """Return the relative error of a float32 factor of a matrix product; zero if not rounded."""
    on_cpu, on_cuda = _backends()
    backend = on_cuda if device.type == "cuda" else on_cpu
    return _ROUNDING.get(backend.fp32_precision, 0.0)


def rounding_of_convolutions(device: torch.device) -> float:
    """Return the relative error of a float32 factor of a convolution; zero if not rounded."""
    backend = torch.backends.cudnn if device.type == "cuda" else torch.backends.mkldnn
    return _ROUNDING.get(backend.conv.fp32_precision, 0.0)


def rounds_products(tensor: Tensor) -> bool:
    """Return whether matrix products of a tensor have less than its own precision."""
    return tensor.dtype == torch.float32 and rounding_of_products(tensor.device) > 0


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a matrix product with the precision of its factors, whatever the setting.

    Where float32 factors would be rounded, the product is in float64. A change of the setting
    inside a block would have no effect on a captured step, which holds operations alone.
    """
    if not rounds_products(a):
        return a @ b
    return (a.double() @ b.double()).to(a.dtype)


def _backends() -> tuple:
    return torch.backends.mkldnn.matmul, torch.backends.cuda.matmul


def _word() -> str:
    """Return torch's word for the precision, also if the backends have others."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # the caller restores the backends
        for backend in _backends():
            backend.fp32_precision = "ieee"
        return torch.get_float32_matmul_precision()
