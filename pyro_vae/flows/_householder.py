"""Householder flows."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae._utils.init_args import records_init_args
from pyro_vae.flows._base import Flow, FlowTransform


@records_init_args
class Householder(Flow):
    r"""A reflection (Tomczak & Welling 2016, eq. 7) with D parameters v.

    .. math:: f(z) = z - 2 \frac{v v^\top z}{|v|^2}, \qquad \log|\det J| = 0

    Up to D reflections rotate a diagonal Gaussian into a Gaussian with any covariance.

    Args:
        dim: D, at least two; in one dimension, a reflection only flips the sign.
    """

    min_dim = 2

    def __init__(self, dim: int):
        super().__init__(dim)
        self.num_parameters = dim

    def forward(self, parameters: Tensor) -> FlowTransform:
        """Return the reflection across the plane orthogonal to v."""
        # Zero parameters give the first axis, because v = 0 does not define a plane.
        first = torch.eye(1, self.dim, dtype=parameters.dtype, device=parameters.device)
        return _Householder(parameters + first.squeeze(0))


class _Householder(FlowTransform):
    def __init__(self, v: Tensor):
        super().__init__()
        self._v = v

    def map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.unmap(x)
        return y, torch.zeros_like(y[..., 0])

    def unmap(self, y: Tensor) -> Tensor:
        return reflect(y, self._v)


def reflect(x: Tensor, v: Tensor) -> Tensor:
    """Reflect x (..., D) across the plane through the origin orthogonal to v (..., D)."""
    return x - 2 * v * ((v * x).sum(-1) / v.square().sum(-1)).unsqueeze(-1)
