"""Encoders of data with missing numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae._utils.checks import require_tensor
from pyro_vae._utils.init_args import records_init_args


@records_init_args
class ZeroImputed(nn.Module):
    """Call a network on x with zeros in place of missing numbers, which are NaN or infinite.

    With ``with_mask``, the network also gets the mask, which is 1 for an observed number and 0 for
    a missing one. Without the mask, it cannot distinguish a missing number from an observed zero.
    Further arguments, such as covariates, are passed unchanged.

    Args:
        network: network from x, and any covariates, to features.
        with_mask: whether to append the mask to x along the first dimension of a data point.
            Vectors of D numbers become vectors of 2 D, and images of C channels have 2 C.

    Shape:
        x ``(B, *event)`` to the network's output.

    Example:
        >>> import torch, pyro_vae as pv
        >>> net = pv.nets.ZeroImputed(torch.nn.Identity(), with_mask=True)
        >>> net(torch.tensor([[2.0, torch.nan]]))
        tensor([[2., 0., 1., 0.]])
    """

    def __init__(self, network: nn.Module, with_mask: bool = False):
        super().__init__()
        self.network = network
        self.with_mask = with_mask

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        """Return the network's output."""
        observed = require_tensor("the x that ZeroImputed is called on", x).isfinite()
        if x.is_floating_point():
            x = torch.where(observed, x, torch.zeros_like(x))
        if self.with_mask:
            x = torch.cat([x, observed.to(x.dtype)], 1)
        return self.network(x, *others)
