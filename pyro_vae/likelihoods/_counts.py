"""Counts: Poisson and negative binomial likelihoods."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyro_vae._utils.init_args import records_init_args
from pyro_vae._utils.numerics import softplus, softplus_scale
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
        logits = (softplus_scale(raw_mean) * dispersion).log()
        return _NegativeBinomial(dispersion.reciprocal(), logits=logits).to_event(self.event_dim)


class _Poisson(dist.Poisson):
    """torch's distribution for any dtype, without the cancellation of large terms (Loader 2000).

    In torch's, 255 of uint8 would become 0.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        x = value_for(self.rate, value)
        if self._validate_args:
            self._validate_sample(x)
        positive = x.clamp(min=1.0)
        log = positive.log()
        rise = (self.rate.detach() - positive) / positive
        log_ratio = _corrected(self.rate.log() - log, rise)
        return x * log_ratio - (self.rate - x) - _log_factorial_rest(x, positive, log)


class _NegativeBinomial(dist.NegativeBinomial):
    """torch's distribution, without the cancellation of large terms (Loader 2000)."""

    def log_prob(self, value: Tensor) -> Tensor:
        x = value_for(self.logits, value)
        if self._validate_args:
            self._validate_sample(x)
        r, total, positive = self.total_count, self.total_count + x, x.clamp(min=1.0)
        log, log_total = positive.log(), total.log()
        growth, growth_of_mean = torch.log1p(x / r), softplus(self.logits)  # from r to r + x, r + m
        log_odds = (self.logits - growth_of_mean) + (log_total - log)
        with torch.no_grad():
            mean = self.mean
            rise = (mean - x) / total
            rise_of_odds = r * (mean - positive) + mean * (x - positive)
            rise_of_odds = rise_of_odds / (positive * (r + mean))
        deviance = r * _corrected(growth_of_mean - growth, rise)
        deviance = deviance - x * _corrected(log_odds, rise_of_odds)
        rest = _stirling_rest(total, log_total) - _stirling_rest(r, r.log()) - 0.5 * growth
        return rest - deviance - _log_factorial_rest(x, positive, log)


_LEAST_FOR_SERIES = 32.0


def _corrected(log_ratio: Tensor, rise: Tensor) -> Tensor:
    """Return log(a / b) to the precision of ``rise`` = (a - b) / b, if it is between -1/2 and 1.

    The gradient is that of ``log_ratio``.
    """
    with torch.no_grad():
        rough = log_ratio.clamp(-math.log(2), math.log(2))
        correction = rise.clamp(-0.5, 1.0).log1p_().sub_(rough)
    return log_ratio + correction


def _combined(x: Tensor, below: Tensor, above: Tensor) -> Tensor:
    """Return ``below`` at x of at most 32, ``above`` from 33 on, and a mixture between them.

    On CPUs, ``torch.where`` takes much longer, if its condition varies between neighbors.
    """
    share = (_LEAST_FOR_SERIES + 1 - x.detach()).clamp(0.0, 1.0)
    return torch.lerp(above, below, share)


def _log_factorial_rest(x: Tensor, positive: Tensor, log: Tensor) -> Tensor:
    r"""Return :math:`\log x! - (x \log x - x)`, where ``log`` is that of ``positive``, x or 1."""
    by_series = _stirling_series(positive) + (0.5 * log + 0.5 * math.log(2 * math.pi))
    return _combined(x, torch.lgamma(x + 1) + (x - x * log), by_series)


def _stirling_rest(x: Tensor, log: Tensor) -> Tensor:
    r"""Return :math:`\log\Gamma(x) - (x - 1/2) \log x + x - \log(2\pi) / 2` for positive x."""
    by_gamma = torch.lgamma(x) - (x - 0.5) * log + (x - 0.5 * math.log(2 * math.pi))
    return _combined(x, by_gamma, _stirling_series(x))


def _stirling_series(x: Tensor) -> Tensor:
    r"""Return the series of :func:`_stirling_rest` for large x, and its value at 32 for small x.

    The first omitted term is :math:`1 / (1680 x^7)`.
    """
    inverse = (x + torch.relu(_LEAST_FOR_SERIES - x)).reciprocal()
    square = inverse.square()
    return inverse * (1 / 12 - square * (1 / 360 - square / 1260))
