"""A model with a hierarchy of latent layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyro
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vae._programs.sites import DATA_PLATE
from pyro_vae._utils.checks import require_batch, require_distribution
from pyro_vae._utils.init_args import records_init_args


@records_init_args
class HierarchicalModel(PyroModule):
    r"""L layers of latent variables (Rezende et al. 2014; Sønderby et al. 2016, eq. 1-3).

    .. math:: p(x, z) = p(z_L) \Bigl(\prod_{l=1}^{L-1} p(z_l|z_{l+1})\Bigr) p(x|z_1)

    With skip connections, the factors are :math:`p(z_l|z_{l+1}, \ldots, z_L)` and
    :math:`p(x|z_1, \ldots, z_L)`. :class:`pyro_vae.guides.HierarchicalGuide` infers the layers
    bottom-up or top-down. Any other guide works, too.

    Args:
        prior: returns :math:`p(z_L)` when called without arguments.
        layers: modules from the top down. Each is a likelihood, such as ``likelihoods.Normal``:
            called on the layer above, it returns the distribution of its own layer.
        likelihood: returns p(x|z) when called on :math:`z_1`.
        skip: whether each layer and the likelihood are called on all layers above, the nearest
            first. Wrap a network in ``nets.Joined`` to call it on several tensors.

    Shape:
        x is ``(B, *event)`` with the event shape of the likelihood.

    Sites:
        ``"z_L"`` (L is replaced by its number) to ``"z_1"`` are latent and ``"x"`` is observed, all
        in the plate ``"data"``.

    Raises:
        TypeError: ``layers`` is not a sequence of modules.
        ValueError: ``layers`` is empty.

    Example:
        >>> import torch, pyro_vae as pv
        >>> normal = pv.likelihoods.Normal(
        ...     pv.nets.MLP(2, [8], 2 * 5), scale=pv.likelihoods.ScaleFromDecoder()
        ... )
        >>> likelihood = pv.likelihoods.Bernoulli(pv.nets.MLP(5, [8], 16))
        >>> model = pv.models.HierarchicalModel(pv.priors.StandardNormal(2), [normal], likelihood)
        >>> guide = pv.guides.HierarchicalGuide(model, encoder=pv.nets.MLP(16, [8]))
        >>> {name: tuple(z.shape) for name, z in guide(torch.zeros(3, 16)).items()}
        {'z_1': (3, 5), 'z_2': (3, 2)}
    """

    def __init__(
        self,
        prior: Callable[[], TorchDistributionMixin],
        layers: Sequence[nn.Module],
        likelihood: Callable[..., TorchDistributionMixin],
        skip: bool = False,
    ):
        super().__init__()
        several = isinstance(layers, nn.ModuleList | list | tuple)
        if not several or not all(isinstance(each, nn.Module) for each in layers):
            raise TypeError(
                f"layers must be a sequence of modules, from the top down; got {layers!r}"
            )
        if not len(layers):
            raise ValueError(
                "layers must have at least one module for HierarchicalModel, got none: for a "
                "single latent layer, use LatentVariableModel"
            )
        self.prior = prior
        self.layers = nn.ModuleList(layers)
        self.likelihood = likelihood
        self._skip = skip

    def forward(self, x: Tensor) -> Tensor:
        """Run the program on a minibatch x and return the value of the site ``"x"``."""
        p_top, top = require_distribution("prior", self.prior()), len(self.layers) + 1
        with pyro.plate(DATA_PLATE, require_batch("x", x), dim=-1):
            above = [pyro.sample(f"z_{top}", p_top)]
            for number, layer in zip(range(top - 1, 0, -1), self.layers, strict=True):
                z = pyro.sample(f"z_{number}", require_distribution("layer", layer(*above)))
                above = [z, *above] if self._skip else [z]
            p_x = require_distribution("likelihood", self.likelihood(*above))
            return pyro.sample("x", p_x, obs=x)
