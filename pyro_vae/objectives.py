"""Objectives: each a reduction of :class:`~pyro_vae.terms.Terms` to one scalar loss.

Every objective is a :class:`pyro.infer.ELBO`, so it serves in ``pyro.infer.SVI(..., loss=...)`` as
well as in :func:`pyro_vae.fit`. A bound is maximised and a loss minimised; both are in nats.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import pyro.infer
import torch
from torch import Tensor

from pyro_vae.arguments import positive_integer
from pyro_vae.terms import Terms, find_plate_nesting, terms
from pyro_vae.traces import Program


class Objective(pyro.infer.ELBO):
    """A lower bound on the evidence, to be maximised.

    A subclass states its equation in :meth:`bound`, one value for each datum; the base class sums
    over the data, scales by N/B where the plate ``"data"`` subsamples, and adds :meth:`shared`,
    the part that belongs to no datum. That is all a new objective needs.

    Args:
        num_particles: K, samples of z for each datum and gradient step.
        vectorize_particles: draw them in one run of the programs; see :func:`pyro_vae.terms`.

    Raises:
        ValueError: ``num_particles`` is less than one.
    """

    def __init__(self, num_particles: int = 1, *, vectorize_particles: bool = True):
        positive_integer("num_particles", num_particles)
        super().__init__(num_particles=num_particles, vectorize_particles=vectorize_particles)
        self._nesting_of: tuple[Program, Program, int] | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_particles={self.num_particles})"

    @abstractmethod
    def bound(self, terms: Terms) -> Tensor:
        """Reduce the terms to the bound of each datum, shape (B,), in nats."""

    def shared(self, terms: Terms) -> Tensor | float:
        """Return what the bound gains from global sites, a scalar; refuses them by default."""
        terms.require_independent_data(type(self).__name__)
        return 0.0

    def differentiable_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Tensor:
        r"""Return the loss, minus the bound summed over the batch, to be differentiated.

        Args:
            model: program of :math:`p(x, z)`.
            guide: program of :math:`q(z|x)`.
            *args: the minibatch and any covariates.
            **kwargs: keyword arguments of both programs.

        Returns:
            A scalar tensor, in nats.

        Raises:
            ValueError: the pair breaks the contract, or has a site the objective cannot take.
        """
        t = terms(
            model,
            guide,
            *args,
            num_particles=self.num_particles,
            vectorize_particles=self.vectorize_particles,
            plate_nesting=self._plate_nesting(model, guide, args, kwargs),
            **kwargs,
        )
        shared = self.shared(t)
        return -(t.scale * self.bound(t).sum() + shared)

    @torch.no_grad()
    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Return the loss as a number, in nats; see :meth:`differentiable_loss`."""
        return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Accumulate the gradient of the loss and return the loss, detached and on its device."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.detach()

    def _get_trace(self, model, guide, args, kwargs):
        raise TypeError(f"{type(self).__name__} reduces pyro_vae.terms; it takes no single trace")

    def _plate_nesting(self, model, guide, args, kwargs) -> int | None:
        """Find the nesting once for a pair: unlike Pyro's, an objective may meet many pairs."""
        if self.num_particles == 1 or not self.vectorize_particles:
            return None
        if self._nesting_of is None or self._nesting_of[:2] != (model, guide):
            nesting = find_plate_nesting(model, guide, *args, **kwargs)
            self._nesting_of = (model, guide, nesting)
        return self._nesting_of[2]


