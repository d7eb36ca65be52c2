"""The parameters of a distribution, changed in unconstrained space."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    MixtureSameFamily,
    TransformedDistribution,
    Uniform,
    biject_to,
    constraints,
    transforms,
)

# Of two arguments that state the same thing, the first is used.
_ALTERNATIVES = (
    ("logits", "probs"),
    ("gate_logits", "gate"),
    ("scale_tril", "covariance_matrix"),
    ("scale_tril", "precision_matrix"),
)
_LATE_ARGUMENTS = ("self", "validate_args")


class Parameter(NamedTuple):
    """A parameter of a distribution.

    Attributes:
        name: its name, with those of the distributions around it, such as ``base_dist.loc``.
        value: its value in unconstrained space, or unchanged if there is no bijection.
        inner_dims: the number of rightmost dimensions of ``value`` that are not batch dimensions of
            the whole distribution.
        is_mapped: whether ``value`` is unconstrained.
    """

    name: str
    value: Tensor
    inner_dims: int
    is_mapped: bool


ParameterMap = Callable[[Parameter], Tensor]


def map_parameters(
    distribution: Distribution, function: ParameterMap, name: str = "", inner_dims: int = 0
) -> Distribution:
    """Return a distribution with each tensor parameter replaced by a function of it.

    The function receives the parameter in unconstrained space, by ``biject_to`` of its constraint.
    The parameters of ``Independent``, of masked, expanded and transformed distributions and of
    mixtures are those of the distributions inside. Locations and scales of affine transforms are
    parameters too. The numbers inside other transforms are not, and neither is a point mass.

    Args:
        distribution: of any batch shape.
        function: returns the new value of a :class:`Parameter`. It may have more batch dimensions.
            A parameter that is not mapped must be returned unchanged.
        name: text before the names of the parameters.
        inner_dims: the number of rightmost batch dimensions that belong to a distribution around
            this one.

    Raises:
        NotImplementedError: An argument of the constructor is not an attribute of the distribution.
    """

    def inside(part: Distribution, label: str, inner: int = inner_dims) -> Distribution:
        return map_parameters(part, function, f"{name}{label}.", inner)

    if isinstance(distribution, dist.Delta):
        return distribution
    if isinstance(distribution, Independent):
        count = distribution.reinterpreted_batch_ndims
        base = map_parameters(distribution.base_dist, function, name, inner_dims + count)
        return type(distribution)(base, count)
    if isinstance(distribution, dist.MaskedDistribution):
        base = map_parameters(distribution.base_dist, function, name, inner_dims)
        return dist.MaskedDistribution(base, distribution._mask)
    if isinstance(distribution, dist.ExpandedDistribution):
        base = map_parameters(distribution.base_dist, function, name, inner_dims)
        shape = torch.broadcast_shapes(base.batch_shape, distribution.batch_shape)
        return dist.ExpandedDistribution(base, shape)
    if isinstance(distribution, MixtureSameFamily):
        return type(distribution)(
            inside(distribution.mixture_distribution, "mixture_distribution"),
            inside(distribution.component_distribution, "component_distribution", inner_dims + 1),
        )
    if isinstance(distribution, TransformedDistribution) and not distribution.arg_constraints:
        inner = inner_dims + len(distribution.event_shape)
        parts = [
            _map_affine(each, function, f"{name}transforms[{i}].", inner)
            for i, each in enumerate(distribution.transforms)
        ]
        return type(distribution)(inside(distribution.base_dist, "base_dist"), parts)
    return _rebuild(distribution, function, name, inner_dims)


def _map_affine(
    transform: transforms.Transform, function: ParameterMap, name: str, inner_dims: int
) -> transforms.Transform:
    if type(transform) is not transforms.AffineTransform:
        return transform
    loc, scale = transform.loc, transform.scale
    if isinstance(loc, Tensor):
        loc = function(Parameter(f"{name}loc", loc, inner_dims, True))
    if isinstance(scale, Tensor):
        size = function(Parameter(f"{name}scale", scale.abs().log(), inner_dims, True))
        scale = scale.sign() * size.exp()
    return transforms.AffineTransform(loc, scale, transform.event_dim)


def _rebuild(
    distribution: Distribution, function: ParameterMap, name: str, inner_dims: int
) -> Distribution:
    """Call the constructor of a distribution with its mapped parameters."""
    new: dict[str, Any] = {}
    arguments = _arguments(distribution)
    if isinstance(distribution, Uniform):
        arguments = []
        new["low"], new["high"] = _mapped_interval(distribution, function, name, inner_dims)
    for argument in arguments:
        value = _attribute(distribution, argument)
        if isinstance(value, Distribution):
            value = map_parameters(value, function, f"{name}{argument}.", inner_dims)
        elif isinstance(value, Tensor):
            constraint = distribution.arg_constraints.get(argument)
            batch_dims = len(distribution.batch_shape)
            value = _mapped(
                value, constraint, function, f"{name}{argument}", inner_dims, batch_dims
            )
        new[argument] = value
    if "validate_args" in inspect.signature(type(distribution)).parameters:
        new["validate_args"] = distribution._validate_args
    return type(distribution)(**new)


def _mapped(
    value: Tensor,
    constraint: constraints.Constraint | None,
    function: ParameterMap,
    name: str,
    inner_dims: int,
    batch_dims: int,
) -> Tensor:
    transform = None
    if constraint is not None and value.is_floating_point():
        # No bijection has bounds that depend on other parameters, or a finite set.
        with contextlib.suppress(NotImplementedError):
            transform = biject_to(constraint)
    if transform is None:
        function(Parameter(name, value, inner_dims, False))
        return value
    raw = transform.inv(value)
    # A constraint may be for single numbers of a vector, as that of a logistic normal.
    inner_dims += max(transform.domain.event_dim, raw.dim() - batch_dims)
    return transform(function(Parameter(name, raw, inner_dims, True)))


def _mapped_interval(
    distribution: Uniform,
    function: ParameterMap,
    name: str,
    inner_dims: int,
) -> tuple[Tensor, Tensor]:
    """Return the bounds of a uniform distribution; its parameters are the low one and the width."""
    low = function(Parameter(f"{name}low", distribution.low, inner_dims, True))
    width = (distribution.high - distribution.low).log()
    return low, low + function(Parameter(f"{name}width", width, inner_dims, True)).exp()


def _arguments(distribution: Distribution) -> list[str]:
    parameters = inspect.signature(type(distribution).__init__).parameters.values()
    names = [p.name for p in parameters if p.name not in _LATE_ARGUMENTS]
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise NotImplementedError(
            f"the constructor of {type(distribution).__name__} does not name its arguments"
        )
    for used, other in _ALTERNATIVES:
        if used in names and other in names:
            names.remove(other)
    return names


def _attribute(distribution: Distribution, argument: str) -> Any:
    for name in (argument, f"_{argument}"):
        if hasattr(distribution, name):
            return getattr(distribution, name)
    raise NotImplementedError(
        f"{type(distribution).__name__} has no attribute {argument!r} with the argument of its "
        "constructor"
    )
