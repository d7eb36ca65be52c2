"""The shape and the dtype of each argument of a model, remembered from its last checked run.

A model is called with x, even to generate x. So data can be generated without data only if the
shape of x is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae._programs.runs import Program, trace_of
from pyro_vae._programs.sites import (
    Unobserve,
    is_factor,
    random_sites,
    was_observed,
)
from pyro_vae._programs.trial_runs import OUT_OF_MEMORY, trial_run
from pyro_vae._utils.identity import ProgramMap
from pyro_vae._utils.messages import first_line

_known = ProgramMap()  # by model, the columns of the last data that it ran on
_unknown: ContextVar[bool] = ContextVar("unknown", default=False)


def shape_is_unknown() -> bool:
    """Return whether a model runs without observations to find the shape of x.

    Its x then has any shape, which the model should not check.
    """
    return _unknown.get()


@dataclass(frozen=True)
class ColumnSpec:
    """The type of one argument of a program.

    Args:
        shape: shape of the value of one data point.
        dtype: dtype of the values.
    """

    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, column: Tensor) -> ColumnSpec:
        """Return the type of a column ``(B, *shape)``."""
        return cls(column.shape[1:], column.dtype)

    def full(self, count: int, device: torch.device, value: float = 0.0) -> Tensor:
        """Return a column whose numbers all have one value."""
        return torch.full((count, *self.shape), value, device=device).to(self.dtype)

    def to_config(self) -> dict[str, Any]:
        """Return the type as lists, numbers and strings, for a file."""
        return {"shape": list(self.shape), "dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ColumnSpec:
        """Return the type that :meth:`to_config` has described.

        Raises:
            ValueError: The description is not one of a type.
        """
        shape, dtype = config["shape"], getattr(torch, str(config["dtype"]), None)
        sizes = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
        if not sizes or not isinstance(dtype, torch.dtype):
            raise ValueError(f"an argument of the model has an unknown type: {config}")
        return cls(torch.Size(shape), dtype)


def remember(model: Program, columns: Sequence[Any]) -> None:
    """Remember the arguments of a model for as long as the model exists.

    Args:
        model: program of p(x, z).
        columns: x and covariates, each ``(B, ...)``.
    """
    remember_specs(model, [ColumnSpec.of(column) for column in columns])


def remember_specs(model: Program, specs: Sequence[ColumnSpec]) -> None:
    """Remember the types of the arguments of a model for as long as the model exists."""
    if specs:
        _known[model] = tuple(specs)


def known_specs(model: Program) -> tuple[ColumnSpec, ...]:
    """Return the types of the arguments of a model, or () if it never ran on checked data."""
    return _known.get(model, ())


def spec_of_x(
    model: Program, covariates: Sequence[Tensor], device: torch.device, remedy: str
) -> ColumnSpec:
    """Return the type of a model's x, from an earlier run or from a trial run.

    Args:
        model: program of p(x, z).
        covariates: further arguments of the program, which must be those of the earlier run.
        device: device of the program.
        remedy: the sentence that says how to pass x, for an error.

    Raises:
        ValueError: The model never ran on data, and a trial run does not show the shape of x. The
            covariates differ from those of the earlier run in number or shape. The model uses the
            values of x, other than to observe them.
    """
    specs = known_specs(model)
    if specs:
        _require_known_covariates(specs, covariates)
        spec = specs[0]
    else:
        spec, seen = _spec_from_trial(model, covariates, device)
        if spec is None:
            raise ValueError(
                "the shape of x is unknown, because this model was neither fitted nor evaluated "
                f"nor loaded, and a trial run does not show it: {seen}. {remedy}"
            )
    _require_unread(model, spec, covariates, device)
    return spec


def _require_known_covariates(specs: Sequence[ColumnSpec], covariates: Sequence[Tensor]) -> None:
    wanted, got = specs[1:], [ColumnSpec.of(column) for column in covariates]
    if [spec.shape for spec in wanted] != [spec.shape for spec in got]:
        raise ValueError(
            f"the model takes {len(wanted)} covariates besides x, of shapes "
            f"{[('N', *spec.shape) for spec in wanted]}, but covariates has the shapes "
            f"{[('N', *spec.shape) for spec in got]}. Pass one covariate for each."
        )


def _require_unread(
    model: Program, spec: ColumnSpec, covariates: Sequence[Tensor], device: torch.device
) -> None:
    """Raise ValueError if samples of the model, without observations, depend on the values of x."""
    count = len(covariates[0]) if covariates else 2
    values = []
    for number in (0.0, 1.0):
        x = spec.full(count, device, number)
        try:
            with trial_run(model):  # each begins with the same random numbers
                trace = trace_of(Unobserve()(model), x, *covariates)
        except OUT_OF_MEMORY:
            raise
        except Exception as error:
            raise ValueError(
                f"the model cannot run on x of {number:g} with shape {tuple(x.shape)} in the place "
                f"of data: {type(error).__name__}: {first_line(error)}. Pass data as x."
            ) from error
        values.append({site["name"]: site["value"] for site in random_sites(trace)})
    for name, value in values[0].items():
        other = values[1].get(name)
        same = other is not None and other.shape == value.shape
        if not (same and torch.allclose(value.double(), other.double(), equal_nan=True)):
            raise ValueError(
                f"site {name!r} of the model depends on the values of x, other than by observing "
                "them. Pass the data as x, one row for each data point."
            )


def _spec_from_trial(
    model: Program, covariates: Sequence[Tensor], device: torch.device
) -> tuple[ColumnSpec | None, str]:
    """Return the type of x if the model observes x itself at one site, else None and the reason.

    The model runs without observations. So the values of x do not matter, and the site that would
    observe x samples a value of the shape of x.
    """
    count = len(covariates[0]) if covariates else 2
    x = torch.zeros(count, 1, device=device)
    token = _unknown.set(True)
    try:
        with trial_run(model):
            trace = trace_of(Unobserve()(model), x, *covariates)
    except OUT_OF_MEMORY:
        raise
    except Exception as error:  # a program may raise any error at another shape than its own
        return None, f"the model does not run on x of shape ({count}, 1), {first_line(error)}"
    finally:
        _unknown.reset(token)
    observed = [site for site in random_sites(trace) if was_observed(site) and not is_factor(site)]
    values = [site["value"] for site in observed if site["infer"].get("obs") is x]
    if len(values) != 1 or len(values[0]) != count:
        shapes = ", ".join(f"{s['name']!r} of shape {tuple(s['value'].shape)}" for s in observed)
        return (
            None,
            f"for {count} data points, the model observes {shapes or 'nothing'}, not x itself",
        )
    return ColumnSpec.of(values[0]), ""
