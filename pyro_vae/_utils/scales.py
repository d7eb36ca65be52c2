"""Unconstrained numbers as positive ones, such as scales."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

_ZERO_TO_ONE = math.log(math.expm1(1.0))  # softplus(log(e - 1)) = 1
LEAST = 1e-6


def positive(raw: Tensor) -> Tensor:
    """Map numbers to positive ones by a softplus: zero to one, none to zero.

    A softplus grows linearly, where the gradient of an exponential explodes with it.
    """
    return softplus(raw + _ZERO_TO_ONE) + LEAST


def softplus(number: Tensor) -> Tensor:
    r"""Return :math:`\log(1 + e^t)`, to the rounding of float64.

    From 20 on, torch's own is t: an error of 2e-9, which a likelihood of large counts multiplies.
    """
    return F.softplus(number, threshold=40.0)


def raw_of(value: float) -> float:
    """Return the number that :func:`positive` maps to a given one, which is above 1e-6."""
    rest = value - LEAST
    return rest + math.log(-math.expm1(-rest)) - _ZERO_TO_ONE
