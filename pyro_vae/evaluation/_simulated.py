"""Simulated data and latents: joint samples from a model, so exact posterior samples."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.runs import trace_of
from pyro_vae._programs.sites import (
    Unobserve,
    data_frame,
    is_factor,
    random_sites,
    to_particle_layout,
    was_observed,
)
from pyro_vae.datasets._minibatches import Batch


def simulate(model: Program, batch: Batch) -> tuple[Batch, dict[str, Tensor]]:
    """Sample data and latents jointly from a model, for each row of a minibatch.

    Returns:
        A copy of the arguments, with simulated values in the observed places. And the latents,
        each ``(1, B, *inner plates, *event)``.

    Raises:
        ValueError: The model observes a tensor that is neither an argument nor a view of one. Or
            the model uses x for more than observation.
    """
    batch = tuple(column.contiguous() for column in batch)
    trace = trace_of(Unobserve()(model), *batch)
    arguments, latents = tuple(column.clone() for column in batch), {}
    for site in random_sites(trace):
        if not was_observed(site):
            if data_frame(site) is not None:
                latents[site["name"]] = to_particle_layout(site["value"], site, None)
            continue
        if is_factor(site):
            raise ValueError(
                f"the model has the factor {site['name']!r}, which is not a density, so data "
                "cannot be simulated from the model. Remove the factor or use pv.evidence"
            )
        places = [
            view
            for given, simulated in zip(batch, arguments, strict=True)
            if (view := _same_view(site["infer"]["obs"], given, simulated)) is not None
        ]
        if not places:
            raise ValueError(
                "sandwich replaces the arguments of the model with simulated data, but site "
                f"{site['name']!r} does not observe an argument or a view of one. Let it observe "
                "x itself"
            )
        for place in places:
            value = site["value"]
            extra = max(0, value.dim() - place.dim())  # leading dimensions of size 1
            place.copy_(value.reshape(value.shape[extra:]).expand(place.shape))
    _check_joint(model, trace, arguments)
    return arguments, latents


def _same_view(observation: Any, given: Tensor, other: Tensor) -> Tensor | None:
    """Return the view of ``other`` that matches an observed view of ``given``.

    Args:
        observation: the observed value of a site.
        given: an argument of the program, contiguous.
        other: a contiguous tensor of the same shape.

    Returns:
        A view of ``other``. None if the observation is not a view of ``given``, or repeats some
        of its numbers.
    """
    if not isinstance(observation, Tensor) or observation.dtype != given.dtype:
        return None
    if observation.untyped_storage().data_ptr() != given.untyped_storage().data_ptr():
        return None
    shape, strides = observation.shape, observation.stride()
    if any(size > 1 and stride == 0 for size, stride in zip(shape, strides, strict=True)):
        return None
    first = observation.storage_offset() - given.storage_offset()
    last = first + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if first < 0 or last >= given.numel():
        return None
    return other.as_strided(shape, strides, other.storage_offset() + first)


def _check_joint(model: Program, drawn: poutine.Trace, arguments: Batch) -> None:
    """Raise ValueError if simulated values have another density once the model observes them.

    Raises:
        ValueError: The densities differ at a site.
    """
    seen = trace_of(poutine.replay(model, trace=drawn), *arguments)
    sites = {site["name"]: site for site in random_sites(seen)}
    for site in random_sites(drawn):
        before, after = (
            scale_and_mask(each["fn"].log_prob(each["value"]), mask=each["mask"])
            for each in (site, sites[site["name"]])
        )
        if not torch.allclose(before, after, rtol=1e-4, atol=1e-4, equal_nan=True):
            raise ValueError(
                f"simulated values have another density at site {site['name']!r} once the model "
                "observes them, so its latents are not samples from the posterior. Either the "
                "model uses x for more than observation (an autoregressive decoder, a prior that "
                "depends on x), or two sites observe the same numbers. Use pv.evidence instead"
            )
