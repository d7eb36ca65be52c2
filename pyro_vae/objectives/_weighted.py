"""Bounds whose KL has a weight, a floor or a target value."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from pyro_vae._programs.terms import Terms, weighted
from pyro_vae._utils.checks import positive_number, require_word
from pyro_vae._utils.init_args import records_init_args
from pyro_vae.objectives._base import Objective
from pyro_vae.objectives._schedules import Schedule, as_schedule


@records_init_args
class BetaELBO(Objective):
    r"""The ELBO with a weight on its KL, constant or scheduled (Higgins et al. 2017, eq. 4).

    .. math::
        \frac1K \sum_k \log p(x|z_k) - \beta \, \mathrm{KL}(q(z|x) \| p(z))

    The weight multiplies both log q and log p(z). The KL has its closed form if torch and Pyro
    implement one, and is estimated from samples otherwise. Global sites are supported, with the
    same weight.

    Args:
        beta: the weight, or a schedule, such as the warm-up
            :class:`Linear(steps=1000) <pyro_vae.objectives.Linear>`.
        num_particles: K.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.

    Raises:
        ValueError: A number is out of range, or a guide site has no reparameterized sample when
            the loss is computed.

    Example:
        >>> import pyro_vae as pv
        >>> pv.objectives.BetaELBO(pv.objectives.Cyclical(period=500))
        BetaELBO(beta=Cyclical(500))
    """

    def __init__(
        self,
        beta: float | Schedule = 1.0,
        num_particles: int = 1,
        *,
        vectorize_particles: bool | None = None,
    ):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        self.beta = as_schedule("beta", beta)

    def bound(self, terms: Terms) -> Tensor:
        """Average the log-likelihood minus the weighted KL over the particles."""
        terms.require_reparameterized("BetaELBO")
        return (terms.log_likelihood - weighted(self.beta(self.step), terms.kl)).mean(0)

    def shared(self, terms: Terms) -> Tensor:
        """Return the same average for the global sites."""
        return (terms.log_likelihood_global - self.beta(self.step) * terms.kl_global).mean()


@records_init_args
class FreeBits(Objective):
    r"""The ELBO with a lower limit on each part of the KL (Kingma et al. 2016, eq. 15).

    .. math::
        \frac1K \sum_k \log p(x|z_k) - \sum_j \max\left(\lambda, \mathrm{KL}_j\right)

    Reducing a KL below :math:`\lambda` does not increase the bound. So no part j of the latent
    variables collapses to the prior for a small gain.

    Args:
        least: :math:`\lambda` of each part, in nats.
        per: the parts, either each latent ``"site"`` or each ``"dimension"``.
        over: ``"batch"`` compares :math:`\lambda` with the average KL of the batch, as in the
            paper. ``"data_point"`` compares it with the KL of each data point.
        num_particles: K.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.

    Raises:
        ValueError: An argument is out of range. Or, in a loss, a site is global or scaled, a guide
            site has no reparameterized sample, or the KL has no such parts.
    """

    def __init__(
        self,
        least: float = 0.5,
        per: Literal["site", "dimension"] = "site",
        over: Literal["batch", "data_point"] = "batch",
        num_particles: int = 1,
        *,
        vectorize_particles: bool | None = None,
    ):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        require_word("per", per, ("site", "dimension"))
        require_word("over", over, ("batch", "data_point"))
        self.least, self.per, self.over = positive_number("least", least), per, over

    def bound(self, terms: Terms) -> Tensor:
        """Return the average log-likelihood minus the parts of the KL, each at least ``least``."""
        terms.require_reparameterized("FreeBits")
        parts = terms.kl_of_sites() if self.per == "site" else terms.kl_of_dimensions()
        bound = terms.log_likelihood.mean(0)
        for part in parts.values():
            kl = part.mean(0)
            if self.over == "batch":
                kl = kl.mean(0, keepdim=True)
            floored = kl.clamp(min=self.least)
            bound = bound - floored.flatten(1).sum(1) if floored.dim() > 1 else bound - floored
        return bound


@records_init_args
class CapacityELBO(Objective):
    r"""The ELBO with a target value for its KL (Burgess et al. 2018, eq. 8).

    .. math::
        \frac1K \sum_k \log p(x|z_k) - \gamma \left| \mathrm{KL} - C \right|

    The KL is averaged over the minibatch.

    Args:
        capacity: C in nats, a number or a schedule.
        weight: :math:`\gamma`.
        num_particles: K.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.

    Raises:
        ValueError: A number is out of range. Or, when the loss is computed, a site is global or
            scaled, or a guide site has no reparameterized sample.
    """

    def __init__(
        self,
        capacity: float | Schedule,
        weight: float = 10.0,
        num_particles: int = 1,
        *,
        vectorize_particles: bool | None = None,
    ):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        self.capacity, self.weight = (
            as_schedule("capacity", capacity),
            positive_number("weight", weight),
        )

    def bound(self, terms: Terms) -> Tensor:
        """Return the average log-likelihood minus the weighted distance of the KL to its target."""
        terms.require_reparameterized("CapacityELBO")
        distance = (terms.kl.mean() - self.capacity(self.step)).abs()
        return terms.log_likelihood.mean(0) - self.weight * distance
