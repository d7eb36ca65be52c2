"""Roots, gradients of implicit functions, and maps to positive numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.nn import functional as F

# Every two steps halve the bracket or the step. The last Newton steps double the correct digits.
_ITERATIONS = 100
_ZERO_TO_ONE = math.log(math.expm1(1.0))  # softplus(log(e - 1)) = 1
MIN_SCALE = 1e-6


def within(x: Tensor, low: float, high: float) -> Tensor:
    """Clamp x, with a gradient of one at the bounds and between them, and of zero outside.

    ``torch.clamp`` has no gradient at its bounds from torch 2.14 on.
    """
    return torch.where(x < low, low, torch.where(x > high, high, x))


def split_at(bound: float, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return x where it is below the bound, x elsewhere, and the mask of the first.

    Each part equals the bound where the other part equals x. So two formulas, each accurate on
    one side, can be evaluated everywhere and combined by ``torch.where``. At the bound itself, the
    second part has the gradient.
    """
    below = x < bound
    return torch.where(below, x, bound), torch.where(below, bound, x), below


def implicit(value: Tensor, residual: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
    r"""Return z, with the gradient that keeps :math:`F(z; \theta)` constant.

    .. math::
        \partial z = -J^{-1} \, \partial_\theta F, \qquad J = \partial F / \partial z

    Args:
        value: z, from any solver.
        residual: F at z, differentiable in :math:`\theta` alone.
        solve: function from g to :math:`J^{-\top} g`.

    Raises:
        RuntimeError: A second derivative is computed. Only first-order gradients are available.
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
    r"""Solve f(x) = 0 for increasing f, by Newton's method inside a bracket.

    The method is from Press et al. (2007, section 9.4). Bisection replaces a Newton step that
    leaves the bracket, or is more than half of the step before the last. The number of steps is
    fixed, so control flow does not depend on values. The first-order gradient
    :math:`\partial x = -\partial f / f'(x)` comes from the implicit function theorem, not through
    the iteration.

    Args:
        function: f, elementwise. It may close over tensors that require a gradient.
        slope: f', positive.
        low: points where f is not positive.
        high: points where f is not negative.
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


def real_parts(tensor: Tensor) -> Tensor:
    """Return a view of complex numbers as pairs of real ones, and other tensors unchanged."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def gradient_or_zeros(value: Tensor, point: Tensor, **options: bool) -> Tensor:
    """Return the gradient of the sum of ``value``, or zeros if it does not depend on ``point``.

    Args:
        value: any shape.
        point: a tensor that requires a gradient.
        **options: further arguments of ``torch.autograd.grad``.
    """
    if not value.requires_grad:
        return torch.zeros_like(point)
    (gradient,) = torch.autograd.grad(value.sum(), point, allow_unused=True, **options)
    return torch.zeros_like(point) if gradient is None else gradient


def softplus_scale(raw: Tensor) -> Tensor:
    """Map numbers to positive ones by a softplus, with zero mapped to one.

    A softplus grows linearly, so its gradient does not explode as that of an exponential does.
    """
    return softplus(raw + _ZERO_TO_ONE) + MIN_SCALE


def softplus(number: Tensor) -> Tensor:
    r"""Return :math:`\log(1 + e^t)`, exact to float64 rounding.

    torch's softplus returns t above 20. The error is 2e-9, which a likelihood of large counts
    multiplies.
    """
    return F.softplus(number, threshold=40.0)


def inverse_softplus_scale(value: float | Tensor) -> float | Tensor:
    """Return the number that :func:`softplus_scale` maps to a value above 1e-6."""
    rest = value - MIN_SCALE
    if isinstance(rest, Tensor):
        return rest + torch.log(-torch.expm1(-rest)) - _ZERO_TO_ONE
    return rest + math.log(-math.expm1(-rest)) - _ZERO_TO_ONE
