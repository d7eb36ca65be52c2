"""The standard normal prior."""

from __future__ import annotations

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import nn

from pyro_vae._utils.checks import positive_integer
from pyro_vae._utils.init_args import records_init_args
from pyro_vae.distributions._casting import Normal


@records_init_args
class StandardNormal(nn.Module):
    r""":math:`p(z) = \mathcal{N}(z; 0, I)` (Kingma & Welling 2014).

    Args:
        *event_shape: shape of z, usually one number, its dimension.

    Raises:
        ValueError: No size is given, or a size is not positive.

    Example:
        >>> import pyro_vae as pv
        >>> pv.priors.StandardNormal(50)().event_shape
        torch.Size([50])
    """

    def __init__(self, *event_shape: int):
        super().__init__()
        if not event_shape:
            raise ValueError(
                "StandardNormal needs event_shape, the sizes of z, got none. Pass at least one"
            )
        for size in event_shape:
            positive_integer("a size of event_shape", size)
        self.event_shape = torch.Size(event_shape)
        self.register_buffer("loc", torch.zeros(self.event_shape))
        self.register_buffer("scale", torch.ones(self.event_shape))

    def forward(self) -> TorchDistributionMixin:
        """Return p(z): batch shape (), event shape ``event_shape``."""
        return Normal(self.loc, self.scale).to_event(len(self.event_shape))
