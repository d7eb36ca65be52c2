"""Bounds whose KL is weighed, floored or aimed at a value."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from pyro_vae._programs.terms import Terms
from pyro_vae._utils.checks import positive_number
from pyro_vae.objectives._base import Objective
from pyro_vae.objectives._schedules import Schedule, as_schedule


class BetaELBO(Objective):
    r"""The ELBO with a weight on its KL (Higgins et al. 2017, eq. 4), which may change.

    .. math::
        \frac1K \sum_k \log p(x|z_k) - \beta \, \mathrm{KL}(q(z|x) \| p(z))

    The weight multiplies log q and log p(z) alike. The KL is taken in closed form where it is
    known, and sampled elsewhere. Global sites are accepted, and weighed likewise.

    Args:
        beta: the weight; or a schedule of it, such as
            :class:`Linear(steps=1000) <pyro_vae.objectives.Linear>`, a warm-up.
        num_particles: K.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.

    Raises:
        ValueError: a number out of range; in a loss, a guide site has no reparameterised sample.

    Example:
        >>> import pyro_vae as pv
        >>> pv.objectives.BetaELBO(pv.objectives.Cyclical(period=500))
        BetaELBO(beta=Cyclical(period=500, rise=0.5, start=0, end=1), num_particles=1)
    """

    def __init__(
        self,
        beta: float | Schedule = 1.0,
        num_particles: int = 1,
        *,
        vectorize_particles: bool = True,
    ):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        self.beta = as_schedule("beta", beta)

    def __repr__(self) -> str:
        return f"BetaELBO(beta={self.beta}, num_particles={self.num_particles})"

    def bound(self, terms: Terms) -> Tensor:
        """Average the likelihood over the particles, less the weighted KL."""
        terms.require_reparameterized("BetaELBO")
        return (terms.log_likelihood - self.beta(self.step) * terms.kl).mean(0)

    def shared(self, terms: Terms) -> Tensor:
        """The same of the global sites."""
        return (terms.log_likelihood_global - self.beta(self.step) * terms.kl_global).mean()


class FreeBits(Objective):
    r"""The ELBO in which a small KL costs nothing more (Kingma et al. 2016, eq. 15).

    .. math::
        \frac1K \sum_k \log p(x|z_k) - \sum_j \max\left(\lambda, \mathrm{KL}_j\right)

    The parts j of the latents have nothing to gain from a KL below :math:`\lambda`, and so none of
    them collapses onto the prior for a small gain.

    Args:
        least: :math:`\lambda`, in nats, of each part.
        per: what a part is: each latent ``"site"`` or each ``"dimension"``.
        over: where the KL is compared with its floor: averaged over the ``"batch"``, as in the
            paper, or for each ``"datum"``.
        num_particles: K.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.

    Raises:
        ValueError: an argument out of range; in a loss, a site is global or scaled, a guide site
            has no reparameterised sample, or the KL has no such parts.
    """

    def __init__(
        self,
        least: float = 0.5,
        per: Literal["site", "dimension"] = "site",
        over: Literal["batch", "datum"] = "batch",
        num_particles: int = 1,
        *,
        vectorize_particles: bool = True,
    ):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        if per not in ("site", "dimension"):
            raise ValueError(f"per must be 'site' or 'dimension', got {per!r}")
        if over not in ("batch", "datum"):
            raise ValueError(f"over must be 'batch' or 'datum', got {over!r}")
        self.least, self.per, self.over = positive_number("least", least), per, over

    def bound(self, terms: Terms) -> Tensor:
        """Average the likelihood over the particles, less the parts of the KL that count."""
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


class CapacityELBO(Objective):
    r"""The ELBO with its KL drawn to a target (Burgess et al. 2018, eq. 8).

    .. math::
        \frac1K \sum_k \log p(x|z_k) - \gamma \left| \mathrm{KL} - C \right|

    The KL is averaged over the minibatch.

    Args:
        capacity: C, in nats, or a schedule of it.
        weight: :math:`\gamma`.
        num_particles: K.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.

    Raises:
        ValueError: a number out of range; in a loss, a site is global or scaled, or a guide site
            has no reparameterised sample.
    """

    def __init__(
        self,
        capacity: float | Schedule,
        weight: float = 10.0,
        num_particles: int = 1,
        *,
        vectorize_particles: bool = True,
    ):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        self.capacity, self.weight = (
            as_schedule("capacity", capacity),
            positive_number("weight", weight),
        )

    def bound(self, terms: Terms) -> Tensor:
        """Average the likelihood over the particles, less the weighted distance of the KL."""
        terms.require_reparameterized("CapacityELBO")
        distance = (terms.kl.mean() - self.capacity(self.step)).abs()
        return terms.log_likelihood.mean(0) - self.weight * distance
