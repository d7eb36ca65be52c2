"""Read a site of a trace: its plates, scale, mask, log-density and support."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta, MaskedDistribution, Unit
from pyro.distributions.util import scale_and_mask
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Independent, constraints
from torch.distributions.constraints import Constraint

from pyro_vae._utils.messages import first_line
from pyro_vae.distributions._kl_divergences import known_kl

Site = dict[str, Any]  # a node of pyro.poutine.Trace

DATA_PLATE = "data"
PARTICLE_PLATE = "_particles"

# Keys that mark a guide's site, in its ``infer``.
JOINT_DENSITY = "_joint_density"  # a factor: the joint density of several latents
ROWS_WERE_DRAWN = "_rows_were_drawn"  # a plate: a random subsample
WAS_GIVEN = "_was_given"  # a latent: a trial run has a given value instead of a sample
ON_SUPPORT = "_on_support"  # a latent: a bijection that keeps all samples inside the support


def random_sites(trace: poutine.Trace) -> Iterator[Site]:
    """Yield the sites with a density: no subsamples of plates and no deterministic sites."""
    for site in trace.nodes.values():
        if site["type"] == "sample" and not site_is_subsample(site) and not is_deterministic(site):
            yield site


def is_deterministic(site: Site) -> bool:
    """Return whether a site only records a value that the program computes.

    It is a ``pyro.deterministic`` site, or a site that ``poutine.reparam`` has replaced by a
    function of another one: an observed Delta that is masked out.
    """
    if (site["infer"] or {}).get("_deterministic"):
        return True
    fn = site["fn"]
    masked_out = isinstance(fn, MaskedDistribution) and fn._mask is False
    return site["is_observed"] and masked_out and isinstance(base_distribution(fn.base_dist), Delta)


class Unobserve(UnconditionMessenger):
    """Remove a model's observations, except at deterministic sites."""

    def _pyro_sample(self, msg: Any) -> None:
        if not is_deterministic(msg):
            super()._pyro_sample(msg)


def was_observed(site: Site) -> bool:
    """Return whether :class:`Unobserve` has removed the observation of a site."""
    return site["infer"].get("was_observed", False)


def is_factor(site: Site) -> bool:
    """Return whether a site is a ``pyro.factor``: a density without a value."""
    return isinstance(site["fn"], Unit)


def is_loss_of_guide(site: Site) -> bool:
    """Return whether a guide's site is a loss that training adds, and not part of log q.

    Such sites are a ``pyro.factor`` and an observed auxiliary site, such as a classifier's
    likelihood.
    """
    return site["is_observed"] and not site["infer"].get(JOINT_DENSITY)


def mask_of(site: Site) -> bool | Tensor | None:
    """Return the combined mask of a site, from ``poutine.mask`` and ``Distribution.mask``.

    Returns:
        None if the site is not masked, else False or a tensor. The tensor covers the batch and
        event dimensions; its event dimensions have size 1 where the mask is for whole events.
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


def is_scored(site: Site) -> Tensor:
    """Return :func:`mask_of` as a Boolean tensor. Without a mask, it is True."""
    mask = mask_of(site)
    return torch.as_tensor(True if mask is None else mask, device=site["value"].device)


def mask_of_events(site: Site) -> bool | Tensor | None:
    """Return :func:`mask_of` by batch dimensions: True for an event if all its elements are."""
    mask = mask_of(site)
    event_dim = site["fn"].event_dim
    if not isinstance(mask, Tensor) or not event_dim:
        return mask
    return mask.flatten(-event_dim).all(-1)


def data_frame(site: Site) -> CondIndepStackFrame | None:
    """Return the frame of the plate ``"data"`` at a site, or None if the site is outside it."""
    for frame in site["cond_indep_stack"]:
        if frame.name == DATA_PLATE and frame.vectorized:
            return frame
    return None


def without_plate(site: Site) -> dict[int, int]:
    """Return the sizes of a site's batch dimensions without a plate, right of the data's.

    Each data point has such values together, like those of an event.
    """
    shape, frame = site["fn"].batch_shape, data_frame(site)
    if frame is None or frame.dim == -1:
        return {}
    plates = {frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}
    dims = range(max(frame.dim + 1, -len(shape)), 0)
    return {dim: shape[dim] for dim in dims if dim not in plates and shape[dim] > 1}


def own_scale(site: Site) -> float | Tensor:
    """Return a site's scale without that of the plate ``"data"``."""
    frame = data_frame(site)
    if frame is None or not frame.full_size or frame.full_size == frame.size:
        return site["scale"]
    scale = site["scale"] * frame.size / frame.full_size
    rounding = not isinstance(scale, Tensor) and abs(scale - 1.0) < 1e-12
    return 1.0 if rounding else scale


