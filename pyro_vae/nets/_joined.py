"""Networks of several tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_vae._utils.checks import require_tensor
from pyro_vae._utils.init_args import records_init_args


@records_init_args
class Joined(nn.Module):
    """Calls a network on several tensors, one behind the other in the last dimension.

    So a decoder of p(x|z, y) or an encoder of q(z|x, y) is made of any network. Leading dimensions
    broadcast: labels ``(B, L)`` go with samples ``(K, B, D)``.

    Args:
        network: of the last dimension, as large as the tensors' together.

    Shape:
        several of (..., n) to what the network makes of (..., sum of n).

    Raises:
        ValueError: when called: there is no tensor, or one without dimensions, or the leading
            dimensions do not broadcast.

    Example:
        >>> import torch, pyro_vae as pv
        >>> decoder = pv.nets.Joined(pv.nets.MLP(2 + 10, [8], 784))
        >>> decoder(torch.zeros(5, 100, 2), torch.eye(10)[torch.arange(100) % 10]).shape
        torch.Size([5, 100, 784])
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the network's output."""
        shapes = [tuple(require_tensor("each of Joined's inputs", x).shape) for x in inputs]
        if not inputs or () in shapes:
            raise ValueError(f"Joined needs tensors of shape (..., n), got shapes {shapes}")
        try:
            leading = torch.broadcast_shapes(*(shape[:-1] for shape in shapes))
        except RuntimeError as error:
            raise ValueError(
                f"Joined needs tensors (..., n) whose leading dimensions broadcast, got {shapes}"
            ) from error
        return self.network(torch.cat([each.expand(*leading, -1) for each in inputs], -1))
