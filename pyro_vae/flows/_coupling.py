"""Affine coupling flows."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor
from torch.distributions.transforms import Transform

from pyro_vae._utils.init_args import records_init_args
from pyro_vae.flows._base import Flow
from pyro_vae.flows._conditioning import Coupling
from pyro_vae.flows._elementwise import Affine
from pyro_vae.flows._networks import CouplingNetwork


@records_init_args
class AffineCoupling(Flow):
    r"""Affine coupling (Dinh et al. 2017, eq. 4-8), given a context.

    .. math::
        f(z)_a = z_a, \qquad f(z)_b = \mu(z_a, h) + \sigma(z_a, h) \odot z_b, \qquad
        \log|\det J| = \sum_d \log\sigma_d

    Here a is the first half of the dimensions, and b is the second half. Each layer reverses the
    order of the dimensions. The map and its inverse take one pass of the network each.

    Args:
        dim: D, at least two.
        context: size of h.
        hidden: widths of the hidden layers.
    """

    min_dim = 2

    def __init__(self, dim: int, context: int = 16, hidden: Sequence[int] = (64,)):
        super().__init__(dim)
        self.num_parameters = context
        self._functions = Affine()
        self.network = CouplingNetwork(
            dim // 2, dim - dim // 2, context, hidden, self._functions.num_parameters
        )

    def forward(self, parameters: Tensor) -> Transform:
        """Return the transform, given the context."""
        network = functools.partial(self.network, context=parameters)
        return Coupling(self._functions, network)
