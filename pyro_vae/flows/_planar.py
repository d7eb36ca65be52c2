"""Planar flows."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_vae._utils.init_args import records_init_args
from pyro_vae._utils.numerics import increasing_root
from pyro_vae.flows._base import Flow, FlowTransform

_LEAST_SLOPE = 1e-3


@records_init_args
class Planar(Flow):
    r"""A planar flow (Rezende & Mohamed 2015, eq. 10-12) with D+D+1 parameters u, w, b.

    .. math::
        f(z) = z + \hat u \tanh(w^\top z + b), \qquad
        \log|\det J| = \log(1 + w^\top\hat u \, (1 - \tanh^2(w^\top z + b)))

    Here :math:`\hat u = u + (m(w^\top u) - w^\top u) w / |w|^2`. The function m is a softplus,
    shifted so that m(0) = 0 and :math:`m > -1`. Then :math:`w^\top\hat u > -1`, so f is
    invertible. The inverse solves one increasing equation for :math:`w^\top z`.

    Args:
        dim: D.

    Example:
        >>> import torch, pyro_vae as pv
        >>> f = pv.flows.Planar(3)(torch.randn(7))
        >>> z = torch.randn(10, 3)
        >>> y = f(z)
        >>> f.log_abs_det_jacobian(z, y).shape
        torch.Size([10])
        >>> torch.allclose(f.inv(y.clone()), z, atol=1e-5)
        True
    """

    def __init__(self, dim: int):
        super().__init__(dim)
        self.num_parameters = 2 * dim + 1

    def forward(self, parameters: Tensor) -> FlowTransform:
        """Return the transform of u, w and b."""
        u, w, b = parameters.split([self.dim, self.dim, 1], -1)
        return _Planar(u, w, b.squeeze(-1))


class _Planar(FlowTransform):
    def __init__(self, u: Tensor, w: Tensor, b: Tensor):
        super().__init__()
        product, square = (w * u).sum(-1), w.square().sum(-1)
        least = _LEAST_SLOPE - 1
        bounded = least + F.softplus(product + math.log(math.expm1(-least)))
        self._w, self._b = w, b
        # If w is zero, the map is a shift and needs no direction.
        self._u = u + ((bounded - product) / (square + 1e-12)).unsqueeze(-1) * w
        self._product = (w * self._u).sum(-1)

    def map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh((self._w * x).sum(-1) + self._b)
        return x + self._u * h.unsqueeze(-1), torch.log1p(self._product * (1 - h * h))

    def unmap(self, y: Tensor) -> Tensor:
        along = (self._w * y).sum(-1)
        reach = self._product.abs()

        def excess(a: Tensor) -> Tensor:
            return a + self._product * torch.tanh(a + self._b) - along

        def slope(a: Tensor) -> Tensor:
            return 1 + self._product * (1 - torch.tanh(a + self._b).square())

        a = increasing_root(excess, slope, along - reach, along + reach)
        return y - self._u * torch.tanh(a + self._b).unsqueeze(-1)
