"""The gradient of a loss, as optimizers want it, and a look at it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pyro_vae.training._adam import Adam


def gradients_of(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Differentiate, as ``backward`` does: frozen parameters have None, the others their layout.

    Raises:
        ValueError: the loss depends on no parameter.
    """
    if not loss.requires_grad:
        raise ValueError(
            "the loss of this objective depends on no parameter of model and guide that requires a "
            "gradient: there is nothing to train. Pass another objective"
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


# Of torch's optimizers, those that carry a gradient that is not finite into its parameter.
_CARRYING = frozenset({
    "ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "LBFGS", "Muon", "NAdam",
    "RAdam", "RMSprop", "SGD",
})  # fmt: skip


def hides_gradients(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer may leave parameters finite where a gradient is not, as Rprop does."""
    kind = type(optimizer)
    of_torch = kind is Adam or kind.__module__.startswith("torch.optim")
    return not (of_torch and kind.__name__ in _CARRYING)


def all_finite(tensors: Iterable[Tensor | None]) -> Tensor:
    """Whether all numbers are, without a look at each: none is, if a norm is NaN or infinite.

    A norm overflows before its numbers do: False says no more than that a look is due.
    """
    found = [numbers_of(tensor) for tensor in tensors if tensor is not None]
    if not found:
        return torch.tensor(True)
    return torch.stack([norm.double() for norm in torch._foreach_norm(found)]).isfinite().all()


def numbers_of(tensor: Tensor) -> Tensor:
    """Return the numbers of a tensor that may be sparse."""
    return _values(tensor.detach())


def _values(tensor: Tensor) -> Tensor:
    return tensor.coalesce().values() if tensor.is_sparse else tensor


def _laid_out_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Fused optimizers take it for granted that the two lie alike in memory."""
    if gradient.layout != torch.strided or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)
