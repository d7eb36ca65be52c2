"""The gradient of what solves an equation: that of the implicit function theorem."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.autograd.function import Function, once_differentiable


def implicit(value: Tensor, residual: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
    r"""Return z as it is, with the gradient of what keeps :math:`F(z; \theta)` where it is.

    .. math::
        \partial z = -J^{-1} \, \partial_\theta F, \qquad J = \partial F / \partial z

    Args:
        value: z, however it was found.
        residual: F at z, differentiable in :math:`\theta` alone.
        solve: maps g to :math:`J^{-\top} g`.

    Raises:
        RuntimeError: at a second derivative, which this is not.
    """
    return _Implicit.apply(value.detach(), residual, solve)


class _Implicit(Function):
    @staticmethod
    def forward(ctx, value: Tensor, residual: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.solve = solve
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor, None]:
        return None, -ctx.solve(grad), None
