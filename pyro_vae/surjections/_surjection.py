"""Base classes of layers with a generative and an inference direction."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution, TorchDistributionMixin
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from pyro_vae._programs.sites import is_real
from pyro_vae.surjections._images import Image, Preimage, Split


class SurVAELayer(nn.Module):
    r"""One layer of a :class:`FlowModel`: p(x|z), and q(z|x) (Nielsen et al. 2020).

    ``infer`` maps a data point upwards through the layers, and ``generate`` maps a latent
    downwards. A layer adds

    .. math:: V(x, z) = \log p(x|z) - \log q(z|x)

    to the log-likelihood. Autoencoders, bijections and surjections differ only in these two
    distributions. A subclass defines both. If the layer is a deterministic map in one direction,
    derive it from :class:`InferenceSurjection` or :class:`GenerativeSurjection`.
    """

    @abstractmethod
    def generate(self, z: Tensor) -> TorchDistributionMixin:
        """Return p(x|z), of batch shape ``batch``, for z ``(*batch, *latent event)``."""

    @abstractmethod
    def infer(self, x: Tensor) -> TorchDistributionMixin:
        """Return q(z|x), of batch shape ``batch``, for x ``(*batch, *event)``."""


class Surjection(SurVAELayer):
    r"""A layer made of a map from an input to an output, which usually has less information.

    The remainder is the information that the output lacks. The pair (output, remainder) determines
    the input, and the input determines the pair. The layer has a distribution of the remainder
    given the output.

    Attributes:
        input_event_dim: number of event dimensions of the input.
        output_event_dim: number of event dimensions of the output.
        remainder_event_dim: number of event dimensions of the remainder.
        input_support: constraint that every input satisfies.
        output_support: constraint that every output satisfies.
    """

    input_event_dim: int = 1
    output_event_dim: int = 1
    remainder_event_dim: int = 1

    @property
    def input_support(self) -> Constraint:
        """All real numbers."""
        return constraints.real

    @property
    def output_support(self) -> Constraint:
        """All real numbers."""
        return constraints.real

    @abstractmethod
    def split(self, input: Tensor) -> Split:
        """Return the output, the remainder and the log-volume of an input."""

    @abstractmethod
    def join(self, output: Tensor, remainder: Any) -> Tensor:
        """Return the input with this output and remainder, which is None for a bijection."""

    @abstractmethod
    def remainder(self, output: Tensor) -> TorchDistribution | None:
        """Return the distribution of the remainder given the output; None for a bijection."""

    @abstractmethod
    def input_shape(self, output_shape: torch.Size, remainder_shape: torch.Size) -> torch.Size:
        """Return the event shape of the input, given those of the output and the remainder."""

    def log_volume(self, remainder: Tensor) -> Tensor | float:
        """Return the log-volume of a split with this remainder."""
        return 0.0

    def same(self, value: Tensor, output: Tensor) -> Tensor:
        """Return whether two outputs are equal up to rounding, ``(*batch)``."""
        eps = max(torch.finfo(t.dtype).eps for t in (value, output) if t.dtype.is_floating_point)
        near = (value - output).abs() <= eps**0.5 * (1 + output.abs())
        return all_of_event(near, self.output_event_dim)


class InferenceSurjection(Surjection):
    r"""The map goes from data to latent: z is the image of x, and x is a sample that maps to z.

    .. math:: V(x, z) = \log p(r|z) + \log|\det \partial(z, r) / \partial x|, \qquad x = (z, r)

    The layer is exact. If all layers are of this kind, the ELBO equals log p(x).
    """

    def infer(self, x: Tensor) -> Image:
        """Return q(z|x), the image of x."""
        return Image(self, x)

    def generate(self, z: Tensor) -> Preimage:
        """Return p(x|z)."""
        return Preimage(self, z)


class GenerativeSurjection(Surjection):
    r"""The map goes from latent to data: x is the image of z, and z is a sample that maps to x.

    .. math:: V(x, z) = -\log q(r|x) - \log|\det \partial(x, r) / \partial z|, \qquad z = (x, r)

    The ELBO is a lower bound. It equals log p(x) only if q(z|x) is the posterior.
    """

    def infer(self, x: Tensor) -> Preimage:
        """Return q(z|x)."""
        return Preimage(self, x)

    def generate(self, z: Tensor) -> Image:
        """Return p(x|z), the image of z."""
        return Image(self, z)


def check_support(layer: nn.Module, above: TorchDistribution) -> None:
    """Raise ValueError if the distribution above has mass that belongs to no data point.

    Raises:
        ValueError: The distribution is on all real numbers, but the layer maps to a part of them.
    """
    if not isinstance(layer, InferenceSurjection):
        return
    if not is_real(layer.output_support) and is_real(above.support):
        raise ValueError(
            f"layer {type(layer).__name__} maps data to {layer.output_support}, but the prior, or "
            "the layer above, is on all real numbers, so part of its mass belongs to no data "
            "point. Use a prior with that support. If the transform should map the other way, pass "
            "transform.inv"
        )


def all_of_event(flags: Tensor, event_dim: int) -> Tensor:
    """Return whether all flags of an event are True, ``(*batch)``."""
    return flags.flatten(flags.dim() - event_dim).all(-1) if event_dim else flags


def sum_of_event(values: Tensor, event_dim: int) -> Tensor:
    """Sum values over an event, ``(*batch)``."""
    return values.flatten(values.dim() - event_dim).sum(-1) if event_dim else values


def check_batch(layer: nn.Module, given: Tensor, event_dim: int, result: TorchDistribution) -> None:
    """Raise ValueError if a layer returned a distribution of another batch shape than its input.

    Args:
        layer: the layer.
        given: the input of the layer.
        event_dim: number of event dimensions of the input.
        result: the distribution that the layer returned.

    Raises:
        ValueError: The batch shapes differ.
    """
    batch = given.shape[: given.dim() - event_dim]
    if result.batch_shape != batch:
        event = tuple(given.shape[given.dim() - event_dim :])
        raise ValueError(
            f"layer {type(layer).__name__} got values of batch shape {tuple(batch)} and event "
            f"shape {event}, but returned a distribution of batch shape "
            f"{tuple(result.batch_shape)} and event shape {tuple(result.event_shape)}. The batch "
            "shapes must be equal. Either event_dim does not fit the layer before it or the prior, "
            "or event dimensions are not declared with .to_event(n)."
        )


def positive_event_dim(event_dim: int) -> int:
    """Return ``event_dim`` if it is between 1 and 64.

    Raises:
        ValueError: ``event_dim`` is outside this range.
    """
    if not 1 <= event_dim <= 64:  # the largest number of dimensions of a tensor
        raise ValueError(f"event_dim must be at least 1 and at most 64, got {event_dim}")
    return event_dim