def sum_to_data_points(
    log_prob: Tensor,
    site: Site,
    batch_size: int,
    particle_dim: int | None,
    num_particles: int,
) -> Tensor:
    """Sum a site's log-densities over all batch dimensions except the particles' and the data's.

    Args:
        log_prob: the log-density, of the site's batch shape.
        site: a site of the trace.
        batch_size: B, the size of the plate ``"data"``.
        particle_dim: the particles' dimension, or None without particles.
        num_particles: K.

    Returns:
        Shape (K, B), or (K,) for a site outside the plate ``"data"``.

    Raises:
        ValueError: A batch dimension of the site does not belong to a plate. It could hold
            particles or data points, moved there by a sum over a plate without ``keepdim=True``.
            Dimensions right of the data's are accepted, unless they have B elements.
    """
    frame = data_frame(site)
    if frame is not None and frame.dim == -1:  # usually there are only particles and data
        if particle_dim is None and log_prob.shape == (batch_size,):
            return log_prob.unsqueeze(0)
        if particle_dim == -2 and log_prob.shape == (num_particles, batch_size):
            return log_prob
    plates = {f.dim for f in site["cond_indep_stack"] if f.vectorized}
    for dim in range(-log_prob.dim(), 0):
        size = log_prob.shape[dim]
        if size == 1 or dim in plates:
            continue
        right = frame is not None and dim > frame.dim
        if right and size != batch_size:
            continue  # no sum moves particles or data points to a dimension of another size
        reason = (
            f" It has as many elements as the minibatch has rows, {size}, so it could hold data "
            "points. Another batch size also helps."
            if right
            else ""
        )
        raise ValueError(
            f"site {site['name']!r} has batch shape {tuple(log_prob.shape)}, but no plate at its "
            f"dimension {dim}. Declare event dimensions with .to_event(n), or by event_dim=n of a "
            "likelihood, and put other dimensions into a plate. Keep the dimensions of plates that "
            f"you sum over (keepdim=True).{reason}"
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
            f"site {site['name']!r} has batch shape {tuple(log_prob.shape)}, but its plates have "
            f"sizes {sizes}. Does x have the shape that the programs expect?"
        )
    return log_prob.expand(sizes)


def to_particle_layout(values: Tensor, site: Site, particle_dim: int | None) -> Tensor:
    """Return per-element values of a site with their dimensions in a fixed order.

    Args:
        values: a tensor that expands to the shape of the site's value.
        site: a site in the plate ``"data"``.
        particle_dim: the particles' dimension, or None without particles.

    Returns:
        Shape ``(K, B, *inner plates, *event)``.
    """
    fn = site["fn"]
    shape = fn.batch_shape + fn.event_shape
    # The distribution of the other program may have more dimensions on the left, of size one.
    values = values.squeeze(tuple(range(values.dim() - len(shape)))).expand(shape)
    batch_dims = range(-len(fn.batch_shape), 0)
    plates = [frame.dim for frame in site["cond_indep_stack"] if frame.vectorized]
    plates += without_plate(site)
    kept = [dim for dim in batch_dims if dim in plates]
    values = values.squeeze([dim - fn.event_dim for dim in batch_dims if dim not in plates])
    data_axis = kept.index(data_frame(site).dim)
    if particle_dim is None:
        values, data_axis = values.unsqueeze(0), data_axis + 1
    return values.movedim(data_axis, 1)


def from_data_layout(values: Tensor, site: Site) -> Tensor:
    """Return values in the layout of a site's own value, the inverse of :func:`to_particle_layout`.

    Args:
        values: ``(B, *inner plates, *event)``.
        site: a site in the plate ``"data"``, in a run without particles.
    """
    plates = [frame.dim for frame in site["cond_indep_stack"] if frame.vectorized]
    plates += without_plate(site)
    batch_dims = range(-len(site["fn"].batch_shape), 0)
    kept = [dim for dim in batch_dims if dim in plates]
    values = values.movedim(0, kept.index(data_frame(site).dim))
    for position, dim in enumerate(batch_dims):
        if dim not in plates:
            values = values.unsqueeze(position)
    return values


