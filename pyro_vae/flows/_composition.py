"""A composition of flow layers that all data share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.distributions.transforms import ComposeTransform

from pyro_vae._utils.init_args import records_init_args
from pyro_vae.flows._base import Flow
from pyro_vae.flows._coupling import AffineCoupling


@records_init_args
class Composition(nn.Module):
    r"""The bijection :math:`f_L \circ \ldots \circ f_1` of R^D, with free parameters.

    A call without arguments returns the transform. With its initial parameters, it is close to the
    identity.

    Args:
        dim: D.
        flow: function from D to a layer: a class of :mod:`pyro_vae.flows`, a
            ``functools.partial`` of one, or your own :class:`pyro_vae.flows.Flow`.
        length: L, the number of layers.

    Raises:
        ValueError: ``length`` is not positive, or the flow needs more dimensions.

    Example:
        >>> import torch, pyro_vae as pv
        >>> f = pv.flows.Composition(3, pv.flows.NeuralSpline, length=2)()
        >>> z = torch.randn(10, 3)
        >>> torch.allclose(f.inv(f(z)), z, atol=1e-5)
        True
    """

    def __init__(self, dim: int, flow: Callable[[int], Flow] = AffineCoupling, length: int = 8):
        super().__init__()
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.dim = dim
        self.layers = nn.ModuleList(flow(dim) for _ in range(length))
        self.numbers = nn.ParameterList(
            0.1 * torch.randn(layer.num_parameters) for layer in self.layers
        )

    def forward(self) -> ComposeTransform:
        """Return the transform."""
        pairs = zip(self.layers, self.numbers, strict=True)
        return ComposeTransform([layer(numbers) for layer, numbers in pairs])
