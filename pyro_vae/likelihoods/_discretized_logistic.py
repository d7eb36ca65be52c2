"""Logistic likelihoods of gray levels, with one bin per level."""

from __future__ import annotations

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_vae._utils.checks import positive_integer
from pyro_vae._utils.init_args import records_init_args
from pyro_vae._utils.numerics import softplus_scale
from pyro_vae.likelihoods._base import Likelihood
from pyro_vae.likelihoods._levels import OnLevels


@records_init_args
class DiscretizedLogistic(Likelihood):
    r"""Logistic distributions, discretized to L levels (Kingma et al. 2016; Salimans et al. 2017).

    .. math::
        p(x|z) = \prod_d \sigma\Bigl(\frac{x_d + w/2 - \mu_d}{s_d}\Bigr)
            - \sigma\Bigl(\frac{x_d - w/2 - \mu_d}{s_d}\Bigr), \qquad w = \frac1{L - 1}

    for x in :math:`\{0, w, 2w, \ldots, 1\}`, or for integer x, the numbers of the levels from zero.
    The outermost bins extend to infinity, so the probabilities sum to one.

    The decoder returns a block m, then a block t. The mean is :math:`\mu = (1 + m) / 2`, so m = 0
    is the middle of the range. The scale is :math:`s = \mathrm{softplus}(t + c) / 2`. The constant
    c is such that t = 0 corresponds to s = 1/2.

    ``mean`` is exact and takes L - 1 passes over the numbers of x.

    Args:
        decoder: network from z, and any covariates, to twice as many numbers as x has.
        levels: L.
        event_dim: number of rightmost dimensions of x that form one data point.

    Raises:
        ValueError: ``event_dim`` is less than one, or ``levels`` less than two.
        TypeError: ``levels`` is not an integer.

    Example:
        >>> import torch, pyro_vae as pv
        >>> likelihood = pv.likelihoods.DiscretizedLogistic(pv.nets.MLP(2, [8], 2 * 5), levels=256)
        >>> p = likelihood(torch.zeros(100, 2))
        >>> p.log_prob(p.sample()).shape
        torch.Size([100])
    """

    def __init__(self, decoder: nn.Module, levels: int = 256, event_dim: int = 1):
        super().__init__(decoder, event_dim)
        self.levels = positive_integer("levels", levels, minimum=2)

    def forward(self, *inputs: Tensor) -> TorchDistributionMixin:
        """Return p(x|z), of batch shape (...), for z of shape ``(..., *latent event)``."""
        loc, raw_scale = self.outputs(2, *inputs).unsqueeze(-1)
        return _of_numbers(torch.zeros_like(loc), loc, raw_scale, self)


@records_init_args
class DiscretizedLogisticMixture(Likelihood):
    r"""Mixtures of discretized logistics, one for each number of x (Salimans et al. 2017).

    .. math:: p(x|z) = \prod_d \sum_c \pi_{dc} \, p_{dc}(x_d)

    with :math:`p_{dc}` as in :class:`DiscretizedLogistic`. Given z, all numbers of x are
    independent, including the channels of a color image.

    Args:
        decoder: network from z, and any covariates, to 3 C numbers for each number of x. These are
            C logits of the weights, then C numbers for the means, then C for the scales.
        levels: L.
        components: C.
        event_dim: number of rightmost dimensions of x that form one data point.

    Raises:
        ValueError: ``event_dim`` or ``components`` is less than one, or ``levels`` less than two.
        TypeError: ``levels`` or ``components`` is not an integer.

    Example:
        >>> import torch, pyro_vae as pv
        >>> decoder = pv.nets.MLP(2, [8], 3 * 4 * 5)
        >>> likelihood = pv.likelihoods.DiscretizedLogisticMixture(decoder, components=4)
        >>> likelihood(torch.zeros(100, 2)).event_shape
        torch.Size([5])
    """

    def __init__(
        self, decoder: nn.Module, levels: int = 256, components: int = 5, event_dim: int = 1
    ):
        super().__init__(decoder, event_dim)
        self.levels = positive_integer("levels", levels, minimum=2)
        self.components = positive_integer("components", components)

    def forward(self, *inputs: Tensor) -> TorchDistributionMixin:
        """Return p(x|z), of batch shape (...), for z of shape ``(..., *latent event)``."""
        numbers = self.outputs(3 * self.components, *inputs).movedim(0, -1)
        return _of_numbers(*numbers.split(self.components, -1), self)


