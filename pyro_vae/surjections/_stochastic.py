"""Variational autoencoders as layers."""

from __future__ import annotations

from collections.abc import Callable

from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from pyro_vae._utils.init_args import records_init_args
from pyro_vae.surjections._surjection import SurVAELayer


@records_init_args
class Stochastic(SurVAELayer):
    r"""A layer of a VAE: both directions are random (Kingma & Welling 2014).

    .. math:: V(x, z) = \log p(x|z) - \log q(z|x), \qquad z \sim q(z|x)

    Args:
        encoder: function from x to q(z|x). A likelihood can be used here as well.
        decoder: function from z to p(x|z); see :mod:`pyro_vae.likelihoods`.

    Example:
        >>> import torch, pyro_vae as pv
        >>> import pyro.distributions as dist
        >>> net = pv.nets.MLP(2, [8], 16)
        >>> layer = pv.surjections.Stochastic(
        ...     encoder=lambda x: dist.Normal(x[..., :2], 1.0).to_event(1),
        ...     decoder=pv.likelihoods.Bernoulli(net),
        ... )
        >>> z = layer.infer(torch.zeros(5, 16)).sample()
        >>> layer.generate(z).event_shape
        torch.Size([16])
    """

    def __init__(
        self,
        encoder: Callable[[Tensor], TorchDistributionMixin],
        decoder: Callable[[Tensor], TorchDistributionMixin],
    ):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def generate(self, z: Tensor) -> TorchDistributionMixin:
        """Return p(x|z)."""
        return self.decoder(z)

    def infer(self, x: Tensor) -> TorchDistributionMixin:
        """Return q(z|x)."""
        return self.encoder(x)
