"""Data in [0, 1]."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.distributions import register_kl

from pyro_vae._utils.init_args import records_init_args
from pyro_vae._utils.numerics import split_at, within
from pyro_vae.distributions import _continuous_bernoulli as continuous_bernoulli
from pyro_vae.distributions._casting import value_for
from pyro_vae.distributions._continuous_bernoulli import log_mass
from pyro_vae.likelihoods._base import Likelihood


@records_init_args
class ContinuousBernoulli(Likelihood):
    r"""Continuous Bernoulli distributions for x in [0, 1] (Loaiza-Ganem & Cunningham 2019).

    .. math::
        p(x|z) = \prod_d C(l_d) \, \sigma(l_d)^{x_d} \, \sigma(-l_d)^{1 - x_d}, \qquad
        C(l) = \frac{l}{\tanh(l / 2)}, \qquad l = f(z)

    C normalizes the density. A Bernoulli likelihood of gray values is not normalized.

    Args:
        decoder: network f from z, and any covariates, to the logits of x.
        event_dim: number of rightmost dimensions of x that form one data point.

    Raises:
        ValueError: ``event_dim`` is less than one.

    Example:
        >>> import torch, pyro_vae as pv
        >>> likelihood = pv.likelihoods.ContinuousBernoulli(torch.nn.Identity())
        >>> likelihood(torch.tensor([0.0])).log_prob(torch.tensor([0.3]))  # uniform
        tensor(0.)
    """

    def forward(self, *inputs: Tensor) -> TorchDistributionMixin:
        """Return p(x|z), of batch shape (...), for z of shape ``(..., *latent event)``."""
        (logits,) = self.outputs(1, *inputs)
        return _ContinuousBernoulli(logits=logits).to_event(self.event_dim)


# Below this size of the logit, icdf uses a series: its truncation error is less than the
# cancellation error of the closed form.
_LEAST_OF_SHARES = 1e-3


class _ContinuousBernoulli(dist.ContinuousBernoulli):
    """torch's distribution, computed from the logits instead of clamped probabilities.

    In float32, torch's probabilities saturate at logits of 16. Its density is wrong beyond, and
    its mean does not exceed 15/16. Both branches of each ``torch.where`` are finite for all inputs,
    in value and in gradient.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        r"""Return :math:`l x - \log((e^l - 1) / l)`."""
        value = value_for(self.logits, value)
        if self._validate_args:
            self._validate_sample(value)
        logits, value = torch.broadcast_tensors(self.logits, value.to(self.logits.dtype))
        return logits * value - log_mass(logits)

    @property
    def mean(self) -> Tensor:
        r"""The mean, :math:`1 / (1 - e^{-l}) - 1 / l`."""
        return continuous_bernoulli.mean(self.logits)

    @property
    def variance(self) -> Tensor:
        r"""The variance, :math:`1 / l^2 - e^{-l} / (1 - e^{-l})^2`."""
        return continuous_bernoulli.variance(self.logits)

    @property
    def stddev(self) -> Tensor:
        """The square root of the variance."""
        return self.variance.sqrt()

    def entropy(self) -> Tensor:
        """Return the differential entropy."""
        return log_mass(self.logits) - self.logits * self.mean

    def cdf(self, value: Tensor) -> Tensor:
        r"""Return the probability below x, :math:`(e^{l x} - 1) / (e^l - 1)`."""
        logits, value = torch.broadcast_tensors(self.logits, value.to(self.logits.dtype))
        size = logits.abs()
        x = within(torch.where(logits < 0, value, 1 - value), 0.0, 1.0)
        _, safe, _ = split_at(torch.finfo(size.dtype).tiny, size)
        share = torch.expm1(-safe * x) / torch.expm1(-safe)
        share = torch.where(size < torch.finfo(size.dtype).eps, x, share)
        return torch.where(logits < 0, share, 1 - share)

    def icdf(self, value: Tensor) -> Tensor:
        r"""Return the x with probability u below it, :math:`\log(1 + u (e^l - 1)) / l`.

        For l > 0, :math:`1 + \log(1 + (1 - u) (e^{-l} - 1)) / l` is the same without overflow.
        """
        size = self.logits.abs()
        share = torch.where(self.logits < 0, 1 - value, value)
        share = share.clamp(min=torch.finfo(size.dtype).eps)
        _, safe, is_near = split_at(_LEAST_OF_SHARES, size)
        x = 1 + torch.log1p((1 - share) * torch.expm1(-safe)) / safe
        x = within(x, 0.0, 1.0)
        x = torch.where(self.logits < 0, 1 - x, x)
        near = value + 0.5 * self.logits * value * (1 - value)  # exact to first order at zero
        return torch.where(is_near, near, x)


@register_kl(_ContinuousBernoulli, _ContinuousBernoulli)
def _kl(p: _ContinuousBernoulli, q: _ContinuousBernoulli) -> Tensor:
    return (p.logits - q.logits) * p.mean - log_mass(p.logits) + log_mass(q.logits)