class ELBO(Objective):
    r"""The evidence lower bound, all terms sampled (Kingma & Welling 2014, eq. 2 and 7).

    .. math::
        \mathcal{L}(x) = \frac1K \sum_{k=1}^K \log p(x|z_k) + \log p(z_k) - \log q(z_k|x),
        \qquad z_k \sim q(z|x)

    The gradient is reparameterised. Guide sites without a reparameterised sample (discrete ones,
    say) get the score function estimator (Ranganath et al. 2014, eq. 3), each datum weighted by
    its own bound. Global sites are accepted.

    Args:
        num_particles: K.
        vectorize_particles: draw them in one run of the programs; see :func:`pyro_vae.terms`.

    Raises:
        ValueError: ``num_particles`` is less than one; in a loss, a guide site has no
            reparameterised sample and some site is global.

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

    def bound(self, terms: Terms) -> Tensor:
        """Average the log-weights over the particles."""
        return _with_score_function(terms).mean(0)

    def shared(self, terms: Terms) -> Tensor:
        """Average the log-weight of the global sites over the particles."""
        if terms.not_reparameterized and terms.global_sites:
            raise ValueError(
                f"guide site {terms.not_reparameterized[0]!r} has no reparameterised sample, and "
                f'site {terms.global_sites[0]!r} stands outside the plate "data": the score '
                "function would have to be weighted by the whole data set. Use "
                "pyro.infer.Trace_ELBO."
            )
        return terms.log_weight_global.mean()


class MeanFieldELBO(Objective):
    r"""The evidence lower bound with the KL in closed form (Kingma & Welling 2014, eq. 3 and 8).

    .. math::
        \mathcal{L}(x) = \frac1K \sum_{k=1}^K \log p(x|z_k) - \mathrm{KL}(q(z|x) \| p(z)),
        \qquad z_k \sim q(z|x)

    At a site whose KL torch and Pyro do not know, the sampled difference stands in, so the bound
    holds for any guide. Global sites are accepted.

    Args:
        num_particles: K.
        vectorize_particles: draw them in one run of the programs; see :func:`pyro_vae.terms`.

    Raises:
        ValueError: ``num_particles`` is less than one; in a loss, a guide site has no
            reparameterised sample, or model and guide order their latents differently.
    """

    def bound(self, terms: Terms) -> Tensor:
        """Average the likelihood over the particles, less the KL."""
        terms.require_reparameterized("MeanFieldELBO")
        return (terms.log_likelihood - terms.kl).mean(0)

    def shared(self, terms: Terms) -> Tensor:
        """The same of the global sites."""
        return (terms.log_likelihood_global - terms.kl_global).mean()


class IWAE(Objective):
    r"""The importance-weighted bound (Burda et al. 2016, eq. 8).

    .. math::
        \mathcal{L}_K(x) = \log \frac1K \sum_{k=1}^K \frac{p(x, z_k)}{q(z_k|x)},
        \qquad z_k \sim q(z|x)

    It rises with K and tends to :math:`\log p(x)`. The weights are those of single data points:
    the scale of a subsampled plate multiplies the bound and never enters the logarithm.

    Args:
        num_particles: K.
        vectorize_particles: draw them in one run of the programs; see :func:`pyro_vae.terms`.

    Raises:
        ValueError: ``num_particles`` is less than one; in a loss, a site is global or scaled, or a
            guide site has no reparameterised sample.
    """

    def bound(self, terms: Terms) -> Tensor:
        """Take the logarithm of the average weight."""
        terms.require_reparameterized("IWAE")
        log_weight = _without_negligible(terms.log_weight)
        return log_weight.logsumexp(0) - math.log(log_weight.shape[0])


def _without_negligible(log_weight: Tensor) -> Tensor:
    """Raise each weight to at least e^-50 of the largest, below any rounding of their sum.

    Their gradients become zero. As the denormal numbers that they would be, they would slow the
    backward pass down by more than all other particles together.
    """
    return log_weight.maximum(log_weight.detach().amax(0) - 50.0)


def _with_score_function(terms: Terms) -> Tensor:
    """Leave the log-weight as it is; add to its gradient that of the score, weighted by it.

    The log-weight holds log q of the same sites, whose expected gradient is zero: it is taken out.
    """
    value, score = terms.log_weight, terms.score
    if score is None:
        return value
    own = terms.log_guide_of_score
    return value + value.detach() * (score - score.detach()) + (own - own.detach())
