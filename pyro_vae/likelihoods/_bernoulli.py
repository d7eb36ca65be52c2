"""Binary data."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.nn import functional as F

from pyro_vae._utils.init_args import records_init_args
from pyro_vae.distributions._casting import value_for
from pyro_vae.likelihoods._base import Likelihood


@records_init_args
class Bernoulli(Likelihood):
    r""":math:`p(x|z) = \prod_d \mathrm{Bernoulli}(x_d; \sigma(f_d(z)))` for x in {0, 1}.

    Args:
        decoder: network f from z, and any covariates, to the logits of x.
        event_dim: number of rightmost dimensions of x that form one data point.

    Raises:
        ValueError: ``event_dim`` is less than one.

    Example:
        >>> import torch, pyro_vae as pv
        >>> likelihood = pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 784))
        >>> p = likelihood(torch.zeros(100, 2))
        >>> p.batch_shape, p.event_shape
        (torch.Size([100]), torch.Size([784]))
    """

    def forward(self, *inputs: Tensor) -> TorchDistributionMixin:
        """Return p(x|z), of batch shape (...), for z of shape ``(..., *latent event)``."""
        (logits,) = self.outputs(1, *inputs)
        return _IndependentBernoulli(_Bernoulli(logits=logits), self.event_dim)


class _Bernoulli(dist.Bernoulli):
    """Pyro's Bernoulli for values of any real dtype."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log p(x)."""
        return super().log_prob(value_for(self.logits, value))


class _IndependentBernoulli(dist.Independent):
    """``Bernoulli(logits=...).to_event(n)`` with a log_prob that takes half the time compiled."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log p(x) summed over the event."""
        logits, event = self.base_dist.logits, -self.reinterpreted_batch_ndims
        value = value_for(logits, value)
        if self.base_dist._validate_args:
            self.base_dist._validate_sample(value)
        if logits.dtype not in (torch.float32, torch.float64):
            return super().log_prob(value)  # the product would overflow
        logits, value = torch.broadcast_tensors(logits, value.to(logits.dtype))
        return _BernoulliLogProb.apply(logits.flatten(event), value.flatten(event))


class _BernoulliLogProb(torch.autograd.Function):
    r""":math:`\sum_d x_d l_d - \max(l_d, 0) - \log(1 + e^{-|l_d|})` over the last dimension.

    Logarithms are most of the cost, so take one logarithm of the product of many factors. Each
    factor lies in (1, 2], so the product cannot overflow. The relative rounding error of the
    product is the absolute rounding error of its logarithm.
    """

    _FACTORS = 16

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, value: Tensor) -> Tensor:
        n = _BernoulliLogProb._FACTORS
        factors = 1.0 + F.pad((-logits.abs()).exp(), (0, -logits.shape[-1] % n))
        logs = factors.unflatten(-1, (n, -1)).prod(-2).log().sum(-1)
        return (value * logits - logits.clamp(min=0.0)).sum(-1) - logs

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        logits, value = ctx.saved_tensors
        grad = grad.unsqueeze(-1)
        of_value = grad * logits if ctx.needs_input_grad[1] else None
        return grad * (value - logits.sigmoid()), of_value
