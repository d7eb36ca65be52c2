"""Absolute values as layers, in the inference or the generative direction."""

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
    """The map from numbers to their absolute values. The signs are the remainder."""

    def __init__(self, signs: Callable[[Tensor], Tensor] | None, event_dim: int):
        super().__init__()
        self.signs = signs
        self.input_event_dim = self.output_event_dim = positive_event_dim(event_dim)
        self.remainder_event_dim = event_dim

    @property
    def output_support(self) -> Constraint:
        """Nonnegative numbers."""
        return constraints.independent(constraints.nonnegative, self.output_event_dim)

    def split(self, input: Tensor) -> Split:
        """Return the absolute values, and signs: 1 for positive numbers, else 0.

        Raises:
            ValueError: The numbers have an integer dtype.
        """
        if not input.is_floating_point():
            raise ValueError(
                f"{type(self).__name__} needs continuous numbers, got {input.dtype}: put a "
                "dequantization layer below it"
            )
        return Split(input.abs(), (input > 0).to(input.dtype))

    def join(self, output: Tensor, remainder: Tensor) -> Tensor:
        """Multiply the absolute values by their signs."""
        return output * (2 * remainder - 1)

    def remainder(self, output: Tensor) -> TorchDistribution:
        """Return the distribution of the signs."""
        if self.signs is None:
            signs = _FairSigns(logits=torch.zeros_like(output), validate_args=False)
        else:
            logits = self.signs(output)
            if logits.shape != output.shape:
                raise ValueError(
                    "signs must return one logit for each number, of shape "
                    f"{tuple(output.shape)}, got {tuple(logits.shape)}"
                )
            signs = dist.Bernoulli(logits=logits, validate_args=False)
        return signs.to_event(self.remainder_event_dim)

    def input_shape(self, output_shape: torch.Size, remainder_shape: torch.Size) -> torch.Size:
        """Return the shape of the absolute values."""
        return output_shape


@records_init_args
class Absolute(_Magnitude, InferenceSurjection):
    r""":math:`z = |x|`, elementwise; the signs are sampled (Nielsen et al. 2020).

    .. math:: V(x, z) = \sum_d \log p(s_d|z), \qquad s = \operatorname{sign}(x)

    The layer is exact for continuous x. The prior, or the layer above, must have nonnegative
    support. With signs of probability 1/2, the density is symmetric.

    With a network ``signs``, p(x|z) jumps at x = 0, unless the logits are zero at z = 0.
    Reparameterized gradients ignore such jumps. So train a :class:`Stochastic` layer below this one
    with :class:`pyro_vae.objectives.ScoreFunction`.

    Args:
        signs: network from z to the logits of :math:`p(s_d = 1|z)`. By default, each probability
            is 1/2.
        event_dim: number of rightmost dimensions of x that make one data point.

    Raises:
        ValueError: ``event_dim`` is less than one. In a call, the network does not return one
            logit for each number.

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
    r""":math:`x = |z|`, elementwise; the guide samples the signs (Nielsen et al. 2020).

    .. math:: V(x, z) = -\sum_d \log q(s_d|x), \qquad z_d = s_d x_d

    x must be nonnegative. With a network ``signs``, the signs have no reparameterized sample. Train
    such a layer with :class:`pyro_vae.objectives.ELBO` or VIMCO.

    Args:
        signs: network from x to the logits of :math:`q(s_d = 1|x)`. By default, each probability
            is 1/2.
        event_dim: number of rightmost dimensions of x that make one data point.

    Raises:
        ValueError: ``event_dim`` is less than one. In a call, the network does not return one
            logit for each number.
    """

    def __init__(self, signs: Callable[[Tensor], Tensor] | None = None, event_dim: int = 1):
        super().__init__(signs, event_dim)


class _FairSigns(dist.Bernoulli):
    """Fair coins. They have no parameters, so no gradient is lost when they are sampled."""

    has_rsample = True

    def rsample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 - as in torch
        return self.sample(sample_shape)