def placed(
    values: Tensor, site: Site, particle_dim: int | None, width: int | None = None
) -> Tensor:
    """Reshape values (..., K, B) to the batch dimensions of a site in the plate ``"data"``.

    Args:
        values: values for each particle and data point; any dimensions before these two are kept.
        site: a site that gives the dimension of the data.
        particle_dim: the particles' dimension, or None without particles.
        width: the number of batch dimensions; by default as few as possible.
    """
    *outer, num_particles, batch_size = values.shape
    data_dim = data_frame(site).dim
    shape = [1] * (width or -min(data_dim, particle_dim or -1))
    shape[data_dim] = batch_size
    if particle_dim is not None:
        shape[particle_dim] = num_particles
    return values.reshape(*outer, *shape)


def observed_value(site: Site) -> Tensor:
    """Return the observed value of a site in the plate ``"data"``, one for each data point.

    Args:
        site: an observed site. Along dimensions of particles and enumerated values, its value must
            repeat.

    Returns:
        Shape ``(B, *inner plates, *event)``.

    Raises:
        ValueError: The value differs between particles or between enumerated values.
    """

    def first(value: Tensor, dim: int) -> Tensor:
        one = value.narrow(dim, 0, 1)
        require_one_observation(site["name"], value, one)
        return one

    return _for_data_points(site, site["value"], first)


def masked_observations(site: Site) -> Tensor:
    """Return which numbers of an observed site in the plate ``"data"`` are masked.

    They are masked for all particles and all enumerated values.

    Returns:
        Shape ``(B, *inner plates, *event)``.
    """
    return ~_for_data_points(site, is_scored(site), lambda value, dim: value.any(dim, keepdim=True))


