"""What one site of a trace says: its plates, its scale, its density, its support."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta, MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Independent, constraints
from torch.distributions.constraints import Constraint

from pyro_vae.distributions._kl_divergences import known_kl

Site = dict[str, Any]  # a node of pyro.poutine.Trace

DATA_PLATE = "data"
PARTICLE_PLATE = "_particles"

# Marks in the ``infer`` of a guide's site.
JOINT_DENSITY = "_joint_density"  # a factor: the density of several latents
ROWS_WERE_DRAWN = "_rows_were_drawn"  # a plate: a random subsample
ON_SUPPORT = "_on_support"  # a latent: the bijection from which all draws are in the support


def random_sites(trace: poutine.Trace) -> Iterator[Site]:
    """Yield the sites that have a density: neither a plate's subsample nor pyro.deterministic."""
    for site in trace.nodes.values():
        if (
            site["type"] == "sample"
            and not site_is_subsample(site)
            and not site["infer"].get("_deterministic")
        ):
            yield site


class Unobserve(UnconditionMessenger):
    """Takes a model's observations away; pyro.deterministic sites, which are none, stay."""

    def _pyro_sample(self, msg: Site) -> None:
        if not (msg["infer"] or {}).get("_deterministic"):
            super()._pyro_sample(msg)


def is_loss_of_guide(site: Site) -> bool:
    """Tell whether a guide's site is no part of log q, but a loss that training adds.

    A ``pyro.factor`` is one, and an observed auxiliary site, such as a classifier's likelihood.
    """
    return site["is_observed"] and not site["infer"].get(JOINT_DENSITY)


def mask_of(site: Site) -> bool | Tensor | None:
    """Return the mask of a site: that of ``poutine.mask`` and of ``Distribution.mask`` together.

    Returns:
        None if the site is not masked; False, or a tensor over its batch and event dimensions,
        those of the event of size 1 where the mask is for whole events.
    """
    fn, total = site["fn"], True
    masks = [(site["mask"], fn.event_dim)]
    while isinstance(fn, Independent | MaskedDistribution):
        masks.append((getattr(fn, "_mask", None), fn.event_dim))
        fn = fn.base_dist
    for mask, event_dim in masks:
        if mask is False:
            return False
        if isinstance(mask, Tensor):
            mask = mask[(..., *(None,) * event_dim)]
            total = mask if total is True else total & mask
    return None if total is True else total


def mask_of_events(site: Site) -> bool | Tensor | None:
    """Return :func:`mask_of` over the batch dimensions: an event counts if all of it does."""
    mask = mask_of(site)
    event_dim = site["fn"].event_dim
    if not isinstance(mask, Tensor) or not event_dim:
        return mask
    return mask.flatten(-event_dim).all(-1)


def data_frame(site: Site) -> CondIndepStackFrame | None:
    """Return the frame of the plate ``"data"`` at a site, or None if the site stands outside."""
    for frame in site["cond_indep_stack"]:
        if frame.name == DATA_PLATE and frame.vectorized:
            return frame
    return None


def own_scale(site: Site) -> float | Tensor:
    """Return a site's scale less that of the plate ``"data"``, which no per-datum term may hold."""
    frame = data_frame(site)
    if frame is None or not frame.full_size or frame.full_size == frame.size:
        return site["scale"]
    scale = site["scale"] * frame.size / frame.full_size
    rounding = not isinstance(scale, Tensor) and abs(scale - 1.0) < 1e-12
    return 1.0 if rounding else scale


