"""Radial flows."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_vae._utils.init_args import records_init_args
from pyro_vae.flows._base import Flow, FlowTransform


@records_init_args
class Radial(Flow):
    r"""A radial flow (Rezende & Mohamed 2015, eq. 14) with D+2 parameters c, alpha and beta.

    .. math::
        f(z) = z + \beta \frac{z - c}{\alpha + r}, \qquad r = |z - c|, \\
        \log|\det J| = (D-1) \log\Bigl(1 + \frac{\beta}{\alpha + r}\Bigr)
            + \log\Bigl(1 + \frac{\alpha\beta}{(\alpha + r)^2}\Bigr)

    Here c is the center. Softplus functions ensure :math:`\alpha > 0` and :math:`\beta > -\alpha`.
    The radius of the inverse is the positive root of a quadratic equation.

    Args:
        dim: D.
    """

    def __init__(self, dim: int):
        super().__init__(dim)
        self.num_parameters = dim + 2

    def forward(self, parameters: Tensor) -> FlowTransform:
        """Return the transform with a center c, alpha and beta."""
        center, alpha, beta = parameters.split([self.dim, 1, 1], -1)
        return _Radial(center, alpha.squeeze(-1), beta.squeeze(-1))


class _Radial(FlowTransform):
    def __init__(self, center: Tensor, alpha: Tensor, beta: Tensor):
        super().__init__()
        self._centre = center
        self._alpha = F.softplus(alpha) + 1e-3
        # beta > -alpha with a margin. softplus(log(e^s - 1)) = s, so zero gives zero.
        least = 0.999
        self._beta = self._alpha * (F.softplus(beta + math.log(math.expm1(least))) - least)

    def map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        offset = x - self._centre
        size = self._alpha + _norm(offset)
        stretch = self._beta / size
        log_det = (x.shape[-1] - 1) * torch.log1p(stretch)
        log_det = log_det + torch.log1p(stretch * self._alpha / size)
        return x + stretch.unsqueeze(-1) * offset, log_det

    def unmap(self, y: Tensor) -> Tensor:
        offset = y - self._centre
        radius = _norm(offset)  # = r + beta r / (alpha + r); solve for r
        linear = radius - self._alpha - self._beta
        # The positive root of r^2 - linear r - alpha radius = 0, without cancellation.
        size = linear.abs() + (linear.square() + 4 * self._alpha * radius).sqrt()
        r = torch.where(linear > 0, size / 2, 2 * self._alpha * radius / size)
        return self._centre + offset / (1 + self._beta / (self._alpha + r)).unsqueeze(-1)


def _norm(offset: Tensor) -> Tensor:
    """Return the norm, with a finite gradient at zero."""
    return (offset.square().sum(-1) + torch.finfo(offset.dtype).tiny).sqrt()
