"""The result of ELBO surgery: the terms of the ELBO, and their standard errors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

_TERMS = ("elbo", "distortion", "rate", "mutual_information", "marginal_kl", "log_n")
_OF_DIMENSIONS = ("total_correlation", "dimension_wise_kl")
_ROOM = 0.1  # nats below log N


@dataclass(frozen=True)
class Surgery:
    r"""The terms of the average ELBO over a data set, in nats per data point.

    ``elbo = -distortion - rate`` and ``rate = mutual_information + marginal_kl`` hold exactly. So
    does ``marginal_kl = total_correlation + dimension_wise_kl``, if these two are known.

    Args:
        elbo: the evidence lower bound.
        distortion: :math:`-E_q \log p(x|z)`, the reconstruction term.
        rate: the average of :math:`\mathrm{KL}(q(z|x_n) \| p(z))`.
        mutual_information: :math:`I_q[x, z]` between the index of a data point and its code. It is
            at most ``log_n``, unless the estimator is ``"weighted"``. A value near ``log_n`` only
            shows that the posteriors hardly overlap.
        marginal_kl: :math:`\mathrm{KL}(q_{agg}(z) \| p(z))`, the gain of the ELBO under the best
            prior. NaN if the prior depends on covariates or on x. The rate minus the mutual
            information is then not a KL, and may be negative.
        log_n: log N for the N data points.
        standard_errors: by name, of the terms above except ``log_n``, and of the next two if they
            are known. The errors are for the population of the data; NaN for one data point. They
            ignore the difference between q_agg of N data points and q_agg of the population. This
            difference lowers the mutual information and raises the marginal KL by the same amount.
            The amount is small if many posteriors overlap, and unknown at saturation.
        total_correlation: :math:`\mathrm{KL}(q_{agg}(z) \| \prod_j q_{agg}(z_j))`. It needs a guide
            with one latent site, a diagonal Gaussian. The prior must have independent dimensions,
            and be the same for all data points. None otherwise, or if the posteriors are too narrow
            for quadrature.
        dimension_wise_kl: :math:`\sum_j \mathrm{KL}(q_{agg}(z_j) \| p(z_j))`. None if
            ``total_correlation`` is None.
        kl_of_sites: the part of the rate of each latent site. None if the guide or the model has
            one density for several sites.
        kl_of_dimensions: the part of the rate of each number of each latent, in memory order. None
            if the numbers are not independent under both programs.
        estimator: the estimator of q_agg; see :func:`pyro_vae.elbo_surgery`.
        num_scored: the number of data points whose codes were scored; None if all were.
        interrupted: whether the surgery was interrupted. Its terms are then averages over the
            scored data points. But ``kl_of_sites`` and ``kl_of_dimensions`` are averages over all
            data points with sampled codes, and may not add up to the rate.
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
    interrupted: bool = False

    @property
    def optimal_prior_gain(self) -> float:
        """The gain of the ELBO under the best prior for these data, which is the marginal KL.

        NaN if the prior depends on covariates or on x.
        """
        return self.marginal_kl

    @property
    def saturated(self) -> bool:
        """Whether the mutual information is within 0.1 nats of log N.

        Hardly any code is then likely under the posterior of another data point. The mutual
        information of the population may be any larger value, and its marginal KL any smaller one.
        Only more data can show which. The property is False with the weighted estimator, because
        that estimate can exceed log N for any posteriors.
        """
        return self.estimator != "weighted" and self.mutual_information > self.log_n - _ROOM

    def __repr__(self) -> str:
        names = [*_TERMS, *(name for name in _OF_DIMENSIONS if getattr(self, name) is not None)]
        lines = ["nats per data point"]
        if math.isnan(self.marginal_kl):
            names.remove("marginal_kl")
        for name in names:
            error = self.standard_errors.get(name)
            shown = "" if error is None else f" ± {error:.3f}"
            lines.append(f"{name:>18} {getattr(self, name):9.3f}{shown}")
        if self.kl_of_sites is not None and len(self.kl_of_sites) > 1:
            lines += [f"{'kl of ' + n:>18} {kl:9.3f}" for n, kl in self.kl_of_sites.items()]
        if self.estimator != "exact":
            lines.append(
                f"q_agg from minibatches ({self.estimator}): mutual information is biased upward"
            )
        if math.isnan(self.marginal_kl):
            lines.append("no marginal KL: the prior depends on covariates or on x")
        if math.isinf(self.rate):
            lines.append("infinite rate: the guide has samples where the prior has no mass")
        if self.interrupted:
            lines.append(f"interrupted: averages over {self.num_scored} scored data points")
        elif self.num_scored is not None:
            lines.append(f"mutual information from the codes of {self.num_scored} data points")
        if self.saturated:
            lines.append(
                f"saturated: the mutual information is within {_ROOM} nats of log N. This only\n"
                "shows that the posteriors of these data hardly overlap"
            )
        return "\n".join(lines)