def reduce_to_datum(
    log_prob: Tensor,
    site: Site,
    batch_size: int,
    particle_dim: int | None,
    num_particles: int,
) -> Tensor:
    """Sum a site's log-densities over every batch dimension but the particles' and the data's.

    Args:
        log_prob: of the site's batch shape.
        site: where it was taken.
        batch_size: B, of the plate ``"data"``.
        particle_dim: the particles' dimension, None without one.
        num_particles: K.

    Returns:
        Shape (K, B), or (K,) outside the plate ``"data"``.

    Raises:
        ValueError: a batch dimension of the site is no plate's: it could hold anything, such as
            particles that a program moved by summing over a plate without ``keepdim=True``.
    """
    frame = data_frame(site)
    if frame is not None and frame.dim == -1:  # nothing but particles and data, most often
        if particle_dim is None and log_prob.shape == (batch_size,):
            return log_prob.unsqueeze(0)
        if particle_dim == -2 and log_prob.shape == (num_particles, batch_size):
            return log_prob
    plates = {f.dim for f in site["cond_indep_stack"] if f.vectorized}
    for dim in range(-log_prob.dim(), 0):
        if log_prob.shape[dim] > 1 and dim not in plates:
            raise ValueError(
                f"site {site['name']!r} has batch shape {tuple(log_prob.shape)}, but no plate at "
                f"its dimension {dim}. Declare dimensions of the event with .to_event(n); put "
                "other ones into a plate; and keep those of plates that you sum over "
                "(keepdim=True)."
            )
    kept, sizes = [], [num_particles]
    if particle_dim is not None:
        kept.append(particle_dim)
    if frame is not None:
        kept.append(frame.dim)
        sizes.append(batch_size)
    missing = max((-dim for dim in kept), default=0) - log_prob.dim()
    log_prob = log_prob.reshape((1,) * missing + tuple(log_prob.shape))
    summed = [dim for dim in range(-log_prob.dim(), 0) if dim not in kept]
    if summed:
        log_prob = log_prob.sum(summed)
    pairs = zip(reversed(log_prob.shape), reversed(sizes), strict=False)
    if any(size not in (1, wanted) for size, wanted in pairs):
        raise ValueError(
            f"site {site['name']!r} has batch shape {tuple(log_prob.shape)}, but its plates are of "
            f"{sizes}: is x of the shape that the programs expect?"
        )
    return log_prob.expand(sizes)


def to_particle_layout(values: Tensor, site: Site, particle_dim: int | None) -> Tensor:
    """Return what a site has for each number of its value, with the dimensions in order.

    Args:
        values: of the shape of the site's value, or one that expands to it.
        site: in the plate ``"data"``.
        particle_dim: the particles' dimension, None without one.

    Returns:
        Shape ``(K, B, *inner plates, *event)``.
    """
    fn = site["fn"]
    values = values.expand(fn.batch_shape + fn.event_shape)
    batch_dims = range(-len(fn.batch_shape), 0)
    plates = [frame.dim for frame in site["cond_indep_stack"] if frame.vectorized]
    kept = [dim for dim in batch_dims if dim in plates]
    values = values.squeeze([dim - fn.event_dim for dim in batch_dims if dim not in plates])
    data_axis = kept.index(data_frame(site).dim)
    if particle_dim is None:
        values, data_axis = values.unsqueeze(0), data_axis + 1
    return values.movedim(data_axis, 1)


def placed(
    values: Tensor, site: Site, particle_dim: int | None, width: int | None = None
) -> Tensor:
    """Lay values (..., K, B) out as the batch dimensions of a site in the plate ``"data"`` are.

    Args:
        values: for each particle and data point; dimensions before these two come out first.
        site: gives the place of the data.
        particle_dim: the particles' dimension, None without one.
        width: how many batch dimensions there shall be, as few as hold the values by default.
    """
    *outer, num_particles, batch_size = values.shape
    data_dim = data_frame(site).dim
    shape = [1] * (width or -min(data_dim, particle_dim or -1))
    shape[data_dim] = batch_size
    if particle_dim is not None:
        shape[particle_dim] = num_particles
    return values.reshape(*outer, *shape)


def observed_value(site: Site) -> Tensor:
    """Return the value that a site in the plate ``"data"`` observes, once for each data point.

    Args:
        site: its value may have further dimensions, of particles or of enumerated values, along
            which it repeats.

    Returns:
        Shape ``(B, *inner plates, *event)``.

    Raises:
        ValueError: the value differs from particle to particle, or among enumerated values.
    """
    event = tuple(site["fn"].event_shape)
    frames = [f for f in site["cond_indep_stack"] if f.vectorized and f.name != PARTICLE_PLATE]
    sizes = {frame.dim: frame.size for frame in frames}
    value = site["value"]
    value = value.reshape((1,) * (len(event) - min(sizes) - value.dim()) + tuple(value.shape))
    for dim in range(len(event) - value.dim(), 0):
        if dim not in sizes:
            first = value.narrow(dim - len(event), 0, 1)
            require_one_observation(site["name"], value, first)
            value = first
    value = value.squeeze(
        [dim - len(event) for dim in range(len(event) - value.dim(), 0) if dim not in sizes]
    )
    plates = sorted(sizes)
    value = value.expand(*(sizes[dim] for dim in plates), *event)
    return value.movedim(plates.index(data_frame(site).dim), 0)


def require_one_observation(name: str, value: Tensor, other: Tensor) -> None:
    """Refuse observations of a site that are not equal.

    Args:
        name: of the site.
        value: observed.
        other: observed too; it may repeat along a dimension.

    Raises:
        ValueError: they differ.
    """
    if not ((value == other) | (value.isnan() & other.isnan())).all():
        raise ValueError(
            f"site {name!r} observes values that differ from particle to particle, or among "
            "enumerated values, so there is no one value for each data point. Compute obs= from "
            "the data alone, or run the pair with one particle and without enumeration."
        )