def _of_numbers(
    logits: Tensor,
    loc: Tensor,
    raw_scale: Tensor,
    likelihood: DiscretizedLogistic | DiscretizedLogisticMixture,
) -> TorchDistributionMixin:
    mixture = _Logistics(
        logits, 0.5 * (1 + loc), 0.5 * softplus_scale(raw_scale), likelihood.levels
    )
    return mixture.to_event(likelihood.event_dim)


class _Logistics(OnLevels):
    """A mixture of C logistics over L levels, with logits, loc and scale of ``(*batch, C)``."""

    arg_constraints = {  # noqa: RUF012 - as torch declares them
        "logits": constraints.real_vector,
        "loc": constraints.independent(constraints.real, 1),
        "scale": constraints.independent(constraints.positive, 1),
    }

    def __init__(
        self,
        logits: Tensor,
        loc: Tensor,
        scale: Tensor,
        levels: int,
        validate_args: bool | None = None,
    ):
        self.logits, self.loc, self.scale = logits, loc, scale
        super().__init__(levels, loc.shape[:-1], validate_args)

    def expand(self, batch_shape, _instance=None) -> _Logistics:
        arguments = (t.expand(*batch_shape, -1) for t in (self.logits, self.loc, self.scale))
        return _Logistics(*arguments, self.levels, validate_args=self._validate_args)

    @property
    def mean(self) -> Tensor:
        r"""The mean :math:`\frac1{L-1} \sum_{j=1}^{L-1} P(x \ge j / (L - 1))`, ``batch_shape``."""
        loc, scale = self._in_levels()
        reached = sum(((loc - (level - 0.5)) / scale).sigmoid() for level in range(1, self.levels))
        return (self.logits.softmax(-1) * reached).sum(-1) / (self.levels - 1)

    def log_prob_of_level(self, level: Tensor) -> Tensor:
        loc, scale = self._in_levels()
        log_probs = _log_bin(level.to(loc.dtype).unsqueeze(-1), loc, scale, self.levels)
        if self.loc.shape[-1] == 1:
            return log_probs.squeeze(-1)
        return (self.logits.log_softmax(-1) + log_probs).logsumexp(-1)

    def sample_level(self, sample_shape: torch.Size) -> Tensor:
        component = torch.distributions.Categorical(logits=self.logits).sample(sample_shape)
        index = component.unsqueeze(-1)
        loc, scale = (
            t.expand(*component.shape, -1).gather(-1, index).squeeze(-1) for t in self._in_levels()
        )
        drawn = loc + scale * torch.rand_like(loc).logit()
        return drawn.clamp(0, self.levels - 1).round()

    def _in_levels(self) -> tuple[Tensor, Tensor]:
        """Return location and scale in units of the distance between two levels."""
        return self.loc * (self.levels - 1), self.scale * (self.levels - 1)


def _log_bin(level: Tensor, loc: Tensor, scale: Tensor, levels: int) -> Tensor:
    r"""Return the logarithm of :math:`\sigma(a) - \sigma(b)`, the probability of a level's bin.

    Compute it as the product :math:`(1 - e^{b - a}) \, \sigma(a) \, \sigma(-b)`. Both are equal to
    :math:`(e^a - e^b) / ((1 + e^a) (1 + e^b))`. Nothing cancels, because a - b is the bin's width,
    which is known without a and b.
    """
    below = F.logsigmoid((level + 0.5 - loc) / scale)
    above = F.logsigmoid((loc - level + 0.5) / scale)
    inside = torch.log(-torch.expm1(-1 / scale)) + below + above
    outside = torch.where(level > levels - 1.5, above, inside)
    return torch.where(level < 0.5, below, outside)
