"""The maximum of several numbers as a layer."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_vae._programs.sites import is_real
from pyro_vae._utils.init_args import records_init_args
from pyro_vae.surjections._images import Split
from pyro_vae.surjections._surjection import InferenceSurjection


@records_init_args
class Maximum(InferenceSurjection):
    r""":math:`z = \max_d x_d`; its index and the gaps to the other numbers are sampled.

    .. math::
        V(x, z) = -\log D + \log p(g|z), \qquad g_d = z - x_d \text{ for the others, in their order}

    (Nielsen et al. 2020). The layer is exact, because the map from x to z, the index and g
    preserves volume.

    If the gaps are not identically distributed, p(x|z) jumps where another number becomes the
    maximum. Reparameterized gradients ignore such jumps. So train a :class:`Stochastic` layer below
    this one with :class:`pyro_vae.objectives.ScoreFunction`.

    Args:
        noise: function that returns :math:`p(g)` or :math:`p(g|z)`, a distribution of vectors of
            D - 1 positive numbers.
        conditional: whether the noise is called on z, like a likelihood, or without arguments, like
            a prior.

    Shape:
        x is ``(*batch, D)`` and z ``(*batch, 1)``.

    Raises:
        ValueError: In a call, the noise is not a distribution of vectors, it may be negative, or z
            is not one number.

    Example:
        >>> import torch, pyro_vae as pv
        >>> import pyro.distributions as dist
        >>> layer = pv.surjections.Maximum(lambda: dist.Exponential(torch.ones(3)).to_event(1))
        >>> x = torch.randn(5, 4)
        >>> z = layer.infer(x).sample()
        >>> z.shape, layer.generate(z).sample().shape
        (torch.Size([5, 1]), torch.Size([5, 4]))
    """

    def __init__(self, noise: Callable[..., TorchDistribution], conditional: bool = False):
        super().__init__()
        self.noise = noise
        self.conditional = conditional

    def split(self, input: Tensor) -> Split:
        """Return the maximum, and its index with the gaps below it."""
        z, place = input.max(-1, keepdim=True)
        gaps = z - input.gather(-1, _others(place, input.shape[-1]))
        return Split(z, torch.cat([place.to(gaps.dtype), gaps], -1))

    def join(self, output: Tensor, remainder: Tensor) -> Tensor:
        """Return x, given the maximum, its index and the gaps."""
        place, gaps = remainder[..., :1].long(), remainder[..., 1:]
        greatest = output.expand(remainder.shape)
        return greatest.scatter(-1, _others(place, remainder.shape[-1]), output - gaps)

    def remainder(self, output: Tensor) -> TorchDistribution:
        """Return the distribution of the index and the gaps."""
        if output.shape[-1] != 1:
            raise ValueError(
                f"Maximum takes one number z, got a value of shape {tuple(output.shape)}: the "
                "prior, or the layer above, must have events of shape (1,)"
            )
        gaps = self.noise(output) if self.conditional else self.noise()
        if len(gaps.event_shape) != 1:
            return gaps  # Preimage raises an error
        if is_real(gaps.support):
            raise ValueError(
                f"Maximum needs a noise of positive numbers, the gaps below z, got {gaps} on the "
                "reals: use a distribution such as Exponential, HalfNormal or LogNormal"
            )
        return _PlaceAndGaps(gaps)

    def input_shape(self, output_shape: torch.Size, remainder_shape: torch.Size) -> torch.Size:
        """Return the event shape of the index and the gaps."""
        return remainder_shape


class _PlaceAndGaps(TorchDistribution):
    """A uniform index among D, followed by D - 1 gaps, in one vector."""

    arg_constraints = {}  # noqa: RUF012 - as torch declares them
    support = constraints.real_vector

    def __init__(self, gaps: TorchDistribution):
        self._gaps = gaps
        event_shape = torch.Size([gaps.event_shape[0] + 1])
        super().__init__(gaps.batch_shape, event_shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override] # a class attribute of torch
        return self._gaps.has_rsample  # the index depends on no parameter

    def expand(self, batch_shape, _instance=None) -> _PlaceAndGaps:
        return _PlaceAndGaps(self._gaps.expand(torch.Size(batch_shape)))

    def rsample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 - as in torch
        return self._with_place(self._gaps.rsample(sample_shape))

    def sample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 - as in torch
        return self._with_place(self._gaps.sample(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return self._gaps.log_prob(value[..., 1:]) - math.log(self.event_shape[0])

    def _with_place(self, gaps: Tensor) -> Tensor:
        shape = (*gaps.shape[:-1], 1)
        place = torch.randint(self.event_shape[0], shape, device=gaps.device)
        return torch.cat([place.to(gaps.dtype), gaps], -1)


def _others(place: Tensor, count: int) -> Tensor:
    """Return all indices but one, in order, ``(..., count - 1)``."""
    places = torch.arange(count - 1, device=place.device)
    return places + (places >= place)
