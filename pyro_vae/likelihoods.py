"""Likelihoods: called on z, each gives the distribution p(x|z), its decoder inside."""

from __future__ import annotations

import pyro.distributions as dist
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn


class Bernoulli(nn.Module):
    r""":math:`p(x|z) = \prod_d \mathrm{Bernoulli}(x_d; \sigma(f_d(z)))` for x in {0, 1}.

    Args:
        decoder: network f from z to the logits of x.
        event_dim: how many of the rightmost dimensions of x make one datum.

    Raises:
        ValueError: ``event_dim`` is less than one.

    Example:
        >>> import torch, pyro_vae as pv
        >>> likelihood = pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 784))
        >>> p = likelihood(torch.zeros(100, 2))
        >>> p.batch_shape, p.event_shape
        (torch.Size([100]), torch.Size([784]))
    """

    def __init__(self, decoder: nn.Module, event_dim: int = 1):
        super().__init__()
        if event_dim < 1:
            raise ValueError(f"event_dim must be at least 1, got {event_dim}")
        self.decoder = decoder
        self.event_dim = event_dim

    def forward(self, z: Tensor) -> TorchDistributionMixin:
        """Return p(x|z) for z of shape ``(..., *latent event)``: batch shape (...)."""
        return dist.Bernoulli(logits=self.decoder(z)).to_event(self.event_dim)
