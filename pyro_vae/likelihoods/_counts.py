"""Counts: Poisson and negative binomial likelihoods."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyro_vae._utils.init_args import records_init_args
from pyro_vae._utils.numerics import softplus, softplus_scale, split_at
from pyro_vae.distributions._casting import value_for
from pyro_vae.likelihoods._base import Likelihood
from pyro_vae.likelihoods._scales import Scale, SharedScale, as_scale


@records_init_args
class Poisson(Likelihood):
    r""":math:`p(x|z) = \prod_d \mathrm{Poisson}(x_d; \lambda_d(z))` for x in {0, 1, 2, ...}.

    A rate is a softplus of the decoder's output, shifted so that an output of zero is a rate of
    one.

    Args:
        decoder: network from z, and any covariates, to the unconstrained rates of x.
        event_dim: number of rightmost dimensions of x that form one data point.

    Raises:
        ValueError: ``event_dim`` is less than one.

    Example:
        >>> import torch, pyro_vae as pv
        >>> likelihood = pv.likelihoods.Poisson(pv.nets.MLP(2, [8], 5))
        >>> likelihood(torch.zeros(100, 2)).log_prob(torch.ones(100, 5)).shape
        torch.Size([100])
    """

    def forward(self, *inputs: Tensor) -> TorchDistributionMixin:
        """Return p(x|z), of batch shape (...), for z of shape ``(..., *latent event)``."""
        (raw,) = self.outputs(1, *inputs)
        return _Poisson(softplus_scale(raw)).to_event(self.event_dim)


@records_init_args
class NegativeBinomial(Likelihood):
    r"""Negative binomial distributions of counts x, parameterized by mean and dispersion.

    .. math::
        p(x|z) = \prod_d \frac{\Gamma(x_d + r_d)}{\Gamma(r_d) \, x_d!}
            \Bigl(\frac{r_d}{r_d + \mu_d}\Bigr)^{r_d}
            \Bigl(\frac{\mu_d}{r_d + \mu_d}\Bigr)^{x_d}, \qquad r_d = 1 / \alpha_d

    The mean is :math:`\mu` and the variance is :math:`\mu + \alpha \mu^2`. This is a Poisson
    distribution whose rate has a Gamma distribution. As the dispersion :math:`\alpha` goes to zero,
    it becomes Poisson.

    Args:
        decoder: network from z, and any covariates, to the unconstrained means. Their softplus,
            shifted so that zero becomes one, is the mean. With :class:`ScaleFromDecoder`, the
            unconstrained dispersions follow as a second block.
        dispersion: :math:`\alpha`, a positive number, a :class:`SharedScale`, a
            :class:`ScalePerOutput` or a :class:`ScaleFromDecoder`. The default is
            ``SharedScale()``.
        event_dim: number of rightmost dimensions of x that form one data point.

    Raises:
        ValueError: ``event_dim`` is less than one, or the dispersion is not positive and finite.
        TypeError: The dispersion is neither a number nor one of these scales.

    Example:
        >>> import torch, pyro_vae as pv
        >>> dispersion = pv.likelihoods.ScalePerOutput(5)
        >>> decoder = pv.nets.MLP(2, [8], 5)
        >>> likelihood = pv.likelihoods.NegativeBinomial(decoder, dispersion)
        >>> p = likelihood(torch.zeros(100, 2))
        >>> torch.allclose(p.variance, p.mean + p.mean**2)
        True
    """

    def __init__(
        self, decoder: nn.Module, dispersion: float | Scale | None = None, event_dim: int = 1
    ):
        super().__init__(decoder, event_dim)
        self.dispersion = as_scale(
            "dispersion", SharedScale() if dispersion is None else dispersion
        )

    def forward(self, *inputs: Tensor) -> TorchDistributionMixin:
        """Return p(x|z), of batch shape (...), for z of shape ``(..., *latent event)``."""
        raw_mean, *raw = self.outputs(1 + self.dispersion.parts, *inputs)
        dispersion = self.dispersion(raw_mean, *raw)
        logits = softplus_scale(raw_mean).log() + dispersion.log()
        return _NegativeBinomial(dispersion.reciprocal(), logits=logits).to_event(self.event_dim)


class _Poisson(dist.Poisson):
    """torch's distribution for counts of any dtype: in torch's, 255 of uint8 would become 0."""

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value_for(self.rate, value))


_LEAST_FOR_SERIES = 20.0


class _NegativeBinomial(dist.NegativeBinomial):
    """torch's distribution, without the cancellation of large terms at small dispersions."""

    def log_prob(self, value: Tensor) -> Tensor:
        value = value_for(self.logits, value)
        if self._validate_args:
            self._validate_sample(value)
        r, logits, x = torch.broadcast_tensors(self.total_count, self.logits, value)
        growth = x * logits - (r + x) * softplus(logits)
        return growth + _log_rising(r, x) - torch.lgamma(x + 1)


def _log_rising(r: Tensor, x: Tensor) -> Tensor:
    r"""Return :math:`\log\Gamma(r + x) - \log\Gamma(r)`.

    For large r, use the difference of two Stirling series, whose common terms are canceled
    analytically. The first omitted term is :math:`1 / (1260 r^5)`.
    """
    small, large, is_small = split_at(_LEAST_FOR_SERIES, r)
    whole = large + x
    series = (1 / whole - 1 / large) / 12 - (whole**-3 - large**-3) / 360
    by_series = (whole - 0.5) * torch.log1p(x / large) + x * (large.log() - 1) + series
    by_gammas = torch.lgamma(small + x) - torch.lgamma(small)
    return torch.where(is_small, by_gammas, by_series)