def closed_form_kl(guide_site: Site, model_site: Site) -> Tensor | None:
    """Return KL(q || p) at a site, or None where no closed form gives what sampling estimates."""
    q, p = guide_site["fn"], model_site["fn"]
    if isinstance(base_distribution(q), Delta):
        return None  # Pyro's KL leaves out log_density, where an AutoGuide puts its Jacobian
    scale = own_scale(guide_site)
    if guide_site["mask"] is not model_site["mask"] or not _same(scale, own_scale(model_site)):
        return None  # scaled or masked on one side alone
    kl = known_kl(q, p)
    if kl is None or kl.shape != q.batch_shape:
        return None
    return scale_and_mask(kl, scale, guide_site["mask"])


def support_bounds(site: Site) -> tuple | None:
    """Return what tells a site's support from others of its kind; None if there is one alone."""
    support = site["fn"].support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if any(support is known for known in vars(constraints).values()):
        return None
    return _bounds(support)


def _bounds(thing: Any) -> Any:
    """Return numbers and tensors of a constraint, however nested."""
    if isinstance(thing, Constraint):
        return type(thing), *((name, _bounds(value)) for name, value in vars(thing).items())
    if isinstance(thing, list | tuple):
        return tuple(map(_bounds, thing))
    return thing


def inside_support(site: Site, values: Tensor) -> Tensor | None:
    """Tell of each row of values whether a site's distribution supports it, shape (N,).

    Where the bounds have a row for each of the site's data, more values are taken as so many
    minibatches.

    Args:
        site: node of a trace.
        values: ``(N, *event)``; None is returned for values that do not fit the site's shape.
    """
    frame = data_frame(site)
    try:
        support = site["fn"].support
    except NotImplementedError:  # it states none
        return None
    try:
        inside = support.check(values)
    except (RuntimeError, ValueError):
        if frame is None or len(values) <= frame.size:
            return None
        missing = -len(values) % frame.size
        filled = torch.cat([values, values[:missing]]).split(frame.size)
        try:
            inside = torch.cat([support.check(part) for part in filled])[: len(values)]
        except (RuntimeError, ValueError):
            return None
    return inside.flatten(1).all(1) if inside.dim() > 1 else inside


def values_outside_support(
    site: Site, values: Tensor, considered: Tensor | None = None
) -> str | None:
    """Say which values a site's distribution does not support; None if it supports them all.

    Args:
        site: node of a trace.
        values: ``(N, *event)``; nothing is said of values that do not fit the site's shape.
        considered: of which rows to say it, of all if not given.
    """
    inside = inside_support(site, values)
    if inside is None:
        return None
    if considered is not None and inside.shape == considered.shape:
        inside = inside | ~considered
    if inside.all():
        return None
    row = (~inside).nonzero()[0].item()
    each = support = site["fn"].support
    while isinstance(each, constraints.independent):
        each = each.base_constraint
    if any(isinstance(bound, Tensor) and bound.numel() > 1 for bound in vars(each).values()):
        return (
            f"a value outside the support of site {site['name']!r}, whose bounds the program "
            f"computes, first in row {row}: where they depend on latents, let these keep to what "
            "the data allow, or choose another distribution"
        )
    low, high = values[row].min().item(), values[row].max().item()
    return (
        f"values outside the support of site {site['name']!r}, {support}, first in row {row}, "
        f"where they lie in [{low:g}, {high:g}]: binarise or rescale them, or choose another "
        "distribution"
    )


def cannot_score(site: Site, error: Exception) -> str:
    """Say that the distribution of a site cannot score a value that it did not draw itself."""
    each = base_distribution(site["fn"])
    parts = [type(part).__name__ for part in (each, *getattr(each, "transforms", ()))]
    return (
        f"site {site['name']!r} has the distribution {' of '.join(parts)}, which cannot score a "
        f"value that it did not draw itself: {type(error).__name__} {error}. Take a distribution "
        "with a log_prob; in place of a flow without an inverse, one of pyro_vae.flows"
    )


def is_discrete(distribution: Any) -> bool:
    """Tell whether a distribution states a discrete support."""
    with contextlib.suppress(NotImplementedError):
        return distribution.support.is_discrete
    return False


def is_real(constraint: Constraint) -> bool:
    """Tell whether a support is of all real numbers, or vectors of them."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint in (constraints.real, constraints.real_vector)


def base_distribution(distribution: Any) -> Any:
    """Return what a distribution calls independent dimensions of, itself if nothing."""
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    return distribution


def _same(a: float | Tensor, b: float | Tensor) -> bool:
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b)
