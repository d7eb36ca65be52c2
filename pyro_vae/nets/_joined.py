"""Networks of several tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_vae._utils.checks import require_tensor
from pyro_vae._utils.init_args import records_init_args


@records_init_args
class Joined(nn.Module):
    """Call a network on several tensors, concatenated along the last dimension.

    This turns any network into a decoder of p(x|z, y) or an encoder of q(z|x, y). Leading
    dimensions broadcast, such as labels ``(B, L)`` with samples ``(K, B, D)``.

    Args:
        network: network whose input size is the sum of the tensors' last dimensions.

    Shape:
        several tensors (..., n) to the network's output for (..., sum of n).

    Raises:
        ValueError: In a call, there is no tensor, or a tensor has no dimensions, or the leading
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
