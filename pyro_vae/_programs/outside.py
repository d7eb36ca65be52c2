"""Give latents zero density where a guide samples them outside the model's support.

A Gaussian guide for an exponential prior sometimes samples negative numbers. Such a sample has
importance weight zero. The formula of a density is only valid inside the support. Outside, the
exponential distribution's formula gives a positive number, and others give NaN.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    TransformedDistribution,
    biject_to,
    constraints,
)
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import Transform

from pyro_vae._programs.sites import ON_SUPPORT, Site, is_real, mask_of
from pyro_vae.distributions._supports import states_too_wide, support_of


def support_to_check(model_site: Site, guide_site: Site) -> Constraint | None:
    """Return the support of a latent, or None if its guide cannot sample outside the support.

    Args:
        model_site: the latent in the model.
        guide_site: the site of the guide that samples it.
    """
    fn = model_site["fn"]
    if guide_site["infer"].keys() & {ON_SUPPORT, "_enumerate_dim"}:
        return None
    try:
        support = _support(fn)
        if is_real(support) or _any_value(support, fn, model_site["value"]) is None:
            return None
    except (NotImplementedError, ValueError):  # no declared support, and none can be derived
        return None
    return support


def require_same_support(site: Site, guide_site: Site) -> None:
    """Raise ValueError if a latent's support is not the one that its guide was made for.

    Only guides of the library are checked, and only while torch validates distributions.

    Raises:
        ValueError: The supports differ.
    """
    bijection: Transform | None = guide_site["infer"].get(ON_SUPPORT)
    if bijection is None or not Distribution._validate_args:
        return
    value = site["value"].detach()
    try:
        support = support_of(site["fn"])
        if is_real(support):
            return
        there = biject_to(support)(bijection.inv(value))
    except (NotImplementedError, ValueError, RuntimeError):
        return
    if there.shape == value.shape and not torch.allclose(there, value, 1e-3, 1e-4, equal_nan=True):
        raise ValueError(
            f"latent site {site['name']!r} has another support, {support}, than when its guide was "
            "made, but a guide keeps the support of its first minibatch. Scale the latent inside "
            "the model instead, or make a new guide for this model."
        )


def _support(fn: Any) -> Constraint:
    base = fn
    while isinstance(base, Independent | MaskedDistribution | ExpandedDistribution):
        base = base.base_dist
    if isinstance(base, TransformedDistribution) and is_real(_support(base.base_dist)):
        return fn.support  # a flow: do not inspect its parameters
    return support_of(fn) if states_too_wide(base) else fn.support


def log_prob_on(support: Constraint, site: Site) -> Tensor:
    r"""Score the value of a site, with :math:`-\infty` outside a support.

    Args:
        support: the support of the distribution, for single numbers or for whole events.
        site: the site to score; masked values may lie outside the support.
    """
    fn, value = site["fn"], site["value"]
    if (mask := mask_of(site)) is not None:
        some = _any_value(support, fn, value)
        value = torch.where(torch.as_tensor(mask, device=value.device), value, some)
    inside = support.check(value)
    while inside.dim() > value.dim() - len(fn.event_shape):
        inside = inside.all(-1)
    some = _any_value(support, fn, value)
    whole = inside[(..., *(None,) * len(fn.event_shape))]
    return torch.where(inside, fn.log_prob(torch.where(whole, value, some)), -math.inf)


def _any_value(support: Constraint, fn: Any, value: Tensor) -> Tensor | None:
    """Return values inside a support, in the shape of a value, or None if none are known."""
    while support.is_discrete and isinstance(support, constraints.independent):
        support = support.base_constraint
    if not support.is_discrete:
        bijection = biject_to(support)
        return bijection(value.new_zeros(bijection.inverse_shape(value.shape)))
    if support is constraints.boolean:
        return torch.zeros_like(value)
    lower = getattr(support, "lower_bound", None)
    return None if lower is None else torch.zeros_like(value) + lower
