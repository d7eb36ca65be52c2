"""What one site of a trace says: its plates, its scale, its density, its support."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Independent, constraints, kl_divergence
from torch.distributions.constraints import Constraint

Site = dict[str, Any]  # a node of pyro.poutine.Trace

DATA_PLATE = "data"
PARTICLE_PLATE = "_particles"


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


def arranged(values: Tensor, site: Site, particle_dim: int | None) -> Tensor:
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


def closed_form_kl(guide_site: Site, model_site: Site) -> Tensor | None:
    """Return KL(q || p) at a site, or None where no closed form gives what sampling estimates."""
    q, p = guide_site["fn"], model_site["fn"]
    if isinstance(base_distribution(q), Delta):
        return None  # Pyro's KL leaves out log_density, where an AutoGuide puts its Jacobian
    scale = own_scale(guide_site)
    if guide_site["mask"] is not model_site["mask"] or not _same(scale, own_scale(model_site)):
        return None  # scaled or masked on one side alone
    with contextlib.suppress(NotImplementedError):
        kl = kl_divergence(q, p)
        if kl.shape == q.batch_shape:
            return scale_and_mask(kl, scale, guide_site["mask"])
    return None


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
    support, frame = site["fn"].support, data_frame(site)
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
    support, inside = site["fn"].support, inside_support(site, values)
    if inside is None:
        return None
    if considered is not None and inside.shape == considered.shape:
        inside = inside | ~considered
    if inside.all():
        return None
    row = (~inside).nonzero()[0].item()
    each = support
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