def _for_data_points(site: Site, value: Tensor, reduce: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Return values of a site as ``(B, *inner plates, *event)``.

    Args:
        site: a site in the plate ``"data"``.
        value: values that broadcast to those of the site.
        reduce: function of the values and a dimension of particles or enumerated values. It returns
            values of size 1 in that dimension.
    """
    event = tuple(site["fn"].event_shape)
    frames = [f for f in site["cond_indep_stack"] if f.vectorized and f.name != PARTICLE_PLATE]
    sizes = {frame.dim: frame.size for frame in frames} | without_plate(site)
    value = value.reshape((1,) * (len(event) - min(sizes) - value.dim()) + tuple(value.shape))
    for dim in range(len(event) - value.dim(), 0):
        if dim not in sizes:
            value = reduce(value, dim - len(event))
    value = value.squeeze(
        [dim - len(event) for dim in range(len(event) - value.dim(), 0) if dim not in sizes]
    )
    plates = sorted(sizes)
    value = value.expand(*(sizes[dim] for dim in plates), *event)
    return value.movedim(plates.index(data_frame(site).dim), 0)


def require_one_observation(name: str, value: Tensor, other: Tensor) -> None:
    """Raise ValueError if two observed values of a site differ.

    Args:
        name: the name of the site.
        value: an observed value.
        other: another observed value, which may broadcast.

    Raises:
        ValueError: The two values differ.
    """
    if not ((value == other) | (value.isnan() & other.isnan())).all():
        raise ValueError(
            f"site {name!r} observes values that differ from particle to particle, or among "
            "enumerated values: a data point needs one value. Compute obs= from the data alone, "
            "or run the pair with one particle and without enumeration."
        )


def refuse_mismatch(error: ValueError, x: Tensor) -> None:
    """Raise an error with advice if a site does not fit a plate of as many rows as x."""
    message = str(error)
    if "Shape mismatch inside plate" in message and f", {x.shape[0]} vs " in message:
        raise ValueError(
            f"{first_line(error)}, for data x of shape {tuple(x.shape)}. In the plate 'data' "
            f"the batch shape of a site must be ({x.shape[0]},). All other dimensions belong "
            "to the event: declare them with .to_event(n), or by event_dim=n of a likelihood."
        ) from error


def closed_form_kl(guide_site: Site, model_site: Site) -> Tensor | None:
    """Return KL(q || p) at a site, or None if no closed form matches the sampled estimate."""
    q, p = guide_site["fn"], model_site["fn"]
    if isinstance(base_distribution(q), Delta):
        return None  # Pyro's KL ignores log_density, where an AutoGuide puts its Jacobian
    scale = own_scale(guide_site)
    if guide_site["mask"] is not model_site["mask"] or not _same(scale, own_scale(model_site)):
        return None  # scaled or masked in one program only
    kl = known_kl(q, p)
    if kl is None or kl.shape != q.batch_shape:
        return None
    return scale_and_mask(kl, scale, guide_site["mask"])


def support_bounds(site: Site) -> tuple | None:
    """Return the bounds of a site's support, or None for torch's constraints without bounds."""
    support = site["fn"].support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if any(support is known for known in vars(constraints).values()):
        return None
    return _bounds(support)


def _bounds(thing: Any) -> Any:
    """Return the numbers and tensors of a constraint as nested tuples."""
    if isinstance(thing, Constraint):
        return type(thing), *((name, _bounds(value)) for name, value in vars(thing).items())
    if isinstance(thing, list | tuple):
        return tuple(map(_bounds, thing))
    return thing


def inside_support(site: Site, values: Tensor) -> Tensor | None:
    """Return whether each row of values is inside a site's support, shape (N,).

    If the bounds have one row per data point of the site, the values are split into minibatches
    of the site's size.

    Args:
        site: node of a trace.
        values: ``(N, *event)``. If they do not fit the site's shape, the result is None.
    """
    frame = data_frame(site)
    try:
        support = site["fn"].support
    except NotImplementedError:  # the distribution has no declared support
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


def rows_with_valid_parameters(site: Site, batch_size: int) -> Tensor:
    """Return in which rows the parameters of a site's distribution are valid, (B,).

    All rows are invalid if a shared parameter is, or if the rows of a parameter are unknown.

    Args:
        site: node of a trace.
        batch_size: B.
    """
    frame, base = data_frame(site), site["fn"]
    batch_shape = base.batch_shape
    while hasattr(base, "base_dist"):
        base = base.base_dist
    extra = len(base.batch_shape) - len(batch_shape)  # dimensions of events, on the right
    valid = torch.ones(batch_size, dtype=torch.bool, device=site["value"].device)
    for name, constraint in base.arg_constraints.items():
        parameter = vars(base).get(name)
        if not isinstance(parameter, Tensor) or constraints.is_dependent(constraint):
            continue
        each = constraint.check(parameter)
        if each.all():
            continue
        dim = None if frame is None or extra < 0 else frame.dim - extra
        if dim is None or each.dim() < -dim or each.shape[dim] != batch_size:
            return torch.zeros_like(valid)
        valid = valid & each.movedim(dim, 0).reshape(batch_size, -1).all(1)
    return valid


def values_outside_support(
    site: Site, values: Tensor, considered: Tensor | None = None, *, start: int = 0
) -> str | None:
    """Return a message about values outside a site's support, or None if all are inside.

    Args:
        site: node of a trace.
        values: ``(N, *event)``. If they do not fit the site's shape, the result is None.
        considered: a boolean mask of the rows to check; all rows by default.
        start: the number of rows before these in the data.
    """
    inside = inside_support(site, values)
    if inside is None:
        return None
    if considered is not None and inside.shape == considered.shape:
        inside = inside | ~considered
    if inside.all():
        return None
    row = (~inside).nonzero()[0].item()
    low, high = values[row].min().item(), values[row].max().item()
    row += start
    each = support = site["fn"].support
    while isinstance(each, constraints.independent):
        each = each.base_constraint
    if any(isinstance(bound, Tensor) and bound.numel() > 1 for bound in vars(each).values()):
        return (
            f"a value outside the support of site {site['name']!r}, whose bounds the program "
            f"computes, first in row {row}. Choose another distribution, or limit any latents "
            "that the bounds depend on to values that the data allow"
        )
    return (
        f"values outside the support of site {site['name']!r}, {support}, first in row {row}. "
        f"Row {row} has values in [{low:g}, {high:g}]. Binarize or rescale them, or choose "
        "another distribution"
    )


def cannot_score(site: Site, error: Exception) -> str:
    """Return the message for a distribution that can only score its own last sample."""
    each = base_distribution(site["fn"])
    parts = [type(part).__name__ for part in (each, *getattr(each, "transforms", ()))]
    return (
        f"site {site['name']!r} has the distribution {' of '.join(parts)}, which cannot score a "
        f"value that it did not sample itself ({type(error).__name__}: {first_line(error)}). Use a "
        "distribution with a log_prob. Instead of a flow without an inverse, use one of "
        "pyro_vae.flows"
    )


def is_discrete(distribution: Any) -> bool:
    """Return whether a distribution declares a discrete support."""
    with contextlib.suppress(NotImplementedError):
        return distribution.support.is_discrete
    return False


def is_real(constraint: Constraint) -> bool:
    """Return whether a support is the real line or a space of real vectors."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint in (constraints.real, constraints.real_vector)


def base_distribution(distribution: Any) -> Any:
    """Return the distribution inside any ``Independent`` wrappers."""
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    return distribution


def _same(a: float | Tensor, b: float | Tensor) -> bool:
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b)
