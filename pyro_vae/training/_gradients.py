"""Compute, clip and check the gradients of a loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pyro_vae._utils.numerics import real_parts
from pyro_vae.training._adam import Adam


def gradients_of(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the gradients of a loss, with None for frozen parameters.

    Each gradient has the memory layout of its parameter, as after ``backward``.

    Raises:
        ValueError: The loss depends on no parameter that requires a gradient.
    """
    if not loss.requires_grad:
        raise ValueError(
            "the loss of this objective depends on no parameter of model and guide that requires a "
            "gradient, so there is nothing to train. Pass another objective"
        )
    trained = [p for p in parameters if p.requires_grad]
    found = iter(torch.autograd.grad(loss, trained, allow_unused=True))
    gradients = [next(found) if p.requires_grad else None for p in parameters]
    return [
        None if g is None else _laid_out_like(p, g)
        for g, p in zip(gradients, parameters, strict=True)
    ]


def clipped(gradients: Sequence[Tensor | None], bound: float) -> list[Tensor | None]:
    """Scale the whole gradient to a norm of at most ``bound`` (Pascanu et al. 2013, alg. 1)."""
    found = [_values(g) for g in gradients if g is not None]
    norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in found]  # cannot overflow
    scale = (bound / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6)).clamp(max=1.0)
    return [None if g is None else g * scale.to(g.dtype) for g in gradients]


# Optimizers of torch that make a parameter NaN or infinite if its gradient is.
_CARRYING = frozenset({
    "ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "LBFGS", "Muon", "NAdam",
    "RAdam", "RMSprop", "SGD",
})  # fmt: skip


def hides_gradients(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether parameters may stay finite under a NaN gradient, as with Rprop."""
    kind = type(optimizer)
    of_torch = kind is Adam or kind.__module__.startswith("torch.optim")
    return not (of_torch and kind.__name__ in _CARRYING)


def all_finite(tensors: Iterable[Tensor | None]) -> Tensor:
    """Return whether the norms of all tensors are finite.

    True means that all numbers are finite. False means that each number must be checked, because
    the norm of finite numbers can overflow.
    """
    found = [numbers_of(tensor) for tensor in tensors if tensor is not None]
    if not found:
        return torch.tensor(True)
    return torch.stack([norm.double() for norm in torch._foreach_norm(found)]).isfinite().all()


def numbers_of(tensor: Tensor) -> Tensor:
    """Return the real numbers of a dense or sparse tensor, a pair for each complex one."""
    return _values(tensor.detach())


def _values(tensor: Tensor) -> Tensor:
    return real_parts(tensor.coalesce().values() if tensor.is_sparse else tensor)


def _laid_out_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient in the memory layout of its parameter, as fused optimizers need it."""
    if gradient.layout != torch.strided or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)
