"""Compare the results of a function and of its graph, up to rounding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_vae._capture.tracing import Outputs, equal


def disagreement(results: Outputs, replayed: Outputs) -> str | None:
    """Describe how a graph differs from its function. Return None if only by rounding."""
    noise = max((_largest(r) for r in results[1:] if r is not None and _is_real(r)), default=0.0)
    for number, (mine, its) in enumerate(zip(results, replayed, strict=True)):
        if mine is None and its is None:
            continue
        if mine is None or its is None:
            return f"its graph differs from the eager run: only one of them has output {number}"
        if equal(mine, its):
            continue
        if not _is_real(mine):
            return f"its graph differs from the eager run in output {number}"
        precision = torch.finfo(mine.dtype).eps
        size = _largest(mine)
        allowed = math.sqrt(precision) * size + 10 * precision * noise
        same = (mine == its) | (mine.isnan() & its.isnan())
        error = (mine - its).abs().masked_fill(same, 0.0).max().item()
        if not error <= allowed:
            return (
                f"its graph differs from the eager run by {error:.1e} at the same noise, in output "
                f"{number}, whose largest entry is {size:.1e}"
            )
    return None


def _largest(tensor: Tensor) -> float:
    """Return the largest absolute value of the finite entries."""
    size = torch.linalg.vector_norm(tensor, math.inf).item()
    if math.isfinite(size):
        return size
    return tensor.abs().masked_fill(~tensor.isfinite(), 0.0).max().item()


def _is_real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() > 0
