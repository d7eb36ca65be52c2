"""The true support of a distribution, where its density is above zero.

The stated support, ``fn.support``, may be too wide. A von Mises distribution states the real line,
but its values are angles. A transformed distribution states the whole codomain of its last
transform. A guide on too wide a support has mass where the model has no density.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.distributions.transforms import ELUTransform
from torch import Tensor
from torch import distributions as torch_distributions
from torch.distributions import transforms
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import Transform

from pyro_vae.distributions._circular import WrappedNormal, circle

_TRANSFORMED = torch_distributions.TransformedDistribution
_STATED = _TRANSFORMED.support  # the support of every subclass that does not override it
_NO_DENSITY = {
    dist.Delta: "it has one value. Use pyro.deterministic instead of pyro.sample",
    dist.Empirical: "its values are a finite set. Sample the index of a value instead",
    dist.ZeroInflatedDistribution: (
        "zero has positive probability. Sample its gate and its value at two sites"
    ),
}
# Its support is an interval that may be unbounded. Older versions of torch lack it.
_GENERALIZED_PARETO = getattr(torch_distributions, "GeneralizedPareto", torch_distributions.Pareto)
_OPEN_ABOVE = (constraints.greater_than, constraints.greater_than_eq)
_BETWEEN = (constraints.interval, constraints.half_open_interval)


def states_too_wide(fn: Any) -> bool:
    """Return True if the class of a distribution may state more than its true support."""
    return isinstance(
        fn,
        torch_distributions.VonMises
        | torch_distributions.MixtureSameFamily
        | torch_distributions.TransformedDistribution
        | dist.SineBivariateVonMises
        | dist.SineSkewed
        | dist.MaskedMixture
        | _GENERALIZED_PARETO,
    )


def support_of(fn: Any) -> Constraint:
    """Return the support of a distribution, where its density is above zero.

    Raises:
        ValueError: The distribution states no support, or has no density on an open set of
            numbers. Or its support cannot be derived from its parts.
    """
    support = _support_of(fn)
    if missing := len(fn.event_shape) - support.event_dim:
        support = constraints.independent(support, missing)
    return support


def is_angle(fn: Any) -> bool:
    """Return True if the values of a distribution are angles, by its class and without values."""
    while True:
        if isinstance(fn, _WRAPPERS):
            fn = fn.base_dist
        elif isinstance(fn, torch_distributions.MixtureSameFamily):
            fn = fn.component_distribution
        elif isinstance(fn, dist.MaskedMixture):
            fn = fn.component0
        elif isinstance(fn, dist.DiscreteHMM):
            fn = fn.observation_dist
        else:
            break
    if isinstance(fn, _ANGLES):
        return True
    support = getattr(type(fn), "support", None)
    if isinstance(fn, torch_distributions.TransformedDistribution) and fn.transforms:
        support = fn.transforms[-1].codomain
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is circle


_WRAPPERS = (torch_distributions.Independent, dist.MaskedDistribution, ExpandedDistribution)
_ANGLES = (
    torch_distributions.VonMises,
    dist.SineBivariateVonMises,
    dist.SineSkewed,
    WrappedNormal,
)


def _support_of(fn: Any) -> Constraint:
    if isinstance(fn, torch_distributions.Independent):
        return _independent(support_of(fn.base_dist), fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.MaskedDistribution | ExpandedDistribution):
        return support_of(fn.base_dist)
    if isinstance(fn, torch_distributions.MixtureSameFamily):
        return _of_components(fn)
    if isinstance(fn, dist.MaskedMixture):
        first, second = support_of(fn.component0), support_of(fn.component1)
        if not _equal(first, second):
            raise ValueError(f"its components have different supports, {first} and {second}")
        return first
    if isinstance(fn, dist.DiscreteHMM):
        return _independent(support_of(fn.observation_dist), 1)
    if isinstance(fn, dist.SineBivariateVonMises | dist.SineSkewed):
        return constraints.independent(circle, 1)
    if isinstance(fn, torch_distributions.VonMises):
        return circle
    if isinstance(fn, dist.GaussianScaleMixture):
        return constraints.independent(constraints.real, 1)
    if isinstance(fn, dist.FoldedDistribution):
        return _folded(support_of(fn.base_dist))
    if type(fn).support is _STATED and isinstance(fn, _TRANSFORMED):
        support = support_of(fn.base_dist)
        for transform in fn.transforms:
            support = image(support, transform)
        return support
    _require_density(fn)
    return _without_infinite_bounds(_stated(fn))


def _stated(fn: Any) -> Constraint:
    try:
        return fn.support
    except NotImplementedError:
        raise ValueError(
            f"{type(fn).__name__} states no support. Add one to its class, such as "
            "`support = constraints.real_vector` if every vector has a density above zero"
        ) from None


def _require_density(fn: Any) -> None:
    """Raise ValueError if the distribution has mass at points, or no density on one side."""
    reason = next((why for cls, why in _NO_DENSITY.items() if isinstance(fn, cls)), None)
    if reason is not None and not fn.support.is_discrete:
        raise ValueError(f"{type(fn).__name__} has no density: {reason}")
    if isinstance(fn, dist.Stable) and ((fn.stability < 1) & (fn.skew.abs() == 1)).any():
        raise ValueError(
            "Stable with a stability below 1 and a skew of -1 or 1 has no density on one side of "
            "its location. Use a skew between -1 and 1"
        )


def _of_components(fn: torch_distributions.MixtureSameFamily) -> Constraint:
    component = fn.component_distribution
    support = support_of(component)
    return _first_along(support, -1 - len(component.event_shape))


def _first_along(support: Constraint, axis: int) -> Constraint:
    """Remove a dimension from the bounds of a support, which must be equal along it."""
    if support is circle:
        return circle  # its bounds are numbers
    support = copy.copy(support)
    for attribute, value in vars(support).items():
        if isinstance(value, Constraint):
            setattr(support, attribute, _first_along(value, axis))
        elif isinstance(value, Tensor) and value.dim() >= -axis:
            first = value.select(axis, 0)
            if not (value == first.unsqueeze(axis)).all():
                raise ValueError(
                    "its components have different supports. Use components of equal support, or "
                    "make the component a site that is enumerated"
                )
            setattr(support, attribute, first)
    return support


def _folded(support: Constraint) -> Constraint:
    lower, upper = _bounds(support) or (-math.inf, math.inf)
    lower, upper = torch.as_tensor(lower), torch.as_tensor(upper)
    lower, upper = torch.broadcast_tensors(lower.to(upper), upper)
    nearest = torch.where((lower < 0) & (upper > 0), 0.0, torch.minimum(lower.abs(), upper.abs()))
    return _between(nearest, torch.maximum(lower.abs(), upper.abs()))


def image(support: Constraint, transform: Transform) -> Constraint:
    """Return the image of a support under a transform.

    Raises:
        ValueError: The transform is not one-to-one, or is not defined on all of the support. Or the
            image has no name as a constraint.
    """
    name = type(transform).__name__
    if isinstance(transform, transforms.ComposeTransform):
        for part in transform.parts:
            support = image(support, part)
        return support
    misstated = isinstance(transform, ELUTransform)
    if misstated or not transform.bijective:
        reason = (
            "states positive values, but its values start at -1"
            if misstated
            else ("is not one-to-one, so its values have no density")
        )
        raise ValueError(f"{name} {reason}")
    if _fills(support, transform.domain):
        extra = support.event_dim - transform.domain.event_dim
        return _independent(transform.codomain, max(0, extra))
    scalar, scalar_support = _scalar(transform), _scalar_support(support)
    if scalar is not None and scalar_support is not None:
        return _independent(_scalar_image(scalar_support, scalar), support.event_dim)
    bounds = _bounds(scalar_support)
    alike = bounds is not None and not any(isinstance(b, Tensor) and b.dim() for b in bounds)
    if alike and isinstance(transform, transforms.ReshapeTransform):
        extra = support.event_dim - len(transform.in_shape)
        return _independent(scalar_support, max(0, extra) + len(transform.out_shape))
    raise ValueError(
        f"{name} maps its domain {transform.domain} onto {transform.codomain}, but its input is "
        f"only {support}, whose image is not a named constraint. Sample the "
        "values before the transform at a site, and apply the transform in the model"
    )


def _scalar(transform: Transform) -> Transform | None:
    """Return the elementwise transform, or None if the transform acts on vectors."""
    while isinstance(transform, transforms.IndependentTransform):
        transform = transform.base_transform
    affine = isinstance(transform, transforms.AffineTransform)  # its event_dim may be above zero
    return transform if affine or transform.domain.event_dim == 0 else None


def _scalar_image(support: Constraint, transform: Transform) -> Constraint:
    inside, outside = _bounds(support), _bounds(_scalar_support(transform.domain))
    codomain = _bounds(_scalar_support(transform.codomain))
    if inside is None or outside is None or codomain is None:
        raise ValueError(
            f"the image of {support} under {type(transform).__name__} is not a named constraint"
        )
    (lower, upper), (least, most), (first, last) = (
        [torch.as_tensor(bound).double() for bound in bounds]
        for bounds in (inside, outside, codomain)
    )
    if (lower < least).any() or (upper > most).any():
        raise ValueError(
            f"{type(transform).__name__} is defined on {transform.domain}, but its input has the "
            f"support {support}"
        )
    at_lower, at_upper = _at(transform, lower), _at(transform, upper)
    rising = at_lower < at_upper
    low = torch.where(rising, at_lower, at_upper)
    high = torch.where(rising, at_upper, at_lower)
    # At the ends of the domain, use the codomain's ends: the transform may round or clamp there.
    low = torch.where(torch.where(rising, lower == least, upper == most), first, low)
    high = torch.where(torch.where(rising, upper == most, lower == least), last, high)
    used = [v for v in (*inside, *vars(transform).values()) if isinstance(v, Tensor) and v.dim()]
    return _between(*(end.to(used[0].dtype) if used else end for end in (low, high)))


def _at(transform: Transform, bound: Tensor) -> Tensor:
    """Return a transform at a bound, without the parameters that have no effect there."""
    if not isinstance(transform, transforms.AffineTransform):
        return transform(bound)
    loc, scale = (torch.as_tensor(v).to(bound) for v in (transform.loc, transform.scale))
    if bound.isinf().all():
        return torch.where(scale < 0, -bound, bound)
    return loc.expand_as(loc + scale) if (bound == 0).all() else loc + scale * bound


def _fills(support: Constraint, domain: Constraint) -> bool:
    """Return True if a support is the whole domain."""
    if isinstance(domain, constraints.cat | constraints.stack):
        return all(_fills(support, each) for each in domain.cseq)
    real, whole = _scalar_support(support), _scalar_support(domain)
    if real is not None and whole is not None:
        return _equal(real, whole)
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    while isinstance(domain, constraints.independent):
        domain = domain.base_constraint
    return type(support) is type(domain) and not vars(support)


def _scalar_support(support: Constraint) -> Constraint | None:
    """Return the support of each number, or None if the support is one of vectors."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support is constraints.real_vector:
        return constraints.real
    return support if support.event_dim == 0 and _bounds(support) is not None else None


