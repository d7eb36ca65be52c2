"""Bounds on the evidence whose gradient is the derivative of their value."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_vae._programs.terms import Terms, weighted
from pyro_vae._utils.checks import positive_integer, real_number
from pyro_vae._utils.init_args import records_init_args
from pyro_vae.objectives._base import Objective


@records_init_args
class ELBO(Objective):
    r"""The evidence lower bound with all terms sampled (Kingma & Welling 2014, eq. 2 and 7).

    .. math::
        \mathcal{L}(x) = \frac1K \sum_{k=1}^K \log p(x|z_k) + \log p(z_k) - \log q(z_k|x),
        \qquad z_k \sim q(z|x)

    The gradient is reparameterized. Guide sites without a reparameterized sample, such as discrete
    ones, use the score function estimator (Ranganath et al. 2014, eq. 3). Each data point is
    weighted by its own bound, minus the baseline of the site if ``infer={"baseline": ...}`` sets
    one. Global sites are supported.

    Args:
        num_particles: K.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.

    Raises:
        ValueError: ``num_particles`` is less than one. Or, when the loss is computed, a guide site
            has no reparameterized sample and some site is global.

    Example:
        >>> import pyro, torch, pyro_vae as pv
        >>> model = pv.LatentVariableModel(
        ...     prior=pv.priors.StandardNormal(2),
        ...     likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 16)),
        ... )
        >>> guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(16, [8]))
        >>> optimizer = pyro.optim.Adam({"lr": 1e-3})
        >>> svi = pyro.infer.SVI(model, guide, optimizer, loss=pv.objectives.ELBO())
        >>> loss = svi.step(torch.bernoulli(torch.full((10, 16), 0.5)))  # nats, over the batch
    """

    takes_baselines = True

    def bound(self, terms: Terms) -> Tensor:
        """Average the log-weights over the particles."""
        terms.require_no_baselines(type(self).__name__, terms.not_reparameterized)
        bound = _with_score_function(terms).mean(0)
        return self.less_baselines(bound, terms, terms.log_weight)

    def shared(self, terms: Terms) -> Tensor:
        """Average the log-weight of the global sites over the particles."""
        if terms.not_reparameterized and terms.global_sites:
            raise ValueError(
                f"guide site {terms.not_reparameterized[0]!r} has no reparameterized sample, and "
                f'site {terms.global_sites[0]!r} is outside the plate "data". ELBO does not '
                "support both together, because the score function would need the whole data "
                "set as its weight. Use pyro.infer.Trace_ELBO."
            )
        return terms.log_weight_global.mean()


@records_init_args
class MeanFieldELBO(Objective):
    r"""The evidence lower bound with the KL in closed form (Kingma & Welling 2014, eq. 3 and 8).

    .. math::
        \mathcal{L}(x) = \frac1K \sum_{k=1}^K \log p(x|z_k) - \mathrm{KL}(q(z|x) \| p(z)),
        \qquad z_k \sim q(z|x)

    If torch and Pyro have no closed form for the KL of a site, the KL is estimated from samples.
    So the bound holds for any guide. Global sites are supported.

    Args:
        num_particles: K.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.

    Raises:
        ValueError: ``num_particles`` is less than one. Or, when the loss is computed, a guide site
            has no reparameterized sample, or model and guide order their latent sites differently.
    """

    def bound(self, terms: Terms) -> Tensor:
        """Average the log-likelihood minus the KL over the particles."""
        terms.require_reparameterized("MeanFieldELBO")
        return (terms.log_likelihood - terms.kl).mean(0)

    def shared(self, terms: Terms) -> Tensor:
        """Return the same average for the global sites."""
        return (terms.log_likelihood_global - terms.kl_global).mean()


@records_init_args
class IWAE(Objective):
    r"""The importance-weighted bound (Burda et al. 2016, eq. 8).

    .. math::
        \mathcal{L}_K(x) = \log \frac1K \sum_{k=1}^K \frac{p(x, z_k)}{q(z_k|x)},
        \qquad z_k \sim q(z|x)

    It rises with K and converges to :math:`\log p(x)`. Each data point has its own weights. The
    scale of a subsampled plate multiplies the whole bound and not the weights inside the logarithm.

    Args:
        num_particles: K.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.

    Raises:
        ValueError: ``num_particles`` is less than one. The loss raises it if a site is global or
            scaled, or if a guide site has no reparameterized sample.
    """

    def bound(self, terms: Terms) -> Tensor:
        """Return the logarithm of the average weight."""
        terms.require_reparameterized("IWAE")
        return log_mean_weight(terms.log_weight, 0)


@records_init_args
class MIWAE(Objective):
    r"""The average of M importance-weighted bounds (Rainforth et al. 2018).

    .. math::
        \mathcal{L}_{M,K}(x) = \frac1M \sum_{m=1}^M
        \log \frac1K \sum_{k=1}^K \frac{p(x, z_{mk})}{q(z_{mk}|x)}, \qquad z_{mk} \sim q(z|x)

    Its expected value is that of the IWAE with K particles. The variance of the guide's gradient is
    M times smaller.

    Args:
        num_bounds: M.
        num_particles: K, particles of each bound.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.

    Raises:
        ValueError: A number is less than one, or a loss has a site that :class:`IWAE` rejects.
    """

    def __init__(
        self, num_bounds: int, num_particles: int, *, vectorize_particles: bool | None = None
    ):
        positive_integer("num_bounds", num_bounds)
        positive_integer("num_particles", num_particles)
        super().__init__(num_bounds * num_particles, vectorize_particles=vectorize_particles)
        self.num_bounds = num_bounds

    def bound(self, terms: Terms) -> Tensor:
        """Average the logarithms of the average weights."""
        terms.require_reparameterized(type(self).__name__)
        return log_mean_weight(terms.log_weight.unflatten(0, (self.num_bounds, -1)), 1).mean(0)


@records_init_args
class CIWAE(Objective):
    r"""A mixture of ELBO and IWAE on the same particles (Rainforth et al. 2018).

    .. math::
        \beta \, \mathcal{L}_{\mathrm{ELBO}}(x) + (1 - \beta) \, \mathcal{L}_K(x)

    Args:
        beta: weight of the ELBO, between 0 and 1.
        num_particles: K.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.

    Raises:
        ValueError: ``beta`` is not between 0 and 1, or a loss has a site that :class:`IWAE`
            rejects.
    """

    def __init__(self, beta: float, num_particles: int, *, vectorize_particles: bool | None = None):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        self.beta = real_number("beta", beta)
        if not 0 <= beta <= 1:
            raise ValueError(f"beta must be between 0 and 1, got {beta}")

    def bound(self, terms: Terms) -> Tensor:
        """Mix the average log-weight with the logarithm of the average weight."""
        terms.require_reparameterized("CIWAE")
        log_weight = terms.log_weight
        iwae = log_mean_weight(log_weight, 0)
        return weighted(self.beta, log_weight.mean(0)) + weighted(1 - self.beta, iwae)


@records_init_args
class Renyi(Objective):
    r"""The variational Renyi bound (Li & Turner 2016, eq. 5).

    .. math::
        \mathcal{L}_\alpha(x) = \frac{1}{1-\alpha} \log \frac1K \sum_{k=1}^K
        \left( \frac{p(x, z_k)}{q(z_k|x)} \right)^{1-\alpha}, \qquad z_k \sim q(z|x)

    At alpha = 0 it equals the :class:`IWAE`. As alpha tends to 1, it tends to the :class:`ELBO`.
    For negative alpha it tends to an upper bound as K grows. For finite K it is below that limit.

    Args:
        alpha: any number but 1.
        num_particles: K.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.

    Raises:
        ValueError: ``alpha`` is 1 or not finite, or a loss has a site that :class:`IWAE` rejects.
    """

    def __init__(
        self, alpha: float, num_particles: int, *, vectorize_particles: bool | None = None
    ):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        self.alpha = real_number("alpha", alpha)
        if alpha == 1:
            raise ValueError("alpha must not be 1, got 1. Use objectives.ELBO, the limit at 1")

    def bound(self, terms: Terms) -> Tensor:
        """Return the logarithm of the average power of the weights, divided by the power."""
        terms.require_reparameterized("Renyi")
        power = 1 - self.alpha
        return _log_mean_exp(power * terms.log_weight) / power


def log_mean_weight(log_weight: Tensor, dim: int) -> Tensor:
    """Return the logarithm of the average weight along a dimension."""
    log_weight = _without_negligible(log_weight, dim)
    return log_weight.logsumexp(dim) - math.log(log_weight.shape[dim])


def normalized_weights(log_weight: Tensor, dim: int) -> Tensor:
    """Return weights divided by their sum along a dimension. If all are zero, they stay zero."""
    impossible = log_weight.amax(dim, keepdim=True) == -math.inf
    return torch.where(impossible, 0.0, log_weight.softmax(dim))


def _log_mean_exp(powers: Tensor) -> Tensor:
    """Return the logarithm of the average of exp along the first dimension.

    The relative error is of the order of rounding, also if all powers are near zero. There,
    log K cancels in :func:`log_mean_weight`, and the rest is below rounding.
    """
    largest = powers.detach().amax(0)
    below_one = torch.expm1(powers - largest).mean(0)
    near = below_one > -0.5  # False for NaN, from infinite powers
    by_log1p = largest + torch.log1p(torch.where(near, below_one, 0.0))
    return torch.where(near, by_log1p, log_mean_weight(powers, 0))


def _without_negligible(log_weight: Tensor, dim: int) -> Tensor:
    """Increase each weight to at least e^-50 of the largest, which is below rounding of the sum.

    The gradients of the increased weights become zero. Without this step they would be denormal
    numbers, which slow down the backward pass more than all other particles together.
    """
    return log_weight.maximum(log_weight.detach().amax(dim, keepdim=True) - 50.0)


def _with_score_function(terms: Terms) -> Tensor:
    """Return the same log-weight, with the score function gradient added to its gradient.

    The log-weight contains log q of the same sites. Its gradient is removed, because its
    expectation is zero.
    """
    value, score = terms.log_weight, terms.score
    if score is None:
        return value
    own, signal = terms.log_guide_of_score, value.detach()
    signal = torch.where(signal.isinf(), 0.0, signal)  # not NaN: the value is infinite anyway
    return value + signal * (score - score.detach()) + (own - own.detach())
