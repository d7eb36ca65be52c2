"""A hierarchy of stochastic layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyro
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vae._programs.sites import DATA_PLATE
from pyro_vae._utils.checks import require_batch
from pyro_vae._utils.init_args import records_init_args


@records_init_args
class HierarchicalModel(PyroModule):
    r"""L layers of latents (Rezende et al. 2014; Sønderby et al. 2016, eq. 1-3).

    .. math:: p(x, z) = p(z_L) \Bigl(\prod_{l=1}^{L-1} p(z_l|z_{l+1})\Bigr) p(x|z_1)

    or, with skip connections, :math:`p(z_l|z_{l+1}, \dots, z_L)` and :math:`p(x|z_1, \dots, z_L)`.
    :class:`pyro_vae.guides.HierarchicalGuide` infers them bottom-up or top-down; any other guide
    serves, too.

    Args:
        prior: called without arguments, gives :math:`p(z_L)`.
        layers: from the top down, each a module called on the layer above that gives the
            distribution of its own: a likelihood, such as ``likelihoods.Normal``.
        likelihood: called on :math:`z_1`, gives p(x|z).
        skip: whether layers and likelihood are called on all layers above, the nearest first;
            ``nets.Joined`` makes a network take several tensors.

    Shape:
        x is ``(B, *event)``, the event that of the likelihood.

    Sites:
        latents ``"z_L"`` (its number in place of L) to ``"z_1"`` and ``"x"`` observed, all in the
        plate ``"data"``.

    Raises:
        TypeError: ``layers`` is no sequence of modules.
        ValueError: it is empty.

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
                "HierarchicalModel needs layers, one at least below the top: without one it is a "
                "LatentVariableModel"
            )
        self.prior = prior
        self.layers = nn.ModuleList(layers)
        self.likelihood = likelihood
        self._skip = skip

    def forward(self, x: Tensor) -> Tensor:
        """Run the program on a minibatch x and return it."""
        p_top, top = self.prior(), len(self.layers) + 1
        with pyro.plate(DATA_PLATE, require_batch("x", x), dim=-1):
            above = [pyro.sample(f"z_{top}", p_top)]
            for number, layer in zip(range(top - 1, 0, -1), self.layers, strict=True):
                z = pyro.sample(f"z_{number}", layer(*above))
                above = [z, *above] if self._skip else [z]
            return pyro.sample("x", self.likelihood(*above), obs=x)
