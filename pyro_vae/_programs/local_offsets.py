"""Give the parameters of a guide's distributions an offset for each data point.

Any guide then has a family for each data point: the members with other parameters in its latent
sites. The offsets are in unconstrained space, so that any offset is valid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae._programs.mapped_sites import (
    MapSites,
    parameters_of_site,
    require_known_parameters,
)
from pyro_vae._programs.runs import Program, as_guide, trace_of
from pyro_vae._programs.sites import Site, data_frame, is_loss_of_guide, random_sites
from pyro_vae._utils.random import restored_generators
from pyro_vae.distributions._parameter_maps import Parameter


@dataclass(frozen=True)
class Slot:
    """The place of a parameter in the rows of offsets.

    Attributes:
        columns: of the offsets (B, P).
        shape: of the parameter, one for each data point: ``(B, *others)``.
        axis: the dimension of the data points in the parameter, from the right.
    """

    columns: slice
    shape: tuple[int, ...]
    axis: int


class LocalMembers(Protocol):
    """The members of a guide's family, one for each data point."""

    def parameters_of(self, x: Tensor, *covariates: Any) -> Tensor:
        """Return the parameters (B, P) of the guide itself."""

    def sample(self, parameters: Tensor, x: Tensor, *covariates: Any) -> Any:
        """Run the guide at given parameters (B, P)."""


_METHODS = ("parameters_of", "sample")


def require_both_methods(guide: Program) -> None:
    """Raise TypeError if a guide has only one of the two methods of :class:`LocalMembers`."""
    missing = [name for name in _METHODS if not callable(getattr(guide, name, None))]
    if len(missing) == 1:
        (present,) = set(_METHODS) - set(missing)
        raise TypeError(
            "a guide with its own parameters for each data point must have the methods "
            "parameters_of(x, *covariates) and sample(parameters, x, *covariates), but "
            f"{type(guide).__name__} has only {present}"
        )


def local_members(guide: Program, args: tuple) -> LocalMembers:
    """Return the members of a guide's family: the guide's own methods, or an OffsetGuide.

    Args:
        guide: program of q(z|x).
        args: a minibatch x, and covariates.

    Raises:
        ValueError: See :class:`OffsetGuide`.
    """
    own = all(callable(getattr(guide, name, None)) for name in _METHODS)
    return guide if own else OffsetGuide(guide, args)


class OffsetGuide:
    r"""A guide whose parameters have an offset :math:`\delta_n` for each data point.

    .. math:: \lambda_n = T(T^{-1}(\lambda(x_n)) + \delta_n)

    for each parameter :math:`\lambda` that the guide computes from x, in each latent site of the
    data plate. T maps the reals onto the values that are allowed for the parameter. At
    :math:`\delta = 0` it is the guide itself. A parameter with equal values for all data points,
    given the latents sampled before it, belongs to the family and has no offset. With a single
    data point, all parameters have one. If a site depends on latents sampled before it, the offset
    is the same for all their values. Numbers inside a transform are not changed, except those of an
    affine transform.

    Args:
        guide: program of q(z|x).
        args: a minibatch x of B rows, and covariates, from which the parameters are found.

    Raises:
        ValueError: No parameter depends on x. Or a distribution depends on x in an unknown way.
    """

    def __init__(self, guide: Program, args: tuple):
        self._guide = guide
        self._slots: dict[tuple[str, str], Slot] = {}
        self._like = args[0]  # replaced by a parameter, for its dtype
        self.num_parameters = 0
        with restored_generators(), torch.no_grad():
            self._find(args)

    def parameters_of(self, x: Tensor, *covariates: Any) -> Tensor:
        """Return the offsets of the guide itself, which are zeros (B, P)."""
        return self._like.new_zeros(len(x), self.num_parameters)

    def sample(self, parameters: Tensor, x: Tensor, *covariates: Any) -> Any:
        """Run the guide with given offsets (B, P)."""

        def shifted(site: str, parameter: Parameter) -> Tensor:
            slot = self._slots.get((site, parameter.name))
            if slot is None:
                return parameter.value
            offset = parameters[:, slot.columns].reshape(len(parameters), *slot.shape[1:])
            return parameter.value + offset.movedim(0, slot.axis).to(parameter.value.dtype)

        with MapSites({site for site, _ in self._slots}, shifted):
            return self._guide(x, *covariates)

    def _find(self, args: tuple) -> None:
        """Find the parameters that depend on x, and give each of them columns."""
        trace = trace_of(as_guide(self._guide), *args)
        sites = {
            site["name"]: site
            for site in random_sites(trace)
            if data_frame(site) is not None and not is_loss_of_guide(site)
        }
        # All rows get the latents of the first row, so that only x can make parameters differ.
        first = {name: _like_first(site) for name, site in sites.items()}
        same = trace_of(poutine.condition(as_guide(self._guide), data=first), *args)
        for name, site in sites.items():
            try:
                require_known_parameters(site)
            except ValueError as error:
                raise ValueError(_unknown(site, str(error))) from error
            self._add(same.nodes[name])
        if not self._slots:
            raise ValueError(
                "the guide has no parameter that differs between data points, in any latent site "
                f"of the data plate {sorted(sites)}. Its family has one member, so there is "
                "nothing to optimize for a data point"
            )

    def _add(self, site: Site) -> None:
        frame = data_frame(site)
        for parameter in parameters_of_site(site):
            axis = frame.dim - parameter.inner_dims
            value = parameter.value
            if -axis > value.dim() or value.shape[axis] != frame.size:
                continue
            rows = value.movedim(axis, 0)
            if len(rows) > 1 and not (rows != rows[:1]).any():
                continue
            if not parameter.is_mapped:
                raise ValueError(
                    _unknown(site, f"{parameter.name} has no bijection from the reals")
                )
            count = rows[0].numel()
            columns = slice(self.num_parameters, self.num_parameters + count)
            self._slots[site["name"], parameter.name] = Slot(columns, tuple(rows.shape), axis)
            self.num_parameters += count
            self._like = value


def _like_first(site: Site) -> Tensor:
    """Return the value of a site with the first data point's value in all rows."""
    value = site["value"]
    axis = data_frame(site).dim - site["fn"].event_dim
    return value.narrow(axis, 0, 1).expand_as(value)


def _unknown(site: Site, reason: str) -> str:
    return (
        f"the parameters of the guide's site {site['name']!r} for one data point are not known: "
        f"{reason}. Give the guide the methods parameters_of(x, *covariates) and "
        "sample(parameters, x, *covariates), or use an AmortizedGuide"
    )
