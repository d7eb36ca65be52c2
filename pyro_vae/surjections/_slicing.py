"""Layers that drop numbers on the way up, or add some."""

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
    """The map from a vector to its first numbers; the others are noise."""

    def __init__(self, size: int, noise: Callable[..., TorchDistribution], conditional: bool):
        super().__init__()
        self.size = positive_integer("size", size)
        self.noise = noise
        self.conditional = conditional

    def split(self, input: Tensor) -> Split:
        """Cut a vector in two."""
        return Split(input[..., : self.size], input[..., self.size :])

    def join(self, output: Tensor, remainder: Tensor) -> Tensor:
        """Concatenate the two."""
        return torch.cat([output, remainder], -1)

    def remainder(self, output: Tensor) -> TorchDistribution:
        """Return the distribution of the other numbers."""
        if output.shape[-1] != self.size:
            raise ValueError(
                f"{type(self).__name__} takes {self.size} numbers here, got a value of shape "
                f"{tuple(output.shape)}: pass size={output.shape[-1]}, or change what is before it"
            )
        return self.noise(output) if self.conditional else self.noise()

    def input_shape(self, output_shape: torch.Size, remainder_shape: torch.Size) -> torch.Size:
        """Return the length of both together."""
        return torch.Size([output_shape[-1] + remainder_shape[-1]])


@records_init_args
class Slice(_FirstNumbers, InferenceSurjection):
    r"""z is the first numbers of x; those left out are noise (Nielsen et al. 2020).

    .. math:: x = (x_1, x_2), \qquad z = x_1, \qquad V(x, z) = \log p(x_2|z)

    It is exact. Between the bijections of a flow it makes a multi-scale architecture (Dinh et al.
    2017).

    Args:
        size: how many numbers z has.
        noise: gives :math:`p(x_2)` or :math:`p(x_2|z)`, a distribution of vectors.
        conditional: whether the noise is called on z, as a likelihood; if not, without arguments,
            as a prior.

    Raises:
        ValueError: ``size`` is not positive; at a call: z has another size, or the noise is no
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
    r"""z is x and some numbers more, which the layers above may use (Huang et al. 2020).

    .. math:: z = (x, e), \qquad e \sim q(e|x), \qquad V(x, z) = -\log q(e|x)

    Args:
        size: how many numbers x has.
        noise: gives :math:`q(e|x)` or :math:`q(e)`, a distribution of vectors.
        conditional: whether the noise is called on x; if not, without arguments.

    Raises:
        ValueError: ``size`` is not positive; at a call: x has another size, or the noise is no
            distribution of vectors.
    """

    def __init__(
        self, size: int, noise: Callable[..., TorchDistribution], conditional: bool = True
    ):
        super().__init__(size, noise, conditional)
