"""What a function gave, and what its graph gave: the same but for rounding, or not."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_vae._capture.tracing import Outputs, equal


def disagreement(results: Outputs, replayed: Outputs) -> str | None:
    """Say how far a graph is from its function; None if by no more than rounding."""
    noise = max((_largest(r) for r in results[1:] if r is not None and _is_real(r)), default=0.0)
    for number, (mine, its) in enumerate(zip(results, replayed, strict=True)):
        if mine is None and its is None:
            continue
        if mine is None or its is None:
            return f"its graph differs from it in what output {number} is"
        if equal(mine, its):
            continue
        if not _is_real(mine):
            return f"its graph differs from it in output {number}"
        precision = torch.finfo(mine.dtype).eps
        size = _largest(mine)
        allowed = math.sqrt(precision) * size + 10 * precision * noise
        same = (mine == its) | (mine.isnan() & its.isnan())
        error = (mine - its).abs().masked_fill(same, 0.0).max().item()
        if not error <= allowed:
            return (
                f"its graph differs from it by {error:.1e} at the same noise, in output "
                f"{number} of largest entry {size:.1e}"
            )
    return None


def _largest(tensor: Tensor) -> float:
    """The largest size of a finite entry."""
    size = torch.linalg.vector_norm(tensor, math.inf).item()
    if math.isfinite(size):
        return size
    return tensor.abs().masked_fill(~tensor.isfinite(), 0.0).max().item()


def _is_real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() > 0
