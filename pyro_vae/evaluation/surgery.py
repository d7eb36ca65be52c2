r"""ELBO surgery: the bound cut into what the model does well and what the prior costs it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from pyro import poutine
from rich.progress import Progress
from torch import Tensor

from pyro_vae import programs
from pyro_vae.arguments import positive_integer
from pyro_vae.evaluation.estimating import estimating
from pyro_vae.evaluation.importance import standard_error
from pyro_vae.evaluation.information import (
    DiagonalGaussians,
    gaussian_information,
    scored_information,
)
from pyro_vae.minibatches import Batch, Data, Minibatches
from pyro_vae.progress import task
from pyro_vae.sites import random_sites
from pyro_vae.terms import terms
from pyro_vae.traces import Program


@dataclass(frozen=True)
class Surgery:
    r"""The terms of the average ELBO over a data set, in nats per datum.

    ``elbo = -distortion - rate`` and ``rate = mutual_information + marginal_kl``, exactly.

    Args:
        elbo: the evidence lower bound.
        distortion: :math:`-E_q \log p(x|z)`, the reconstruction term.
        rate: the average of :math:`\mathrm{KL}(q(z|x_n) \| p(z))`.
        mutual_information: :math:`I_q[x, z]` between the index of a datum and its code; it cannot
            pass ``log_n``, and says nothing more once it is there.
        marginal_kl: :math:`\mathrm{KL}(q_{agg}(z) \| p(z))`, what the best prior would gain.
        log_n: log N for the N data points.
        standard_errors: of each of the first five by name, for the population that the data are
            drawn from; NaN for one datum.
    """

    elbo: float
    distortion: float
    rate: float
    mutual_information: float
    marginal_kl: float
    log_n: float
    standard_errors: dict[str, float]

    def __str__(self) -> str:
        lines = []
        for field in fields(self)[:-1]:
            error = self.standard_errors.get(field.name)
            shown = "" if error is None else f" ± {error:.3f}"
            lines.append(f"{field.name:>18} {getattr(self, field.name):9.3f}{shown}")
        return "\n".join(lines)


def elbo_surgery(
    model: Program,
    guide: Program,
    data: Data,
    *,
    num_particles: int = 1,
    batch_size: int = 500,
    vectorize_particles: bool = True,
    seed: int | None = None,
    progress: bool | Progress = False,
    description: str = "ELBO surgery",
) -> Surgery:
    r"""Decompose the average ELBO (Hoffman & Johnson 2016, eq. 6 and 7).

    .. math::
        \frac1N \sum_n \mathcal{L}(x_n) = \underbrace{\frac1N \sum_n E_{q(z|x_n)} \log p(x_n|z)
        }_{-\text{distortion}} - \underbrace{I_q[n, z]}_{\text{mutual information}}
        - \underbrace{\mathrm{KL}(q_{agg}(z) \| p(z))}_{\text{marginal KL}}

    with the aggregated posterior :math:`q_{agg}(z) = \frac1N \sum_n q(z|x_n)`. Every draw
    :math:`z \sim q(z|x_n)` is scored under the posteriors of all N data points: no subset stands
    in for the whole. For diagonal Gaussian guides, also mapped onto a support, that is done by
    matrix products in float64; for any other guide by running it on the given values, N times N.
    The rate is in closed form where torch or Pyro knows it.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        data: the data that q_agg is over: the training set, as a rule. What
            :func:`pyro_vae.fit` takes.
        num_particles: draws of z for each datum.
        batch_size: data points at a time.
        vectorize_particles: draw many particles in one run; see :func:`pyro_vae.terms`.
        seed: fixes the draws and leaves the process's random numbers as they were.
        progress: show a bar; or a rich Progress to add one to.
        description: text before the bar.

    Returns:
        The :class:`Surgery`.

    Raises:
        ValueError: bad data or arguments, or a pair that breaks the contract; a site is global or
            scaled; the guide has auxiliary sites, so that its density is an integral, or masks
            that differ from datum to datum.

    Example:
        >>> import torch, pyro, pyro_vae as pv
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def blind_guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))  # the prior
        >>> surgery = pv.elbo_surgery(model, blind_guide, torch.randn(50), seed=0)
        >>> print(f"{abs(surgery.mutual_information):.3f} {abs(surgery.marginal_kl):.3f}")
        0.000 0.000
    """
    positive_integer("num_particles", num_particles)
    batches = Minibatches(data, batch_size, device=programs.device_of(model, guide))
    log_likelihood, rate, sampled_rate, log_guide, codes, posteriors = [], [], [], [], [], []
    with (
        estimating(
            "elbo_surgery",
            model,
            guide,
            batches,
            vectorize_particles=vectorize_particles,
            seed=seed,
        ) as plate_nesting,
        task(progress, description, batches.num_data, transient=True) as advance,
    ):
        gaussian = DiagonalGaussians.describe(guide, batches.first())
        _refuse_masks(guide, batches.first())
        for batch in batches:
            t = terms(
                model,
                guide,
                *batch,
                num_particles=num_particles,
                vectorize_particles=vectorize_particles,
                plate_nesting=plate_nesting,
            )
            log_likelihood.append(t.log_likelihood.double().mean(0))
            rate.append(t.kl.double().mean(0))
            sampled_rate.append((t.log_guide - t.log_prior).double().mean(0))
            if gaussian:
                posteriors.append(DiagonalGaussians.read(guide, batch))
                codes.append(posteriors[-1].codes(t.samples))
            else:
                log_guide.append(t.log_guide)
                codes.append(t.samples)
            advance(batch[0].shape[0])
        if gaussian:
            q = DiagonalGaussians.concatenate(posteriors)
            information = gaussian_information(q, torch.cat(codes, dim=1))
        else:
            information = scored_information(
                guide,
                batches,
                codes,
                torch.cat(log_guide, dim=1),
                plate_nesting,
                vectorize_particles,
            )
    log_likelihood, rate, sampled_rate = map(torch.cat, (log_likelihood, rate, sampled_rate))
    information = _control(information, rate - sampled_rate)
    per_datum = {
        "elbo": log_likelihood - rate,
        "distortion": -log_likelihood,
        "rate": rate,
        "mutual_information": information,
        "marginal_kl": rate - information,
    }
    return Surgery(
        **{name: values.mean().item() for name, values in per_datum.items()},
        log_n=math.log(len(information)),
        standard_errors={name: standard_error(values) for name, values in per_datum.items()},
    )


def _refuse_masks(guide: Program, batch: Batch) -> None:
    for site in random_sites(poutine.trace(guide).get_trace(*batch)):
        if isinstance(site["mask"], Tensor) and site["mask"].numel() > 1:
            raise ValueError(
                f"guide site {site['name']!r} is masked, differently from datum to datum: a code "
                "of one datum has no density under the posterior of another, so there is no "
                "aggregated posterior"
            )


def _control(values: Tensor, noise: Tensor) -> Tensor:
    """Take out of the values what they share with a noise whose expectation is zero.

    The noise is what sampling adds to a rate known in closed form. The regression moves between
    two estimates of the marginal KL, the rate less the sampled mutual information and the sampled
    log q_agg - log p: the former is exact where the information saturates at log N, the latter
    where the aggregated posterior is the prior.
    """
    centred = noise - noise.mean()
    variance = centred.square().sum()
    if len(values) < 10 or variance == 0:  # nothing to regress on
        return values
    return values - (values * centred).sum() / variance * noise
