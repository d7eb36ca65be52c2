"""The density of a guide at given latents, which it did not sample itself."""

from __future__ import annotations

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.particles import Vectorize
from pyro_vae._programs.runs import as_guide, trace_of
from pyro_vae._programs.sites import (
    PARTICLE_PLATE,
    data_frame,
    is_loss_of_guide,
    own_scale,
    random_sites,
    sum_to_data_points,
    without_plate,
)

_ROUNDING = 0.01  # an absolute (nats) and relative tolerance


def guide_log_prob(
    guide: Program,
    args: tuple,
    values: dict[str, Tensor],
    *,
    plate_nesting: int,
    vectorize_particles: Vectorize = True,
) -> Tensor:
    """Score given values under the guide: log q(z_m|x_b) for all M values and B data points.

    Args:
        guide: program of q(z|x).
        args: a minibatch x of B rows, and covariates.
        values: values by latent site, each ``(M, *inner plates, *event)``.
        plate_nesting: the number of batch dimensions that the guide uses.
        vectorize_particles: True scores all values in one run. Otherwise the guide runs M times.

    Returns:
        Shape (M, B), in nats.

    Raises:
        ValueError: The guide has auxiliary sites, or cannot score a value that it did not sample.
    """
    if vectorize_particles is True:
        return _score(guide, args, values, plate_nesting, vectorize_particles=True)
    count = len(next(iter(values.values())))
    rows = [{name: value[m : m + 1] for name, value in values.items()} for m in range(count)]
    return torch.cat(
        [_score(guide, args, row, plate_nesting, vectorize_particles=False) for row in rows]
    )


def _score(guide, args, values, plate_nesting, *, vectorize_particles: bool) -> Tensor:
    sites = {s["name"]: s for s in random_sites(trace_of(as_guide(guide), *args))}
    num_values = len(next(iter(values.values())))
    given = {}
    for name, value in values.items():
        site = sites[name]
        event = value.shape[value.dim() - site["fn"].event_dim :]
        sizes = {frame.dim: frame.size for frame in site["cond_indep_stack"] if frame.vectorized}
        sizes |= without_plate(site)
        axis, batch_size = data_frame(site).dim, sizes.pop(data_frame(site).dim)
        batch = [sizes.get(dim, 1) for dim in range(-plate_nesting, 0)]
        value = value.reshape(num_values, *batch, *event)
        batch[axis] = batch_size
        given[name] = value.expand(num_values, *batch, *event)
        if not vectorize_particles:
            given[name] = given[name].reshape(sites[name]["value"].shape)
    return log_prob_given(
        guide, args, given, num_values if vectorize_particles else None, plate_nesting
    )


def require_one_density(drawn: Tensor, scored: Tensor) -> None:
    """Raise ValueError if a second run of the guide scores its own samples differently.

    Args:
        drawn: log q(z_b|x_b) from the run that sampled z_b.
        scored: log q(z_b|x_b) from another run of the guide on x_b, at the given z_b.

    Raises:
        ValueError: They differ by more than the rounding error of an inverse.
    """
    difference = (drawn.double() - scored.double()).abs().mean()
    if not difference <= _ROUNDING * (1 + drawn.double().abs().mean()):
        raise ValueError(
            "the guide's density at its own samples differs from run to run, by "
            f"{difference.item():.3g} nats on average, so it has no aggregated posterior. The "
            "guide may refine itself by random steps, or sample noise outside of sites. Fix this "
            "noise, or pass the guide that it refines"
        )


def log_prob_given(
    guide: Program,
    args: tuple,
    given: dict[str, Tensor],
    num_particles: int | None,
    plate_nesting: int,
) -> Tensor:
    """Score values in the layout of the guide's sites, and return log q, shape (K, B).

    Args:
        guide: program of q(z|x).
        args: a minibatch x of B rows, and covariates.
        given: a value for each latent of the guide.
        num_particles: K, the size of an outer plate. None for one value without such a plate.
        plate_nesting: the number of batch dimensions that the guide uses.

    Raises:
        ValueError: The guide has auxiliary sites, or cannot score a value that it did not sample.
    """
    conditioned, particle_dim = poutine.condition(as_guide(guide), data=given), None
    if num_particles is not None:
        particle_dim = -1 - plate_nesting
        conditioned = pyro.plate(PARTICLE_PLATE, num_particles, dim=particle_dim)(conditioned)
    total = None
    for site in random_sites(trace_of(conditioned, *args)):
        if is_loss_of_guide(site) and site["name"] not in given:
            continue
        if not site["is_observed"]:
            raise ValueError(
                f"the guide has the auxiliary site {site['name']!r}, so its density at given "
                "latents is an unknown integral over that site. Use a guide without such sites"
            )
        try:
            log_prob = site["fn"].log_prob(site["value"])
        except (KeyError, NotImplementedError) as error:
            raise ValueError(
                f"guide site {site['name']!r} cannot be scored at a value that it did not sample: "
                f"{site['fn']} has no inverse. Use a distribution that can score any value"
            ) from error
        log_prob = scale_and_mask(log_prob, own_scale(site), site["mask"])
        batch_size = data_frame(site).size
        log_prob = sum_to_data_points(log_prob, site, batch_size, particle_dim, num_particles or 1)
        total = log_prob if total is None else total + log_prob
    return total
