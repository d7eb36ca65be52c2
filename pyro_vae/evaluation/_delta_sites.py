"""Score a model at given latents, such as samples of its prior or states of a sampler."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae._programs.enumeration import is_enumerated
from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.particles import Vectorize
from pyro_vae._programs.runs import as_guide, plate_of_guide, replay, trace_of
from pyro_vae._programs.sites import (
    DATA_PLATE,
    PARTICLE_PLATE,
    Site,
    data_frame,
    mask_of,
    mask_of_events,
    random_sites,
)
from pyro_vae._programs.terms import Terms, terms


def prior_sites(
    model: Program, batch: tuple[Tensor, ...], num_particles: int, plate_nesting: int
) -> dict[str, Site]:
    """Run a model without a guide and return its latents in the plate ``"data"``.

    Enumerated latents are sampled but not returned. So the other latents have their marginal
    distribution.

    Args:
        model: program of p(x, z).
        batch: a minibatch x of B rows, and covariates.
        num_particles: K, the size of an outer plate. With K = 1 there is no outer plate.
        plate_nesting: number of batch dimensions of the program, without that of the particles.
    """
    if num_particles > 1:
        model = pyro.plate(PARTICLE_PLATE, num_particles, dim=-1 - plate_nesting)(model)
    return {
        site["name"]: site
        for site in random_sites(trace_of(model, *batch))
        if not site["is_observed"] and data_frame(site) is not None and not is_enumerated(site)
    }


def point(name: str, value: Tensor, event_dim: int) -> None:
    """Fix a latent site at a value, with a density of one."""
    pyro.sample(name, dist.Delta(value, event_dim=event_dim))


def log_likelihood_at_prior_draws(
    model: Program,
    *batch: Tensor,
    num_particles: int,
    plate_nesting: int,
    vectorize_particles: Vectorize = True,
) -> Tensor:
    r"""Return :math:`\log p(x_b|z_{kb})` for :math:`z_{kb} \sim p(z)`, shape (K, B).

    Args:
        model: program of p(x, z).
        *batch: a minibatch x of B rows, and covariates.
        num_particles: K.
        plate_nesting: number of batch dimensions of the program, without that of the particles.
        vectorize_particles: True draws all particles in one run. Otherwise the model runs K times.
    """

    def draw(count: int) -> Terms:
        sites = prior_sites(model, batch, count, plate_nesting)
        guide = guide_to(sites)
        layout = {"plate_nesting": plate_nesting, "vectorize_particles": True}
        return terms(model, guide, *batch, num_particles=count, **layout)

    if vectorize_particles is True:
        return draw(num_particles).log_likelihood
    return torch.cat([draw(1).log_likelihood for _ in range(num_particles)])


def has_one_prior(model: Program, guide: Program, batch: tuple[Tensor, ...]) -> bool:
    """Return whether all data points of a minibatch have the same prior p(z).

    They do not if the prior depends on covariates or on x. The prior is evaluated at the same z for
    all data points.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x). Its sample for the first data point is the z.
        batch: a minibatch.
    """
    guide_trace = trace_of(as_guide(guide), *batch)
    model_trace = trace_of(replay(model, guide_trace), *batch)
    alike = {}
    for site in random_sites(model_trace):
        name, frame = site["name"], data_frame(site)
        if site["is_observed"] or frame is None or name not in guide_trace:
            continue
        value = site["value"]
        value = value.expand(site["fn"].batch_shape + site["fn"].event_shape)
        axis = frame.dim - site["fn"].event_dim
        alike[name] = {**site, "value": value.narrow(axis, 0, 1).expand_as(value)}
    log_prior = terms(model, guide_to(alike), *batch).log_prior[0]
    return torch.allclose(log_prior, log_prior[:1], rtol=1e-4, atol=1e-4, equal_nan=True)


def prior_guide(model: Program) -> Program:
    """Return a guide that samples the latents from the prior: the model without its observations.

    Use it to check a model without a guide. Enumerated latents are sampled, but are not sites.
    """

    def is_hidden(msg: Site) -> bool:
        return msg["type"] != "sample" or msg["is_observed"] or is_enumerated(msg)

    return poutine.block(model, hide_fn=is_hidden)


def guide_to(sites: Mapping[str, Site]) -> Program:
    """Return a guide that fixes the latents at the values of a model's sites."""

    def guide(*batch: Tensor) -> None:
        for name, site in inside_all(sites, batch[0]):
            if (mask := mask_in_events(site)) is None:
                point(name, site["value"], site["fn"].event_dim)
            else:
                each = dist.Delta(site["value"]).mask(mask)
                pyro.sample(name, each.to_event(site["fn"].event_dim))

    return guide


def mask_in_events(site: Site) -> Tensor | None:
    """Return the mask of a site if it differs between elements of an event, or None."""
    mask = mask_of(site)
    if not isinstance(mask, Tensor):
        return None
    sizes = mask.shape[mask.dim() - site["fn"].event_dim :]
    return mask if any(size > 1 for size in sizes) else None


def inside_all(sites: Mapping[str, Site], x: Tensor) -> Iterator[tuple[str, Site]]:
    """Yield the sites of a model, each inside its plates and its mask of whole events."""
    plates: dict[str, contextlib.AbstractContextManager] = {}
    for name, site in sites.items():
        with contextlib.ExitStack() as stack:
            for frame in site["cond_indep_stack"]:
                if not frame.vectorized or frame.name == PARTICLE_PLATE:
                    continue
                if frame.name not in plates:
                    size = len(x) if frame.name == DATA_PLATE else frame.size
                    full_size = None if frame.size == frame.full_size else frame.full_size
                    plates[frame.name] = plate_of_guide(frame.name, size, frame.dim, full_size)
                stack.enter_context(plates[frame.name])
            mask = mask_of_events(site)
            if mask is not None and mask_in_events(site) is None:
                stack.enter_context(poutine.mask(mask=mask))
            yield name, site
