"""Data and latents that a model draws together: exact draws from its posterior."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.runs import trace_of
from pyro_vae._programs.sites import Unobserve, data_frame, random_sites, to_particle_layout
from pyro_vae.datasets._minibatches import Batch


def simulate(model: Program, batch: Batch) -> tuple[Batch, dict[str, Tensor]]:
    """Let a model draw data and latents together, for each row of a minibatch.

    Returns:
        The arguments with what the model drew in place of what it observes; and the latents, each
        ``(1, B, *inner plates, *event)``.

    Raises:
        ValueError: the model observes something else than its arguments, or parts of them; or it
            uses what it observes for more than that.
    """
    batch = tuple(column.contiguous() for column in batch)
    trace = trace_of(Unobserve()(model), *batch)
    arguments, latents = tuple(column.clone() for column in batch), {}
    for site in random_sites(trace):
        if not site["infer"].get("was_observed", False):
            if data_frame(site) is not None:
                latents[site["name"]] = to_particle_layout(site["value"], site, None)
            continue
        if isinstance(site["fn"], Unit):
            raise ValueError(  # noqa: TRY004 - of the model, not of an argument
                f"the model has the factor {site['name']!r}: it is no density that data could be "
                "drawn from, so that there are no simulated data to bound log p(x) on"
            )
        places = [
            view
            for given, simulated in zip(batch, arguments, strict=True)
            if (view := _same_view(site["infer"]["obs"], given, simulated)) is not None
        ]
        if not places:
            raise ValueError(
                f"the model is to see what it draws at site {site['name']!r}, but that site "
                "observes no argument of the program as it is, nor a part of one: let it observe "
                "x itself"
            )
        for place in places:
            place.copy_(site["value"].expand(place.shape))
    _check_joint(model, trace, arguments)
    return arguments, latents


def _same_view(observation: Any, given: Tensor, other: Tensor) -> Tensor | None:
    """Return the part of another tensor that an observation is of the given one.

    Args:
        observation: what a site observes.
        given: an argument of the program, contiguous.
        other: a tensor of its shape, contiguous.

    Returns:
        A view; None if the observation is none of the given tensor, or repeats some of it.
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
    """Refuse a model that gives what it drew another density once it sees it.

    Raises:
        ValueError: it does, at some site.
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
                f"what the model drew has another density at site {site['name']!r} once the model "
                "is given it, so that its latents are no draws from the posterior: the model uses "
                "x for more than to observe it (an autoregressive decoder, a prior that depends on "
                "x), or two of its sites observe the same. There is no sandwich of such a model"
            )
