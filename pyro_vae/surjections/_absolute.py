"""Absolute values, as a way up or as a way down."""

from __future__ import annotations

from collections.abc import Callable

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from pyro_vae._utils.init_args import records_init_args
from pyro_vae.surjections._images import Split
from pyro_vae.surjections._surjection import (
    GenerativeSurjection,
    InferenceSurjection,
    Surjection,
    positive_event_dim,
)


class _Magnitude(Surjection):
    """The map from numbers to their absolute values; the signs are the remainder."""

    def __init__(self, signs: Callable[[Tensor], Tensor] | None, event_dim: int):
        super().__init__()
        self.signs = signs
        self.input_event_dim = self.output_event_dim = positive_event_dim(event_dim)
        self.remainder_event_dim = event_dim

    @property
    def output_support(self) -> Constraint:
        """Numbers of at least zero."""
        return constraints.independent(constraints.nonnegative, self.output_event_dim)

    def split(self, input: Tensor) -> Split:
        """Return absolute values, and one where a number is positive.

        Raises:
            ValueError: the numbers are of an integer type.
        """
        if not input.is_floating_point():
            raise ValueError(
                f"{type(self).__name__} takes continuous numbers, got {input.dtype}: put a "
                "dequantisation below it"
            )
        return Split(input.abs(), (input > 0).to(input.dtype))

    def join(self, output: Tensor, remainder: Tensor) -> Tensor:
        """Give absolute values their signs."""
        return output * (2 * remainder - 1)

    def remainder(self, output: Tensor) -> TorchDistribution:
        """Return the distribution of the signs."""
        if self.signs is None:
            signs = _FairSigns(logits=torch.zeros_like(output), validate_args=False)
        else:
            logits = self.signs(output)
            if logits.shape != output.shape:
                raise ValueError(
                    f"signs must give one logit for each of the numbers {tuple(output.shape)}, got "
                    f"{tuple(logits.shape)}"
                )
            signs = dist.Bernoulli(logits=logits, validate_args=False)
        return signs.to_event(self.remainder_event_dim)

    def input_shape(self, output_shape: torch.Size, remainder_shape: torch.Size) -> torch.Size:
        """Return the shape of the absolute values."""
        return output_shape


@records_init_args
class Absolute(_Magnitude, InferenceSurjection):
    r""":math:`z = |x|`, number by number; the signs are drawn (Nielsen et al. 2020).

    .. math:: V(x, z) = \sum_d \log p(s_d|z), \qquad s = \operatorname{sign}(x)

    It is exact, for continuous x. The prior, or the layer above, must be of numbers of at least
    zero. With signs of probability 1/2 it makes a symmetric density.

    Where a network gives the signs, p(x|z) jumps at x = 0, unless its logits vanish at z = 0. Below
    such a layer a :class:`Stochastic` one is not to be trained with reparameterised gradients,
    which do not see jumps: take :class:`pyro_vae.objectives.ScoreFunction`.

    Args:
        signs: network from z to the logits of :math:`p(s_d = 1|z)`; 1/2 each, if not given.
        event_dim: how many of the rightmost dimensions of x make one datum.

    Raises:
        ValueError: ``event_dim`` is less than one; at a call: the network does not give a logit for
            each number.

    Example:
        >>> import torch, pyro_vae as pv
        >>> layer = pv.surjections.Absolute()
        >>> x = torch.randn(5, 3)
        >>> z = layer.infer(x).sample()
        >>> layer.generate(z).log_prob(x)[0]  # 3 log 1/2
        tensor(-2.0794)
    """

    def __init__(self, signs: Callable[[Tensor], Tensor] | None = None, event_dim: int = 1):
        super().__init__(signs, event_dim)


@records_init_args
class GenerativeAbsolute(_Magnitude, GenerativeSurjection):
    r""":math:`x = |z|`, number by number; the guide draws the signs (Nielsen et al. 2020).

    .. math:: V(x, z) = -\sum_d \log q(s_d|x), \qquad z_d = s_d x_d

    For x of at least zero. Where a network gives the signs, they have no reparameterised sample:
    train with :class:`pyro_vae.objectives.ELBO`, or VIMCO.

    Args:
        signs: network from x to the logits of :math:`q(s_d = 1|x)`; 1/2 each, if not given.
        event_dim: how many of the rightmost dimensions of x make one datum.

    Raises:
        ValueError: ``event_dim`` is less than one; at a call: the network does not give a logit for
            each number.
    """

    def __init__(self, signs: Callable[[Tensor], Tensor] | None = None, event_dim: int = 1):
        super().__init__(signs, event_dim)


class _FairSigns(dist.Bernoulli):
    """Coins of no parameters: there is no gradient to them that a draw could lose."""

    has_rsample = True

    def rsample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 - as torch has it
        return self.sample(sample_shape)
