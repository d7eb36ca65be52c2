"""What a likelihood is: a decoder's numbers in, the distribution p(x|z) out."""

from __future__ import annotations

from abc import abstractmethod

from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyro_vae._utils.checks import ShapeError, checked


class Likelihood(nn.Module):
    r"""A distribution :math:`p(x|z)` of independent numbers, whose parameters a decoder gives.

    A subclass says in ``forward`` which distribution it is. Where that has P parameters for each
    number of x, the decoder gives P times as many numbers as x has, one block behind the other
    along the first dimension of the event: vectors of P D numbers for D, images of P C channels
    for C. ``self.outputs(P, *inputs)`` takes the blocks apart.

    Args:
        decoder: network from z, and any covariates, to the parameters of x.
        event_dim: how many of the rightmost dimensions of x make one datum.

    Shape:
        ``likelihood(z, *covariates)`` has the batch shape that the decoder gives, and the event
        shape of x.

    Raises:
        ValueError: ``event_dim`` is less than one.

    Example:
        >>> import torch, pyro_vae as pv
        >>> import pyro.distributions as dist
        >>> class Gumbel(pv.likelihoods.Likelihood):
        ...     def forward(self, *inputs):
        ...         loc, log_scale = self.outputs(2, *inputs)
        ...         return dist.Gumbel(loc, log_scale.exp()).to_event(self.event_dim)
        >>> Gumbel(pv.nets.MLP(2, [8], 2 * 5))(torch.zeros(100, 2)).event_shape
        torch.Size([5])
    """

    @checked
    def __init__(self, decoder: nn.Module, event_dim: int = 1):
        super().__init__()
        if event_dim < 1:
            raise ValueError(f"event_dim must be at least 1, got {event_dim}")
        self.decoder = decoder
        self.event_dim = event_dim

    @abstractmethod
    def forward(self, *inputs: Tensor) -> TorchDistributionMixin:
        """Return p(x|z) for z ``(..., *latent event)`` and any covariates: batch shape (...)."""

    def outputs(self, parts: int, *inputs: Tensor) -> Tensor:
        """Return what the decoder gives, cut into equal parts.

        Args:
            parts: P.
            *inputs: of the decoder.

        Returns:
            Shape ``(P, ..., *event)``.

        Raises:
            ValueError: the decoder's output has less than ``event_dim`` dimensions, or the first
                of these cannot be divided by P.
        """
        numbers = self.decoder(*inputs)
        shape, event_dim = tuple(numbers.shape), self.event_dim
        if 0 in shape:
            raise ShapeError(
                f"{type(self).__name__} was called on z of no data: its decoder gave shape {shape}"
            )
        if len(shape) < event_dim:
            raise ValueError(
                f"{type(self).__name__} has events of {event_dim} dimensions, but its decoder gave "
                f"a tensor of shape {shape}: change event_dim or the decoder"
            )
        size = shape[-event_dim]
        if size % parts:
            raise ValueError(
                f"{type(self).__name__} takes {parts} numbers of its decoder for each number of x, "
                f"as {parts} equal parts of dimension {-event_dim}, but the decoder gave shape "
                f"{shape}, and {size} cannot be divided by {parts}: let it give {parts} times as "
                "many numbers as x has"
            )
        return numbers.unflatten(-event_dim, (parts, size // parts)).movedim(-event_dim - 1, 0)
