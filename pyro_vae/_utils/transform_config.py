"""Convert constraints and transforms of torch and Pyro to plain structures, and back.

A structure is ``[name, *arguments]``. Each argument is a number, a tensor or another structure.
Names are looked up in the tables below, and nowhere else.
"""

from __future__ import annotations

from typing import Any, TypeVar

import pyro.distributions.constraints as constraints
import torch
from pyro.distributions import transforms as pyro_transforms
from torch.distributions import transforms
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import Transform

from pyro_vae._utils.messages import first_line

Mapping = Constraint | Transform
Class = TypeVar("Class", bound=type[Transform])

# Constraints that are constants.
_NAMED = {
    name: getattr(constraints, name)
    for name in [
        "boolean", "corr_cholesky", "corr_matrix", "integer", "lower_cholesky", "lower_triangular",
        "nonnegative", "nonnegative_integer", "ordered_vector", "positive", "positive_definite",
        "positive_integer", "positive_ordered_vector", "positive_semidefinite", "real",
        "real_vector", "simplex", "softplus_lower_cholesky", "softplus_positive", "sphere",
        "square", "symmetric", "unit_interval", "unit_lower_cholesky",
    ]
}  # fmt: skip
# Classes of constraints and transforms, with the attributes that hold their arguments.
_BOUNDS = ("lower_bound", "upper_bound")
_MADE: dict[str, tuple[type, tuple[str, ...]]] = {
    "greater_than": (constraints.greater_than, ("lower_bound",)),
    "greater_than_eq": (constraints.greater_than_eq, ("lower_bound",)),
    "less_than": (constraints.less_than, ("upper_bound",)),
    "interval": (constraints.interval, _BOUNDS),
    "half_open_interval": (constraints.half_open_interval, _BOUNDS),
    "integer_interval": (constraints.integer_interval, _BOUNDS),
    "independent": (constraints.independent, ("base_constraint", "reinterpreted_batch_ndims")),
    "AffineTransform": (transforms.AffineTransform, ("loc", "scale", "_event_dim")),
    "ComposeTransform": (transforms.ComposeTransform, ("parts",)),
    "CorrCholeskyTransform": (transforms.CorrCholeskyTransform, ()),
    "CorrMatrixCholeskyTransform": (pyro_transforms.CorrMatrixCholeskyTransform, ()),
    "ExpTransform": (transforms.ExpTransform, ()),
    "IndependentTransform": (
        transforms.IndependentTransform, ("base_transform", "reinterpreted_batch_ndims")),
    "LowerCholeskyTransform": (transforms.LowerCholeskyTransform, ()),
    "OrderedTransform": (pyro_transforms.OrderedTransform, ()),
    "PositiveDefiniteTransform": (transforms.PositiveDefiniteTransform, ()),
    "PowerTransform": (transforms.PowerTransform, ("exponent",)),
    "ReshapeTransform": (transforms.ReshapeTransform, ("in_shape", "out_shape")),
    "SigmoidTransform": (transforms.SigmoidTransform, ()),
    "SoftplusLowerCholeskyTransform": (pyro_transforms.SoftplusLowerCholeskyTransform, ()),
    "SoftplusTransform": (transforms.SoftplusTransform, ()),
    "SoftplusTransform of Pyro": (pyro_transforms.SoftplusTransform, ()),
    "StickBreakingTransform": (transforms.StickBreakingTransform, ()),
    "TanhTransform": (transforms.TanhTransform, ()),
    "UnitLowerCholeskyTransform": (pyro_transforms.UnitLowerCholeskyTransform, ()),
}  # fmt: skip
_BY_TYPE = {cls: (name, attributes) for name, (cls, attributes) in _MADE.items()}
_INVERSE = "inverse"


def register(cls: Class) -> Class:
    """Add a transform that takes no arguments to the tables, under the name of its class."""
    _MADE[cls.__name__] = (cls, ())
    _BY_TYPE[cls] = (cls.__name__, ())
    return cls


def to_config(mapping: Mapping) -> list[Any]:
    """Return the structure of a constraint or a transform.

    Raises:
        TypeError: The tables have no such constraint or transform.

    Example:
        >>> from torch.distributions import constraints
        >>> to_config(constraints.interval(0.0, 2.0))
        ['interval', 0.0, 2.0]
    """
    for name, value in _NAMED.items():
        if mapping is value:
            return [name]
    if isinstance(mapping, transforms._InverseTransform):
        return [_INVERSE, to_config(mapping.inv)]
    if type(mapping) not in _BY_TYPE:
        raise TypeError(f"{type(mapping).__name__} is not a known constraint or transform")
    name, attributes = _BY_TYPE[type(mapping)]
    structure = [name, *(_value(getattr(mapping, attribute)) for attribute in attributes)]
    if isinstance(mapping, Transform) and mapping._cache_size:
        structure.append({"cache_size": mapping._cache_size})
    return structure


def from_config(structure: Any) -> Mapping:
    """Return the constraint or transform of a structure.

    Raises:
        ValueError: The structure is invalid.
    """
    if not isinstance(structure, list) or not structure or not isinstance(structure[0], str):
        raise ValueError(f"a constraint or transform must be [name, ...], got {structure!r}")
    name, *arguments = structure
    if name in _NAMED and not arguments:
        return _NAMED[name]
    if name == _INVERSE and len(arguments) == 1:
        inner = from_config(arguments[0])
        if isinstance(inner, Transform):
            return inner.inv
    if name not in _MADE:
        raise ValueError(f"there is no constraint or transform named {name!r}")
    options = arguments.pop() if arguments and isinstance(arguments[-1], dict) else {}
    cls, attributes = _MADE[name]
    if len(arguments) != len(attributes) or not options.keys() <= {"cache_size"}:
        raise ValueError(f"{name} must have {len(attributes)} arguments, got {arguments}")
    try:
        return cls(*map(_restored, arguments), **options)
    except Exception as error:
        raise ValueError(f"{name} cannot be made from {arguments}: {first_line(error)}") from error


def _value(value: Any) -> Any:
    if isinstance(value, Constraint | Transform):
        return to_config(value)
    if isinstance(value, list):  # the parts of a composition
        return tuple(_value(each) for each in value)
    if isinstance(value, torch.Size):
        return tuple(value)
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, int | float):
        return value
    raise TypeError(f"an argument of type {type(value).__name__} cannot be converted")


def _restored(value: Any) -> Any:
    if isinstance(value, list):
        return from_config(value)
    if isinstance(value, tuple) and all(isinstance(each, list) for each in value):
        return [from_config(each) for each in value]
    return value
