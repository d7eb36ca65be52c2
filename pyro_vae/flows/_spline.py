"""Neural spline flows."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor
from torch.distributions.transforms import Transform

from pyro_vae._utils.init_args import records_init_args
from pyro_vae.flows._base import Flow
from pyro_vae.flows._conditioning import Autoregressive, Coupling
from pyro_vae.flows._elementwise import RationalQuadratic
from pyro_vae.flows._networks import AutoregressiveNetwork, CouplingNetwork


@records_init_args
class NeuralSpline(Flow):
    r"""Neural spline flow (Durkan et al. 2019), given a context.

    Each dimension is mapped by a monotone rational-quadratic spline on [-bound, bound], the
    identity outside. Its knots come from a network: of the first half of the dimensions (coupling:
    one pass maps, one unmaps), or of all dimensions before (autoregressive: one pass maps, D
    unmap). The order of dimensions is reversed from layer to layer.

    Args:
        dim: D, at least two.
        autoregressive: rather than coupling.
        bins: K, of each spline.
        bound: of the box.
        context: numbers in the context.
        hidden: widths of the network; autoregressive ones are at least D. One layer of 64, or of
            max(64, 2D), if not given.

    Raises:
        ValueError: ``bins`` or ``bound`` make no spline.
    """

    min_dim = 2

    def __init__(
        self,
        dim: int,
        autoregressive: bool = False,
        bins: int = 8,
        bound: float = 5.0,
        context: int = 16,
        hidden: Sequence[int] | None = None,
    ):
        super().__init__(dim)
        self.num_parameters = context
        self._functions = RationalQuadratic(bins, bound)
        outputs = self._functions.num_parameters
        if autoregressive:
            hidden = [max(64, 2 * dim)] if hidden is None else hidden
            self.network = AutoregressiveNetwork(dim, context, hidden, outputs)
        else:
            hidden = [64] if hidden is None else hidden
            self.network = CouplingNetwork(dim // 2, dim - dim // 2, context, hidden, outputs)
        self._conditioning = Autoregressive if autoregressive else Coupling

    def forward(self, parameters: Tensor) -> Transform:
        """Return the transform, given the context."""
        network = functools.partial(self.network, context=parameters)
        return self._conditioning(self._functions, network)
