"""What ELBO surgery finds: the terms of the bound, and their standard errors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

_TERMS = ("elbo", "distortion", "rate", "mutual_information", "marginal_kl", "log_n")
_OF_DIMENSIONS = ("total_correlation", "dimension_wise_kl")
_ROOM = 0.1  # nats below log N


@dataclass(frozen=True)
class Surgery:
    r"""The terms of the average ELBO over a data set, in nats per datum.

    ``elbo = -distortion - rate``, ``rate = mutual_information + marginal_kl`` and, where they are
    known, ``marginal_kl = total_correlation + dimension_wise_kl``, exactly.

    Args:
        elbo: the evidence lower bound.
        distortion: :math:`-E_q \log p(x|z)`, the reconstruction term.
        rate: the average of :math:`\mathrm{KL}(q(z|x_n) \| p(z))`.
        mutual_information: :math:`I_q[x, z]` between the index of a datum and its code; it cannot
            pass ``log_n``, and says nothing more once it is there.
        marginal_kl: :math:`\mathrm{KL}(q_{agg}(z) \| p(z))`, what the best prior would gain; NaN
            where the prior depends on covariates, or on x: rate and mutual information then differ
            by what is the KL of nothing, and may be negative.
        log_n: log N for the N data points.
        standard_errors: of each of these but the last, and of the next two where they are known,
            by name, for the population that the data are drawn from; NaN for one datum. They leave
            out that the q_agg of N data differs from the population's, which takes from the mutual
            information and gives to the marginal KL: little if the posteriors of many data
            overlap, and everything at saturation.
        total_correlation: :math:`\mathrm{KL}(q_{agg}(z) \| \prod_j q_{agg}(z_j))`; None if the
            latents are not one site of diagonal Gaussians under the guide, the prior's dimensions
            depend on each other or on the datum, or the posteriors are too narrow for a quadrature.
        dimension_wise_kl: :math:`\sum_j \mathrm{KL}(q_{agg}(z_j) \| p(z_j))`; None with the other.
        kl_of_sites: the part of the rate of each latent site; None if the guide or the model has
            one density for several of them.
        kl_of_dimensions: the part of the rate of each number of each latent, in the order of its
            memory; None if the numbers are not independent under both programs.
        estimator: what q_agg was estimated with, see :func:`pyro_vae.elbo_surgery`.
        num_scored: how many of the N data all of this is averaged over, if the surgery was
            stopped: those whose codes had been scored; None if it was not. ``kl_of_sites`` and
            ``kl_of_dimensions`` are then averages over all data that codes had been drawn for, and
            need not add up to the rate.
    """

    elbo: float
    distortion: float
    rate: float
    mutual_information: float
    marginal_kl: float
    log_n: float
    standard_errors: dict[str, float]
    total_correlation: float | None = None
    dimension_wise_kl: float | None = None
    kl_of_sites: dict[str, float] | None = None
    kl_of_dimensions: dict[str, tuple[float, ...]] | None = field(default=None, repr=False)
    estimator: str = "exact"
    num_scored: int | None = None

    @property
    def optimal_prior_gain(self) -> float:
        """What the ELBO gains, on these data, with the best of all priors: the marginal KL.

        NaN where the prior depends on covariates, or on x.
        """
        return self.marginal_kl

    @property
    def saturated(self) -> bool:
        """Whether the mutual information comes within 0.1 nats of log N.

        Hardly any code is then likely under the posterior of another datum. The mutual
        information of the population may be anything above, and its marginal KL anything below
        what stands here: more data would move one to the other. The weighted estimator passes log N
        whatever the posteriors are, and says nothing about it: False.
        """
        return self.estimator != "weighted" and self.mutual_information > self.log_n - _ROOM

    def __str__(self) -> str:
        names = [*_TERMS, *(name for name in _OF_DIMENSIONS if getattr(self, name) is not None)]
        lines = []
        if math.isnan(self.marginal_kl):
            names.remove("marginal_kl")
        for name in names:
            error = self.standard_errors.get(name)
            shown = "" if error is None else f" ± {error:.3f}"
            lines.append(f"{name:>18} {getattr(self, name):9.3f}{shown}")
        if self.kl_of_sites is not None and len(self.kl_of_sites) > 1:
            lines += [f"{'kl of ' + n:>18} {kl:9.3f}" for n, kl in self.kl_of_sites.items()]
        if self.estimator != "exact":
            lines.append(f"q_agg from minibatches ({self.estimator}): expect too much information")
        if math.isnan(self.marginal_kl):
            lines.append("no marginal KL: the prior depends on covariates, or on x")
        if math.isinf(self.rate):
            lines.append("infinite rate: the guide draws where the prior has no mass")
        if self.num_scored is not None:
            lines.append(f"stopped: from the codes of {self.num_scored} data")
        if self.saturated:
            lines.append(
                f"saturated: within {_ROOM} nats of log N the mutual information says that the\n"
                "posteriors of these data hardly overlap, and no more"
            )
        return "\n".join(lines)
