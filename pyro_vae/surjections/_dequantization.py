"""Dequantization: discrete levels as cells of a continuous space."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import SigmoidTransform

from pyro_vae._utils.checks import positive_integer
from pyro_vae._utils.init_args import records_init_args
from pyro_vae.surjections._images import Split
from pyro_vae.surjections._surjection import (
    GenerativeSurjection,
    all_of_event,
    positive_event_dim,
)


@records_init_args
class UniformDequantization(GenerativeSurjection):
    r"""Dequantize x of L levels: z is uniform in the cell of [0, 1) that belongs to the level.

    Let k be the level numbers of x. Then :math:`z = (k + u) / L` with :math:`u \sim U(0, 1)^D`, and
    :math:`P(x|z) = 1` where :math:`k = \lfloor L z \rfloor`. So :math:`q(z|x) = q(u|x) L^D`, and

    .. math:: V(x, z) = \log P(x|z) - \log q(z|x) = -\log q(u|x) - D \log L

    with :math:`\log q(u|x) = 0` here. The probability of x is the prior's mass in its cell. So the
    ELBO in nats, divided by :math:`-D \log 2`, is at least the bits per dimension. A prior's mass
    outside the cube belongs to the nearest level, but the guide never samples there. So put a
    ``Bijection(SigmoidTransform().inv)`` above this layer.

    Args:
        levels: L, at least 2.
        event_dim: number of rightmost dimensions of x that make one data point.

    Shape:
        x and z are ``(*batch, *event)``. x has the values 0, 1/(L-1), ..., 1. With an integer
        dtype, x has the values 0, ..., L-1. Generated values are of the first kind.

    Raises:
        ValueError: ``levels`` is less than two, or ``event_dim`` less than one.

    Example:
        >>> import torch, pyro_vae as pv
        >>> layer = pv.surjections.UniformDequantization(levels=256)
        >>> x = torch.tensor([[0.0, 7 / 255, 1.0]])
        >>> z = layer.infer(x).sample()
        >>> torch.allclose(layer.generate(z).sample(), x)
        True
        >>> layer.infer(x).log_prob(z) / 3  # 256 times as dense as in [0, 1)
        tensor([5.5452])
    """

    def __init__(self, levels: int, event_dim: int = 1):
        super().__init__()
        self.levels = positive_integer("levels", levels, minimum=2)
        self.input_event_dim = self.output_event_dim = positive_event_dim(event_dim)
        self.remainder_event_dim = event_dim

    @property
    def output_support(self) -> Constraint:
        """The grid."""
        return constraints.independent(_Grid(self), self.output_event_dim)

    def split(self, input: Tensor) -> Split:
        """Return x and u, given z."""
        scaled = self.levels * input
        number = scaled.floor().clamp(0, self.levels - 1)
        u = scaled - number
        inside = all_of_event((u >= 0) & (u <= 1), self.remainder_event_dim)
        log_volume = torch.where(inside, self.log_volume(u), input.new_full((), -torch.inf))
        return Split(number / (self.levels - 1), u, log_volume)

    def join(self, output: Tensor, remainder: Tensor) -> Tensor:
        """Return z, given x and u."""
        # Rounding must not move z out of its cell.
        least = 2 * self.levels * torch.finfo(remainder.dtype).eps
        u = remainder.clamp(least, 1 - least)
        return (self.numbers(output).to(u.dtype) + u) / self.levels

    def remainder(self, output: Tensor) -> TorchDistribution:
        """Return q(u|x)."""
        zeros = torch.zeros_like(self.on_grid(output))
        return dist.Uniform(zeros, 1.0, validate_args=False).to_event(self.remainder_event_dim)

    def input_shape(self, output_shape: torch.Size, remainder_shape: torch.Size) -> torch.Size:
        """Return the shape of x."""
        return output_shape

    def log_volume(self, remainder: Tensor) -> float:
        """Return D log L."""
        event = remainder.shape[remainder.dim() - self.remainder_event_dim :]
        return event.numel() * math.log(self.levels)

    def same(self, value: Tensor, output: Tensor) -> Tensor:
        """Return whether two x are on the grid and have the same levels, ``(*batch)``."""
        same = self.numbers(value) == self.numbers(output)
        return all_of_event(
            same & self.is_level(value) & self.is_level(output), self.output_event_dim
        )

    def numbers(self, x: Tensor) -> Tensor:
        """Return the level numbers of x, with a floating dtype."""
        return (self.on_grid(x) * (self.levels - 1)).round()

    def on_grid(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return x in [0, 1]. An integer x holds level numbers, and gets ``dtype``."""
        if x.dtype.is_floating_point:
            return x
        return x.to(dtype or torch.get_default_dtype()) / (self.levels - 1)

    def is_level(self, x: Tensor) -> Tensor:
        """Return whether each number of x is on the grid, up to the rounding of float32."""
        number = self.numbers(x)
        eps = max(torch.finfo(each).eps for each in (torch.float32, number.dtype))
        near = (self.on_grid(x) * (self.levels - 1) - number).abs() <= 4 * eps * (1 + number)
        return near & (number >= 0) & (number < self.levels)


@records_init_args
class VariationalDequantization(UniformDequantization):
    r"""Dequantization with learned noise (Ho et al. 2019).

    Like :class:`UniformDequantization`, but with :math:`u = \sigma(v)` for :math:`v \sim q(v|x)`:

    .. math::
        V(x, z) = -\log q(u|x) - D \log L, \qquad
        \log q(u|x) = \log q(v|x) - \sum_d \log \sigma'(v_d)

    Args:
        levels: L, at least 2.
        noise: function from x in [0, 1] to q(v|x), such as a Gaussian or a flow on the reals. Its
            event shape is that of x.
        event_dim: number of rightmost dimensions of x that make one data point.

    Raises:
        ValueError: ``levels`` is less than two, or ``event_dim`` less than one. In a call, the
            event or batch shape of the noise differs from that of x.
    """

    def __init__(
        self, levels: int, noise: Callable[[Tensor], TorchDistribution], event_dim: int = 1
    ):
        super().__init__(levels, event_dim)
        self.noise = noise

    def remainder(self, output: Tensor) -> TorchDistribution:
        """Return q(u|x)."""
        x = self.on_grid(output)
        noise = self.noise(x)
        event = x.shape[x.dim() - self.output_event_dim :]
        if noise.event_shape != event:
            raise ValueError(
                f"the noise must have the event shape of x, {tuple(event)}, got "
                f"{tuple(noise.event_shape)} with batch shape {tuple(noise.batch_shape)}: declare "
                f"its dimensions with .to_event({self.output_event_dim})"
            )
        # The cache returns the same tensor v, which a flow may need to score its sample.
        squashed = SigmoidTransform(cache_size=1)
        return dist.TransformedDistribution(noise, squashed, validate_args=False)


class _Grid(Constraint):
    """The values that a dequantization layer accepts."""

    def __init__(self, layer: UniformDequantization):
        self._layer = layer
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        return self._layer.is_level(value)

    def __repr__(self) -> str:
        levels = self._layer.levels
        return f"Grid({levels} levels from 0 to 1, or level numbers from 0 to {levels - 1})"
