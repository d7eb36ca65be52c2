"""What a part says of a tensor that it cannot take; torch alone.

These checks read types and shapes, never values: they wait for no device, and a captured step is
without them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ShapeError(ValueError):
    """A tensor of another shape than a part takes."""


def require_tensor(name: str, value: Any) -> Tensor:
    """Return a dense tensor of real numbers or truth values.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested or value.is_complex() or value.is_quantized:
        raise TypeError(
            f"{name} must be a dense tensor of real numbers, got layout {value.layout} and dtype "
            f"{value.dtype}"
        )
    return value


def require_batch(name: str, value: Any) -> int:
    """Return how many data a minibatch holds.

    Raises:
        TypeError: it is no dense tensor of real numbers.
        ShapeError: it holds none.
    """
    shape = require_tensor(name, value).shape
    if not shape or 0 in shape:
        raise ShapeError(
            f"{name} must be of shape (B, *event) and not empty, got shape {tuple(shape)}"
        )
    return shape[0]


def require_floats(name: str, value: Any, last: tuple[int, ...]) -> Tensor:
    """Return a floating-point tensor that ends in given sizes.

    Args:
        name: what messages call it.
        value: it.
        last: sizes of its last dimensions.

    Raises:
        TypeError: it is no dense tensor of floating-point numbers.
        ShapeError: it ends in other sizes.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = f"dtype {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a tensor of floating-point numbers, got {kind}")
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    if value.shape[max(0, value.dim() - len(last)) :] != last:
        sizes = ", ".join(map(str, last))
        raise ShapeError(f"{name} must be of shape (..., {sizes}), got {tuple(value.shape)}")
    return value


def require_same_type(name: str, value: Tensor, parameter: Tensor) -> None:
    """Refuse what the parameters are of another type or on another device for.

    Raises:
        TypeError: type or device differ.
    """
    if value.dtype != parameter.dtype or value.device != parameter.device:
        raise TypeError(
            f"{name} must be of the parameters' {parameter.dtype} and on their "
            f"{parameter.device}, got {value.dtype} on {value.device}"
        )
