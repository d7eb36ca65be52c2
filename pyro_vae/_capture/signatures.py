"""The layout of a call's inputs: shapes, strides, dtypes and devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Signature = tuple[tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device], ...]


def signature_of(inputs: Sequence[Tensor]) -> Signature:
    """Return the shape, stride, dtype and device of each input."""
    return tuple((t.shape, t.stride(), t.dtype, t.device) for t in inputs)


def to_config(signature: Signature) -> list[list[Any]]:
    """Return a signature as lists, numbers and strings, for :func:`from_config`."""
    return [
        [list(shape), list(stride), str(dtype), str(device)]
        for shape, stride, dtype, device in signature
    ]


def from_config(config: Sequence[Sequence[Any]]) -> Signature:
    """Return the signature of a result of :func:`to_config`."""
    inputs = []
    for shape, stride, name, device in config:
        dtype = getattr(torch, name.removeprefix("torch."))
        inputs.append((torch.Size(shape), tuple(stride), dtype, torch.device(device)))
    return tuple(inputs)