def _bounds(support: Constraint | None) -> tuple[Any, Any] | None:
    """Return the ends of an interval of real numbers, or None for another support."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support is constraints.real:
        return -math.inf, math.inf
    if isinstance(support, _OPEN_ABOVE):
        return support.lower_bound, math.inf
    if isinstance(support, constraints.less_than):
        return -math.inf, support.upper_bound
    if isinstance(support, _BETWEEN):
        return support.lower_bound, support.upper_bound
    return None


def _between(lower: Any, upper: Any) -> Constraint:
    """Return the interval between two bounds, which are numbers or tensors."""
    no_lower, no_upper = _infinite(lower, -math.inf), _infinite(upper, math.inf)
    if no_lower and no_upper:
        return constraints.real
    if no_upper:
        return constraints.greater_than(lower)
    if no_lower:
        return constraints.less_than(upper)
    return constraints.interval(lower, upper)


def _infinite(bound: Any, value: float) -> bool:
    infinite = torch.as_tensor(bound) == value
    if infinite.any() and not infinite.all():
        raise ValueError(
            "its support is bounded for some elements of the value and unbounded for others. "
            "Sample the two kinds at two sites"
        )
    return bool(infinite.all())


def _without_infinite_bounds(support: Constraint) -> Constraint:
    if isinstance(support, constraints.independent):
        base = _without_infinite_bounds(support.base_constraint)
        return constraints.independent(base, support.reinterpreted_batch_ndims)
    bounds = _bounds(support)
    if bounds is None or not any(torch.as_tensor(b).isinf().any() for b in vars(support).values()):
        return support
    return _between(*bounds)


def _independent(support: Constraint, event_dim: int) -> Constraint:
    return constraints.independent(support, event_dim) if event_dim else support


def _equal(one: Constraint, other: Constraint) -> bool:
    """Return True if two supports are equal."""
    if isinstance(one, constraints.independent) and isinstance(other, constraints.independent):
        same = one.reinterpreted_batch_ndims == other.reinterpreted_batch_ndims
        return same and _equal(one.base_constraint, other.base_constraint)
    first, second = _bounds(one), _bounds(other)
    if first is None or second is None:
        return type(one) is type(other) and not vars(one)
    return one.event_dim == other.event_dim and all(
        bool((torch.as_tensor(a) == torch.as_tensor(b)).all())
        for a, b in zip(first, second, strict=True)
    )
