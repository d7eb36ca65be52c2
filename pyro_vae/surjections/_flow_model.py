"""Normalizing flows, VAEs and combinations of both as one model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions.transforms import Transform

from pyro_vae._programs.argument_shapes import shape_is_unknown
from pyro_vae._programs.sites import DATA_PLATE
from pyro_vae._utils.checks import require_batch, require_distribution
from pyro_vae._utils.init_args import records_init_args
from pyro_vae.surjections._bijection import Bijection
from pyro_vae.surjections._surjection import SurVAELayer, check_batch, check_support


@records_init_args
class FlowModel(PyroModule):
    r"""Model of a prior and a stack of layers, such as a normalizing flow.

    With :math:`x = h_0, h_1, \ldots, h_L = z`,

    .. math:: p(x, h) = p(h_L) \prod_{l=1}^L p(h_{l-1}|h_l)

    (Nielsen et al. 2020). Its guide is :class:`FlowGuide`, which infers with the same layers. If
    all layers are bijections, the ELBO of one particle is the log-density of the flow,

    .. math:: \log p(x) = \log p(f(x)) + \log|\det J_f(x)|

    up to rounding. Then maximizing the ELBO is maximum likelihood. Another guide would sample
    latents that are not the image of x, and their density is zero.

    Args:
        prior: function without arguments that returns p(z); see :mod:`pyro_vae.priors`.
        layers: a layer, or a sequence of layers from the data to the latent; see
            :mod:`pyro_vae.surjections`. A torch ``Transform`` from data to latent, or a module that
            returns one, becomes a :class:`Bijection` of vectors.

    Shape:
        x is ``(B, *event)``.

    Sites:
        ``"x"`` is observed. One layer has the latent ``"z"``. Several layers have ``"z_1"`` (next
        to the data) to ``"z_L"`` (the prior's). All sites are in the plate ``"data"``.

    Attributes:
        latents: the names of the latent sites, from the data upwards.

    Raises:
        TypeError: An entry of ``layers`` is not a layer, a transform or a module that returns one.
        ValueError: There are no layers, or a transform acts on events of more than one dimension.
            In a call, the shapes of x, of two layers or of the prior do not fit.

    Example:
        >>> import torch, pyro_vae as pv
        >>> flow = pv.flows.Composition(3, length=2)
        >>> model = pv.surjections.FlowModel(pv.priors.StandardNormal(3), flow)
        >>> guide = pv.surjections.FlowGuide(model)
        >>> x = torch.randn(5, 3)
        >>> f = model.layers[0].transform
        >>> z = f(x)
        >>> log_p = model.prior().log_prob(z) + f.log_abs_det_jacobian(x, z)
        >>> torch.allclose(pv.terms(model, guide, x).log_weight[0], log_p)
        True
    """

    def __init__(
        self,
        prior: Callable[[], TorchDistributionMixin],
        layers: Any | Sequence[Any],
    ):
        super().__init__()
        if isinstance(layers, Transform) or not isinstance(layers, Sequence | nn.ModuleList):
            layers = [layers]
        if not len(layers):
            raise ValueError("FlowModel needs at least one layer in layers, got none")
        self.prior = prior
        self.layers = nn.ModuleList(_as_layer(layer) for layer in layers)
        count = len(self.layers)
        self.latents = ("z",) if count == 1 else tuple(f"z_{n}" for n in range(1, count + 1))

    def forward(self, x: Tensor) -> Tensor:
        """Run the program on a minibatch and return x."""
        p = require_distribution("prior", self.prior())
        with pyro.plate(DATA_PLATE, require_batch("x", x), dim=-1):
            for name, layer in zip(self.latents[::-1], [*self.layers][::-1], strict=True):
                check_support(layer, p)
                z = pyro.sample(name, p)
                event = p.event_shape
                if z.shape[z.dim() - len(event) :] != event:
                    raise ValueError(
                        f"the latent {name!r} has shape {tuple(z.shape)}, but the prior, or the "
                        f"layer above, has events of shape {tuple(event)}: both must have the "
                        "event shape that the layers infer from x"
                    )
                p = layer.generate(z)
                check_batch(layer, z, len(event), p)
            if p.event_shape != x.shape[1:] and not shape_is_unknown():
                raise ValueError(
                    f"x has events of shape {tuple(x.shape[1:])}, but the prior and the "
                    f"layers generate events of shape {tuple(p.event_shape)}"
                )
            return pyro.sample("x", p, obs=x)


def _as_layer(layer: Any) -> SurVAELayer:
    if isinstance(layer, SurVAELayer):
        return layer
    if isinstance(layer, Transform):
        return Bijection(layer)
    if isinstance(layer, nn.Module) and not hasattr(layer, "generate"):
        try:
            return Bijection(layer)
        except TypeError as error:
            raise TypeError(f"{type(layer).__name__} is not a layer: {error}") from error
    raise TypeError(
        "FlowModel takes layers, torch Transforms, or modules that return a Transform when called "
        f"without arguments; got {type(layer).__name__}"
    )
