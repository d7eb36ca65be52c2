"""Roots of increasing functions, many at once, with the gradient that they have by theory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_vae._utils.implicit import implicit

# Each two steps halve the bracket or the step; Newton's last ones double the digits.
_ITERATIONS = 100


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
