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

    Each dimension is mapped by a monotone rational-quadratic spline on [-bound, bound], and by the
    identity outside. A network computes the knots. With coupling, it reads the first half of the
    dimensions; the map and its inverse take one pass each. If autoregressive, it reads all earlier
    dimensions; the map takes one pass, and the inverse takes D passes. Each layer reverses the
    order of the dimensions.

    Args:
        dim: D, at least two.
        autoregressive: use an autoregressive transform rather than coupling.
        bins: K, the number of bins of each spline.
        bound: half the width of the interval.
        context: size of the context.
        hidden: widths of the hidden layers, each at least D if autoregressive. By default one
            layer of 64, or of max(64, 2D) if autoregressive.

    Raises:
        ValueError: ``bins`` is not between 2 and 999, or ``bound`` is not positive.
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
