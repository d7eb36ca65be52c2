"""Affine autoregressive flows: fast to sample from, or fast to score."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor
from torch.distributions.transforms import Transform

from pyro_vae._utils.init_args import records_init_args
from pyro_vae.flows._base import Flow
from pyro_vae.flows._conditioning import Autoregressive
from pyro_vae.flows._elementwise import Affine
from pyro_vae.flows._networks import AutoregressiveNetwork


@records_init_args
class InverseAutoregressive(Flow):
    r"""Inverse autoregressive flow (Kingma et al. 2016, eq. 10), given a context.

    .. math::
        f(z)_d = \mu_d(z_{<d}, h) + \sigma_d(z_{<d}, h) z_d, \qquad
        \log|\det J| = \sum_d \log\sigma_d

    A masked network computes :math:`\mu` and :math:`\sigma` from z and the context h, the output of
    the encoder. The map takes one pass of the network. The inverse takes D passes; only scoring a
    value that was not sampled here needs it. Each layer reverses the order of the dimensions.

    Args:
        dim: D, at least two.
        context: size of h.
        hidden: widths of the hidden layers, each at least D; by default one layer of max(64, 2D).
    """

    min_dim = 2

    def __init__(self, dim: int, context: int = 16, hidden: Sequence[int] | None = None):
        super().__init__(dim)
        self.num_parameters = context
        hidden = [max(64, 2 * dim)] if hidden is None else hidden
        self._functions = Affine()
        self.network = AutoregressiveNetwork(dim, context, hidden, self._functions.num_parameters)

    def forward(self, parameters: Tensor) -> Transform:
        """Return the transform, given the context."""
        network = functools.partial(self.network, context=parameters)
        return Autoregressive(self._functions, network)


@records_init_args
class MaskedAutoregressive(InverseAutoregressive):
    r"""Masked autoregressive flow (Papamakarios et al. 2017, eq. 3-4), given a context.

    The inverse of :class:`InverseAutoregressive`. Scoring takes one pass, sampling takes D passes.

    Args:
        dim: D, at least two.
        context: size of h.
        hidden: widths of the hidden layers, each at least D; by default one layer of max(64, 2D).
    """

    def forward(self, parameters: Tensor) -> Transform:
        """Return the transform, given the context."""
        return super().forward(parameters).inv
