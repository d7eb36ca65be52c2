"""Give latents a density of zero where a guide draws them outside the model's support.

A Gaussian guide for an exponential prior draws negative numbers at times. Such a draw has the
importance weight zero. Formulas for a density hold inside of the support alone: outside, that of
the exponential distribution gives a positive number, and others give NaN.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import VonMises, biject_to
from torch.distributions.constraints import Constraint

from pyro_vae.circular import circle
from pyro_vae.sites import ON_SUPPORT, Site, base_distribution, is_real


def support_to_check(model_site: Site, guide_site: Site) -> Constraint | None:
    """Return the support of a latent, or None if its guide cannot leave it.

    Args:
        model_site: of the latent.
        guide_site: that draws it.
    """
    if guide_site["infer"].get(ON_SUPPORT):
        return None
    fn, base = model_site["fn"], base_distribution(model_site["fn"])
    if isinstance(base, VonMises):  # which states the real line
        return circle
    try:
        support = fn.support
        if is_real(support) or support.is_discrete or base_distribution(guide_site["fn"]) is base:
            return None
        biject_to(support)
    except NotImplementedError:
        return None
    return support


def log_prob_on(support: Constraint, fn: Any, value: Tensor) -> Tensor:
    r"""Score a value, with :math:`-\infty` outside of a support.

    Args:
        support: of the distribution; of each number by itself, or of its events.
        fn: the distribution.
        value: of its batch and event shape.
    """
    inside = support.check(value)
    while inside.dim() > value.dim() - len(fn.event_shape):
        inside = inside.all(-1)
    bijection = biject_to(support)
    some = bijection(value.new_zeros(bijection.inverse_shape(value.shape)))
    whole = inside[(..., *(None,) * len(fn.event_shape))]
    return torch.where(inside, fn.log_prob(torch.where(whole, value, some)), -math.inf)
