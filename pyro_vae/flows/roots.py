"""Roots of increasing functions, many at once, with the gradient that they have by theory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Bisection alone would need as many as a float64 has bits; Newton's method needs a few.
_ITERATIONS = 60


def increasing_root(
    function: Callable[[Tensor], Tensor],
    slope: Callable[[Tensor], Tensor],
    low: Tensor,
    high: Tensor,
) -> Tensor:
    r"""Solve f(x) = 0 for f increasing, by Newton's method kept inside a bracket.

    Where Newton's step leaves the bracket, bisection takes its place. The number of steps is
    fixed, so that nothing depends on values. The gradient is that of the implicit function
    theorem, :math:`\partial x = -\partial f / f'(x)`: the iteration is not differentiated.

    Args:
        function: f, elementwise; it may close over tensors that require a gradient.
        slope: f', positive.
        low: where f is not positive.
        high: where f is not negative.
    """
    with torch.no_grad():
        x = (low + high) / 2
        for _ in range(_ITERATIONS):
            value = function(x)
            low = torch.where(value < 0, x, low)
            high = torch.where(value > 0, x, high)
            newton = x - value / slope(x)
            x = torch.where((newton >= low) & (newton <= high), newton, (low + high) / 2)
    return x - function(x) / slope(x).detach()
