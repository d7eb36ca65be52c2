"""What a layer is: a generative and an inference direction; and layers made of a map."""

from __future__ import annotations

from abc import abstractmethod

import torch
from pyro.distributions.torch_distribution import TorchDistribution, TorchDistributionMixin
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from pyro_vae._programs.sites import is_real
from pyro_vae.surjections._images import Image, Preimage, Split


class SurVAELayer(nn.Module):
    r"""One layer of a :class:`FlowModel`: p(x|z), and q(z|x) (Nielsen et al. 2020).

    A datum passes the layers upwards by ``infer`` and is generated downwards by ``generate``. What
    a layer adds to the log-likelihood is

    .. math:: V(x, z) = \log p(x|z) - \log q(z|x)

    An autoencoder, a bijection and a surjection differ in nothing else. A subclass gives both
    distributions; one that is made of a map derives from :class:`InferenceSurjection` or
    :class:`GenerativeSurjection`.
    """

    @abstractmethod
    def generate(self, z: Tensor) -> TorchDistributionMixin:
        """Return p(x|z) for z ``(*batch, *latent event)``: batch shape ``batch``."""

    @abstractmethod
    def infer(self, x: Tensor) -> TorchDistributionMixin:
        """Return q(z|x) for x ``(*batch, *event)``: batch shape ``batch``."""


class Surjection(SurVAELayer):
    r"""A layer made of a map from an input to an output, with less information as a rule.

    The remainder is all that the output leaves out: the pair (output, remainder) determines the
    input, and the input determines the pair. The layer has a distribution of the remainder given
    the output.

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
    input_support: Constraint = constraints.real
    output_support: Constraint = constraints.real

    @abstractmethod
    def split(self, input: Tensor) -> Split:
        """Return the output, the remainder and the log-volume of an input."""

    @abstractmethod
    def join(self, output: Tensor, remainder: Tensor | None) -> Tensor:
        """Return the input with this output and remainder."""

    @abstractmethod
    def remainder(self, output: Tensor) -> TorchDistribution | None:
        """Return the distribution of the remainder given the output; None for a bijection."""

    @abstractmethod
    def input_shape(self, output_shape: torch.Size, remainder_shape: torch.Size) -> torch.Size:
        """Return the event shape of the input, given those of output and remainder."""

    def log_volume(self, remainder: Tensor) -> Tensor | float:
        """Return the log-volume of a split with this remainder."""
        return 0.0

    def same(self, value: Tensor, output: Tensor) -> Tensor:
        """Return whether two outputs are equal up to rounding, ``(*batch)``."""
        eps = max(torch.finfo(t.dtype).eps for t in (value, output) if t.dtype.is_floating_point)
        near = (value - output).abs() <= eps**0.5 * (1 + output.abs())
        return all_of_event(near, self.output_event_dim)


class InferenceSurjection(Surjection):
    r"""The map leads from data to latent: z is the image of x, and x is drawn from what maps to z.

    .. math:: V(x, z) = \log p(r|z) + \log|\det \partial(z, r) / \partial x|, \qquad x = (z, r)

    It is exact: with such layers alone the ELBO is log p(x).
    """

    def infer(self, x: Tensor) -> Image:
        """Return q(z|x), the image of x."""
        return Image(self, x)

    def generate(self, z: Tensor) -> Preimage:
        """Return p(x|z)."""
        return Preimage(self, z)


class GenerativeSurjection(Surjection):
    r"""The map leads from latent to data: x is the image of z, and z is drawn from what maps to x.

    .. math:: V(x, z) = -\log q(r|x) - \log|\det \partial(x, r) / \partial z|, \qquad z = (x, r)

    The ELBO is a bound: q is the posterior's only if it fits.
    """

    def infer(self, x: Tensor) -> Preimage:
        """Return q(z|x)."""
        return Preimage(self, x)

    def generate(self, z: Tensor) -> Image:
        """Return p(x|z), the image of z."""
        return Image(self, z)


def check_support(layer: nn.Module, above: TorchDistribution) -> None:
    """Refuse a prior, or a layer above, that draws what no datum is mapped to.

    Raises:
        ValueError: it is of all numbers, and the layer maps to some of them.
    """
    if not isinstance(layer, InferenceSurjection):
        return
    if not is_real(layer.output_support) and is_real(above.support):
        raise ValueError(
            f"layer {type(layer).__name__} maps data to {layer.output_support}, but the prior, or "
            "the layer above, is of all real numbers: part of its mass would belong to no datum. "
            "Take a prior with that support; or turn the transform round, if it was meant to map "
            "the other way (transform.inv)"
        )


def all_of_event(flags: Tensor, event_dim: int) -> Tensor:
    """Tell whether all flags of an event are set, ``(*batch)``."""
    return flags.flatten(flags.dim() - event_dim).all(-1) if event_dim else flags


def sum_of_event(values: Tensor, event_dim: int) -> Tensor:
    """Sum values over an event, ``(*batch)``."""
    return values.flatten(values.dim() - event_dim).sum(-1) if event_dim else values


def check_batch(layer: nn.Module, given: Tensor, event_dim: int, result: TorchDistribution) -> None:
    """Refuse a distribution that reads the event of what it was given otherwise than it is.

    Args:
        layer: that made it.
        given: what it was made from.
        event_dim: event dimensions of that.
        result: the distribution.

    Raises:
        ValueError: its batch shape is not that of what it was given.
    """
    batch = given.shape[: given.dim() - event_dim]
    if result.batch_shape != batch:
        event = tuple(given.shape[given.dim() - event_dim :])
        raise ValueError(
            f"layer {type(layer).__name__} was given values of batch shape {tuple(batch)} and "
            f"event shape {event}, and made of them a distribution of batch shape "
            f"{tuple(result.batch_shape)} and event shape {tuple(result.event_shape)}. The batch "
            "shapes must be the same: its event_dim does not fit that of the layer before it, or "
            "of the prior, or dimensions are not declared with .to_event(n)."
        )


def positive_event_dim(event_dim: int) -> int:
    """Return a number of event dimensions of at least one, and no more than tensors have.

    Raises:
        ValueError: it is less, or more.
    """
    if not 1 <= event_dim <= 64:  # torch has no tensors of more dimensions
        raise ValueError(f"event_dim must be at least 1 and at most 64, got {event_dim}")
    return event_dim
