"""Roots, gradients of implicit functions, and positive numbers from unconstrained ones."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.nn import functional as F

# Each two steps halve the bracket or the step; Newton's last ones double the digits.
_ITERATIONS = 100
_ZERO_TO_ONE = math.log(math.expm1(1.0))  # softplus(log(e - 1)) = 1
MIN_SCALE = 1e-6


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


def increasing_root(
    function: Callable[[Tensor], Tensor],
    slope: Callable[[Tensor], Tensor],
    low: Tensor,
    high: Tensor,
) -> Tensor:
    r"""Solve f(x) = 0 for f increasing, by Newton's method kept inside a bracket.

    Where Newton's step leaves the bracket, or is not half of the step before the last, bisection
    takes its place (Press et al. 2007, section 9.4). The number of steps is fixed, so that nothing
    depends on values. The gradient is that of the implicit function theorem,
    :math:`\partial x = -\partial f / f'(x)`, of first order: the iteration is not differentiated.

    Args:
        function: f, elementwise; it may close over tensors that require a gradient.
        slope: f', positive.
        low: where f is not positive.
        high: where f is not negative.
    """
    with torch.no_grad():
        x = (low + high) / 2
        last = before_last = high - low
        for _ in range(_ITERATIONS):
            value = function(x)
            low = torch.where(value < 0, x, low)
            high = torch.where(value > 0, x, high)
            newton, middle = x - value / slope(x), (low + high) / 2
            good = (newton >= low) & (newton <= high) & (2 * (newton - x).abs() <= before_last)
            after = torch.where(good, newton, middle)
            x, last, before_last = after, (after - x).abs(), last
        found = slope(x)
    return implicit(x, function(x), lambda grad: grad / found)


def softplus_scale(raw: Tensor) -> Tensor:
    """Map numbers to positive ones by a softplus: zero to one, none to zero.

    A softplus grows linearly, where the gradient of an exponential explodes with it.
    """
    return softplus(raw + _ZERO_TO_ONE) + MIN_SCALE


def softplus(number: Tensor) -> Tensor:
    r"""Return :math:`\log(1 + e^t)`, to the rounding of float64.

    From 20 on, torch's own is t: an error of 2e-9, which a likelihood of large counts multiplies.
    """
    return F.softplus(number, threshold=40.0)


def inverse_softplus_scale(value: float) -> float:
    """Return the number that :func:`softplus_scale` maps to a given one, which is above 1e-6."""
    rest = value - MIN_SCALE
    return rest + math.log(-math.expm1(-rest)) - _ZERO_TO_ONE
