"""The base class of likelihoods, which turn decoder outputs into p(x|z)."""

from __future__ import annotations

from abc import abstractmethod

from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyro_vae._utils.checks import ShapeError, checked
from pyro_vae._utils.network_outputs import output_of


class Likelihood(nn.Module):
    r"""A distribution :math:`p(x|z)` of independent numbers, with parameters from a decoder.

    A subclass returns its distribution from ``forward``. If each number of x has P parameters, the
    decoder outputs P times as many numbers as x has. The P blocks are consecutive along the first
    dimension of the event. A vector of D numbers needs P D outputs, and an image of C channels P C
    channels. Call ``self.outputs(P, *inputs)`` to split the blocks.

    Args:
        decoder: network from z, and any covariates, to the parameters of x.
        event_dim: number of rightmost dimensions of x that form one data point.

    Shape:
        ``likelihood(z, *covariates)`` has the batch shape of the decoder's output and the event
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
        """Return p(x|z), of batch shape (...), for z ``(..., *latent event)`` and covariates."""

    def outputs(self, parts: int, *inputs: Tensor) -> Tensor:
        """Return the decoder's output, split into equal parts.

        Args:
            parts: P.
            *inputs: inputs of the decoder.

        Returns:
            Shape ``(P, ..., *event)``.

        Raises:
            TypeError: The decoder does not return a tensor, or does not take the covariates.
            ValueError: The decoder's output has fewer than ``event_dim`` dimensions. Or the first
                of its ``event_dim`` rightmost sizes is not divisible by P.
        """
        numbers = output_of(
            "decoder",
            self.decoder,
            *inputs,
            use="Return all parameters of x as one tensor, in equal blocks along the first "
            "dimension of the event: torch.cat([loc, raw_scale], -1) if x is a vector",
        )
        shape, event_dim = tuple(numbers.shape), self.event_dim
        if 0 in shape:
            raise ShapeError(
                f"{type(self).__name__} was called on an empty z: its decoder returned "
                f"shape {shape}"
            )
        if len(shape) < event_dim:
            raise ValueError(
                f"{type(self).__name__} has events of {event_dim} dimensions, but its decoder "
                f"returned a tensor of shape {shape}: change event_dim or the decoder"
            )
        size = shape[-event_dim]
        if size % parts:
            raise ValueError(
                f"{type(self).__name__} needs {parts} decoder outputs for each number of x, as "
                f"{parts} equal parts of dimension {-event_dim}, but the decoder "
                f"returned shape {shape}. {size} is not divisible by {parts}. Let the decoder "
                f"return {parts} times as many numbers as x has"
            )
        return numbers.unflatten(-event_dim, (parts, size // parts)).movedim(-event_dim - 1, 0)
