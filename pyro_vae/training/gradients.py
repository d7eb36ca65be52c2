"""The gradient of a loss, as optimizers want it, and a look at it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def gradients_of(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Differentiate, as ``backward`` does: frozen parameters have None, the others their layout."""
    trained = [p for p in parameters if p.requires_grad]
    found = iter(torch.autograd.grad(loss, trained, allow_unused=True))
    gradients = [next(found) if p.requires_grad else None for p in parameters]
    return [
        None if g is None else _laid_out_like(p, g)
        for g, p in zip(gradients, parameters, strict=True)
    ]


def clipped(gradients: Sequence[Tensor | None], bound: float) -> list[Tensor | None]:
    """Scale the whole gradient to a norm of at most ``bound`` (Pascanu et al. 2013, alg. 1)."""
    norms = [torch.linalg.vector_norm(g) for g in gradients if g is not None]
    scale = (bound / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6)).clamp(max=1.0)
    return [None if g is None else g * scale for g in gradients]


def all_finite(tensors: Iterable[Tensor | None]) -> Tensor:
    """Whether all numbers are, without a look at each: none is, if a norm is NaN or infinite.

    A norm overflows before its numbers do: False says no more than that a look is due.
    """
    found = [numbers_of(tensor) for tensor in tensors if tensor is not None]
    if not found:
        return torch.tensor(True)
    return torch.stack([norm.double() for norm in torch._foreach_norm(found)]).isfinite().all()


def numbers_of(tensor: Tensor) -> Tensor:
    """Return a tensor that lies in one place, with the numbers of one that may be sparse."""
    tensor = tensor.detach()
    return tensor._values() if tensor.is_sparse else tensor


def _laid_out_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Fused optimizers take it for granted that the two lie alike in memory."""
    if gradient.layout != torch.strided or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)
