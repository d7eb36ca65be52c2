"""Layers that remove dimensions from the data, or add some."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from pyro_vae._utils.checks import positive_integer
from pyro_vae._utils.init_args import records_init_args
from pyro_vae.surjections._images import Split
from pyro_vae.surjections._surjection import GenerativeSurjection, InferenceSurjection, Surjection


class _FirstNumbers(Surjection):
    """The map from a vector to its first numbers. The other numbers are noise."""

    def __init__(self, size: int, noise: Callable[..., TorchDistribution], conditional: bool):
        super().__init__()
        self.size = positive_integer("size", size)
        self.noise = noise
        self.conditional = conditional

    def split(self, input: Tensor) -> Split:
        """Split a vector in two."""
        return Split(input[..., : self.size], input[..., self.size :])

    def join(self, output: Tensor, remainder: Tensor) -> Tensor:
        """Concatenate the two parts."""
        return torch.cat([output, remainder], -1)

    def remainder(self, output: Tensor) -> TorchDistribution:
        """Return the distribution of the other numbers."""
        if output.shape[-1] != self.size:
            raise ValueError(
                f"{type(self).__name__} takes {self.size} numbers here, got a value of shape "
                f"{tuple(output.shape)}: pass size={output.shape[-1]}, or change the previous "
                "layer"
            )
        return self.noise(output) if self.conditional else self.noise()

    def input_shape(self, output_shape: torch.Size, remainder_shape: torch.Size) -> torch.Size:
        """Return the total length of both parts."""
        return torch.Size([output_shape[-1] + remainder_shape[-1]])


@records_init_args
class Slice(_FirstNumbers, InferenceSurjection):
    r"""z is the first numbers of x. The others are noise (Nielsen et al. 2020).

    .. math:: x = (x_1, x_2), \qquad z = x_1, \qquad V(x, z) = \log p(x_2|z)

    The layer is exact. Between the bijections of a flow, it makes a multi-scale architecture (Dinh
    et al. 2017).

    Args:
        size: the number of dimensions of z.
        noise: function that returns :math:`p(x_2)` or :math:`p(x_2|z)`, a distribution of vectors.
        conditional: whether the noise is called on z, like a likelihood, or without arguments, like
            a prior.

    Raises:
        ValueError: ``size`` is not positive. In a call, z has another size, or the noise is not a
            distribution of vectors.

    Example:
        >>> import torch, pyro_vae as pv
        >>> layer = pv.surjections.Slice(2, noise=pv.priors.StandardNormal(3))
        >>> x = torch.randn(7, 5)
        >>> z = layer.infer(x).sample()
        >>> z.shape, layer.generate(z).log_prob(x).shape
        (torch.Size([7, 2]), torch.Size([7]))
    """

    def __init__(
        self, size: int, noise: Callable[..., TorchDistribution], conditional: bool = False
    ):
        super().__init__(size, noise, conditional)


@records_init_args
class Augment(_FirstNumbers, GenerativeSurjection):
    r"""z is x with extra dimensions, which the layers above may use (Huang et al. 2020).

    .. math:: z = (x, e), \qquad e \sim q(e|x), \qquad V(x, z) = -\log q(e|x)

    Args:
        size: the number of dimensions of x.
        noise: function that returns :math:`q(e|x)` or :math:`q(e)`, a distribution of vectors.
        conditional: whether the noise is called on x, or without arguments.

    Raises:
        ValueError: ``size`` is not positive. In a call, x has another size, or the noise is not a
            distribution of vectors.
    """

    def __init__(
        self, size: int, noise: Callable[..., TorchDistribution], conditional: bool = True
    ):
        super().__init__(size, noise, conditional)
