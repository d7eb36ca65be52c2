r"""ELBO surgery: the bound cut into what the model does well and what the prior costs it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from rich.progress import Progress
from torch import Tensor

from pyro_vae import programs
from pyro_vae.arguments import positive_integer
from pyro_vae.evaluation.aggregated.aggregate import refuse_masks
from pyro_vae.evaluation.aggregated.decomposition import Surgery
from pyro_vae.evaluation.aggregated.dimensions import dimension_wise_kl, independent_prior
from pyro_vae.evaluation.aggregated.draws import Draws, averages
from pyro_vae.evaluation.aggregated.gaussians import DiagonalGaussians
from pyro_vae.evaluation.aggregated.information import gaussian_information, scored_information
from pyro_vae.evaluation.aggregated.pairs import log_densities
from pyro_vae.evaluation.aggregated.subsets import (
    Estimator,
    check_estimator,
    random_subsets,
    subset_information,
)
from pyro_vae.evaluation.estimating import estimating
from pyro_vae.evaluation.scoring import guide_log_prob
from pyro_vae.evaluation.weighing.log_evidence import standard_error
from pyro_vae.minibatches import Batch, Data, Minibatches
from pyro_vae.progress import task
from pyro_vae.terms import terms
from pyro_vae.traces import Program


def elbo_surgery(
    model: Program,
    guide: Program,
    data: Data,
    *,
    num_particles: int = 1,
    batch_size: int = 500,
    estimator: Estimator = "exact",
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
    in for the whole, unless ``estimator`` asks for it. For diagonal Gaussian guides, also mapped
    onto a support, that is done by matrix products in float64; for any other guide by running it
    on the given values, N times N. The rate is in closed form where torch or Pyro knows it.

    The marginal KL of a single Gaussian latent is in turn cut into total correlation and
    dimension-wise KL (Chen et al. 2018, eq. 2), the latter by quadrature.

    For large N, minibatch estimators of q_agg (Chen et al. 2018, appendix C) take M times N pairs,
    M data in a minibatch. In expectation ``"stratified"`` puts the mutual information too high, by
    no more than log N less its value, and by less the larger M is; ``"weighted"`` by at least
    log M, and by no more than log(N M) less its value. The marginal KL is too low by as much, and
    with it the total correlation.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        data: the data that q_agg is over: the training set, as a rule. What
            :func:`pyro_vae.fit` takes.
        num_particles: draws of z for each datum.
        batch_size: data points at a time; for the minibatch estimators, M or a little more.
        estimator: of q_agg: "exact", from all pairs; or "stratified" or "weighted", from random
            minibatches of the data, which are then read into memory.
        vectorize_particles: draw many particles in one run; see :func:`pyro_vae.terms`.
        seed: fixes the draws and leaves the process's random numbers as they were.
        progress: show a bar; or a rich Progress to add one to.
        description: text before the bar.

    Returns:
        The :class:`Surgery`.

    Raises:
        ValueError: bad data or arguments, or a pair that breaks the contract; a minibatch
            estimator has minibatches of one datum; a site is global or scaled; the guide has
            auxiliary sites, so that its density is an integral, or masks that differ from datum to
            datum.

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
    check_estimator(estimator)
    batches = Minibatches(data, batch_size, device=programs.device_of(model, guide))
    steps = batches.num_data and batches.num_data * (1 + num_particles)
    draws = Draws()
    with (
        estimating(
            "elbo_surgery",
            model,
            guide,
            batches,
            vectorize_particles=vectorize_particles,
            seed=seed,
        ) as plate_nesting,
        task(progress, description, steps, transient=True) as advance,
    ):
        first = batches.first()
        gaussian = DiagonalGaussians.describe(guide, first)
        refuse_masks(guide, first)
        how = {"plate_nesting": plate_nesting, "vectorize_particles": vectorize_particles}
        run = partial(terms, model, guide, num_particles=num_particles, **how)
        if estimator == "exact":
            for batch in batches:
                draws.add(run(*batch), DiagonalGaussians.read(guide, batch) if gaussian else None)
                advance(batch[0].shape[0])
            information = _information(guide, batches, draws, how, advance)
        else:
            parts, columns = [], batches.in_memory()
            for batch in random_subsets(columns, batch_size):
                draws.add(run(*batch), DiagonalGaussians.read(guide, batch) if gaussian else None)
                pairs = _pairs(guide, batch, draws, how)
                parts.append(subset_information(pairs, len(columns[0]), estimator))
                advance(batch[0].shape[0] * (1 + num_particles))
            information = torch.cat(parts)
        advance(0, "dimensions")
        of_dimensions = _dimension_wise_kl(model, guide, first, draws)
    rate = torch.cat(draws.rate)
    information = _control(information, rate - torch.cat(draws.sampled_rate))
    log_likelihood = torch.cat(draws.log_likelihood)
    per_datum = {
        "elbo": log_likelihood - rate,
        "distortion": -log_likelihood,
        "rate": rate,
        "mutual_information": information,
        "marginal_kl": rate - information,
    }
    if of_dimensions is not None:
        per_datum["total_correlation"] = rate - information - of_dimensions
        per_datum["dimension_wise_kl"] = of_dimensions
    return Surgery(
        **{name: values.mean().item() for name, values in per_datum.items()},
        log_n=math.log(len(information)),
        standard_errors={name: standard_error(values) for name, values in per_datum.items()},
        kl_of_sites=averages(draws.kl_of_sites, lambda total: total.item()),
        kl_of_dimensions=averages(
            draws.kl_of_dimensions, lambda total: tuple(total.flatten().tolist())
        ),
        estimator=estimator,
    )


def _information(
    guide: Program, batches: Minibatches, draws: Draws, how: dict, advance: Callable
) -> Tensor:
    """Return log q(z|x_n) - log q_agg(z) over all pairs, shape (N,)."""
    if draws.posteriors:
        q = DiagonalGaussians.concatenate(draws.posteriors)
        return gaussian_information(q, torch.cat(draws.codes, dim=1), advance)
    log_guide = torch.cat(draws.log_guide, dim=1)
    return scored_information(guide, batches, draws.codes, log_guide, **how, advance=advance)


def _pairs(guide: Program, batch: Batch, draws: Draws, how: dict) -> Tensor:
    """Score the last minibatch's codes under its own data, (K, M, M)."""
    codes = draws.codes[-1]
    if draws.posteriors:
        q = draws.posteriors[-1]
        return log_densities(q.loc, q.scale, codes)
    rows = {name: value.flatten(0, 1) for name, value in codes.items()}
    shape = draws.log_guide[-1].shape
    return guide_log_prob(guide, batch, rows, **how).reshape(*shape, -1)


def _dimension_wise_kl(model: Program, guide: Program, batch: Batch, draws: Draws) -> Tensor | None:
    """Return what each datum adds to the dimension-wise KL, (N,), where dimensions make sense."""
    if not draws.posteriors:
        return None
    q = DiagonalGaussians.concatenate(draws.posteriors)
    log_prior = independent_prior(model, guide, batch) if q.real and len(q.sites) == 1 else None
    if log_prior is None or (parts := dimension_wise_kl(q, log_prior)) is None:
        return None
    return parts.sum(1)


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
