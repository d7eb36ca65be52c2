"""Discrete latents that are summed over all their values, instead of being sampled.

A site is enumerated if it has ``infer={"enumerate": "parallel"}``. Pyro's handler then gives it
its own dimension, left of all plates. Every density that depends on its value has that dimension.
If the guide has the site, the terms are expectations under q. If only the model has the site, it
is summed out of p. In both cases the results have the same shape as without enumeration.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Categorical

from pyro_vae._programs.sites import (
    DATA_PLATE,
    PARTICLE_PLATE,
    Site,
    is_factor,
    mask_of_events,
    own_scale,
)

Program = Callable[..., Any]

# Log-densities by site, each (*enumerated dimensions, *inner plates, K, B). The inner plates are
# those of enumerated sites. They have size 1 in the density of a site that depends on no such site.
Tables = dict[str, Tensor]

_LARGEST_TABLE = 2**28  # entries: 1 GiB in float32


@dataclass(frozen=True)
class SummedOut:
    r"""A group of sites that were summed out of the model together.

    Args:
        sites: by name, the sites from the run with all values at once.
        dims: by name, the dimension of the tables over the values of a site.
        tables: the factors of :math:`\log p(c, z)`, for the values c of the sites and the latents z
            that depend on them, each of shape (\*enumerated dimensions, K, B). Those of a
            ``pyro.factor`` are among them.
    """

    sites: dict[str, Site]
    dims: dict[str, int]
    tables: list[Tensor]

    def log_prob(self, names: Iterable[str]) -> Tensor:
        r"""Return :math:`\log p(c|z)` of some of the sites, (\*enumerated dimensions, K, B).

        Raises:
            ValueError: The table of all values of these sites would be too large for memory.
        """
        names = [*names]
        table = self._table(self.tables, names)
        return table - table.logsumexp([self.dims[name] for name in names], keepdim=True)

    def sample(self) -> dict[str, Tensor]:
        r"""Sample c from :math:`p(c|z)`, one site after the other.

        Returns:
            By name, the numbers of the values, (K, B).
        """
        tables, found = self.tables, {}
        shape = torch.broadcast_shapes(*(table.shape[-2:] for table in tables))
        for name, dim in self.dims.items():
            logits = self._table(tables, [name]).movedim(dim, -1)
            drawn = Categorical(logits=logits.reshape(*shape, -1)).sample()
            found[name] = drawn
            tables = [_at(table, dim, drawn) for table in tables]
        return found

    def _table(self, tables: list[Tensor], names: list[str]) -> Tensor:
        others = {dim for name, dim in self.dims.items() if name not in names}
        tables = sum_out(tables, others, [*self.sites])
        check_size(names, tables)
        table = sum(tables)
        # If no values can have given the latents, all have the same weight.
        total = table.logsumexp([self.dims[name] for name in names], keepdim=True)
        return torch.where(total == -math.inf, 0.0, table)

    @property
    def width(self) -> int:
        """The number of batch dimensions of the plates, including the particles' plate."""
        name, dim = next(iter(self.dims.items()))
        return dim + 2 - self.sites[name]["infer"]["_enumerate_dim"]


def is_enumerated(site: Site) -> bool:
    """Return whether a site is latent and asks to be enumerated."""
    return not site["is_observed"] and (site["infer"] or {}).get("enumerate") is not None


def check_enumeration(site: Site) -> None:
    """Raise ValueError if a site asks for an enumeration that is not supported.

    Raises:
        ValueError: The site is enumerated, but not in parallel, not over all values, or outside
            the plate ``"data"``.
    """
    if not is_enumerated(site):
        return
    if (how := site["infer"]["enumerate"]) != "parallel":
        raise ValueError(
            f'site {site["name"]!r} has enumerate={how!r}, but only "parallel" is supported'
        )
    if site["infer"].get("num_samples") is not None:
        raise ValueError(
            f"site {site['name']!r} asks for enumeration by num_samples draws, but enumeration is "
            "over all values. Remove num_samples, or remove enumerate."
        )
    plates = {f.name: f.size for f in site["cond_indep_stack"] if f.name != PARTICLE_PLATE}
    if DATA_PLATE not in plates:
        raise ValueError(
            'an enumerated site must be inside the plate "data", which has one row for each row of '
            f"x, but {site['name']!r} is in the plates, by size, {plates}. Put "
            'the site inside `with pyro.plate("data", x.shape[0]):`, or sample it in the guide '
            "without enumeration."
        )


def inner_dims(site: Site) -> frozenset[int]:
    """Return the dimensions of a site's plates inside the plate ``"data"``."""
    return frozenset(
        frame.dim
        for frame in site["cond_indep_stack"]
        if frame.vectorized and frame.name not in (DATA_PLATE, PARTICLE_PLATE)
    )


def uniform_where_masked(log_prob: Tensor, site: Site) -> Tensor:
    """Replace an enumerated site's log-density by a uniform one where the site is masked.

    The density is summed over all values, and must also sum to one where it is masked.

    Args:
        log_prob: a log-density, zero where it is masked.
        site: any site, enumerated or not.
    """
    mask = mask_of_events(site)
    if mask is None or not is_enumerated(site):
        return log_prob
    count = site["value"].shape[site["infer"]["_enumerate_dim"] - site["fn"].event_dim]
    mask = torch.as_tensor(mask, device=log_prob.device)
    return torch.where(mask, log_prob, -math.log(count))


class Enumeration:
    """The enumerated sites of one run; removes them from log-densities.

    Args:
        model: the model's sites by name, after a run under Pyro's handler.
        guide: the guide's sites by name.
        width: the number of batch dimensions of the plates, including the particles' plate.

    Attributes:
        in_guide: names of the enumerated sites in the guide.
        in_model: names of the enumerated sites that only the model has.
        entangled: groups of latents with one joint density, because a shared site was summed out.
        summed_out: the sites of ``in_model``; sites that share a density form one group.
        inner: the dimensions of the inner plates of enumerated sites, from the left.

    Raises:
        ValueError: A site of the guide is in an inner plate. :meth:`without` also raises it, if a
            table of values is too large.
    """

    def __init__(self, model: Mapping[str, Site], guide: Mapping[str, Site], width: int):
        self._model_sites = model
        self.in_guide = [name for name, site in guide.items() if is_enumerated(site)]
        self.in_model = [n for n, site in model.items() if n not in guide and is_enumerated(site)]
        for name in self.in_guide:
            if inner_dims(guide[name]):
                raise ValueError(
                    f'the guide enumerates site {name!r} inside a plate in the plate "data". Let '
                    "the model alone enumerate it, which sums it out, or use "
                    "pyro.infer.TraceEnum_ELBO."
                )
        inner = frozenset().union(*(inner_dims(model[name]) for name in self.in_model))
        self.inner = sorted(inner)
        dims = {
            name: site["infer"]["_enumerate_dim"] + width - 2 - len(self.inner)
            for name, site in {**model, **guide}.items()
            if is_enumerated(site)
        }
        self._guide_dims = [dims[name] for name in self.in_guide]
        self._model_dims = [dims[name] for name in self.in_model]
        self.entangled: list[list[str]] = []
        self.summed_out: list[SummedOut] = []
        self.count = max((-2 - len(self.inner) - dim for dim in dims.values()), default=0)
        self._inner_of = {dims[name]: inner_dims(model[name]) for name in self.in_model}

    def plates_to_keep(self, site: Site, sizes: torch.Size) -> frozenset[int]:
        """Return the inner plates of the enumerated values on which a density depends.

        Args:
            site: the site with the density.
            sizes: the sizes of its enumerated dimensions.

        Raises:
            ValueError: The site is not inside these plates.
        """
        first = -2 - len(self.inner) - self.count
        dims = dict(zip(self._model_dims, self.in_model, strict=True))
        kept: frozenset[int] = frozenset()
        for dim, name in dims.items():
            if sizes[dim - first] > 1:
                kept |= self._inner_of[dim]
                if not self._inner_of[dim] <= inner_dims(site):
                    raise ValueError(
                        f"site {site['name']!r} depends on site {name!r}, which is enumerated "
                        "inside an inner plate, but is outside of that plate. The sum would have "
                        "one term for each combination of values. Put both into the plate."
                    )
        return kept

    def varies(self, table: Tensor) -> bool:
        """Return whether a density depends on an enumerated value."""
        return any(table.shape[dim] > 1 for dim in (*self._guide_dims, *self._model_dims))

    def without(self, model: Tables, guide: Tables) -> tuple[Tables, Tables]:
        r"""Return the log-densities of both programs, each (K, B), without enumerated dimensions.

        Args:
            model: by site, each (\*enumerated dimensions, K, B).
            guide: by site, each (\*enumerated dimensions, K, B).
        """
        model = self._summed_out(model)
        if not self.in_guide:
            return _flat(model), _flat(guide)
        check_size(self.in_guide, (guide[name] for name in self.in_guide))
        weights = sum(guide[name] for name in self.in_guide).exp()

        def expected(table: Tensor) -> Tensor:
            # Where q is zero, a log-density of minus infinity must not give NaN.
            table = torch.where(weights > 0, table, 0.0) * weights
            return table.sum(self._guide_dims, keepdim=True)

        averaged = [{n: expected(t) for n, t in tables.items()} for tables in (model, guide)]
        return _flat(averaged[0]), _flat(averaged[1])

    def _summed_out(self, tables: Tables) -> Tables:
        r"""Sum the enumerated sites that only the model has out of its densities.

        Sites that depend on the same enumerated sites form a group. The first latent of a group
        gets the density of all its latents, :math:`\log p(z)`. Its first factor gets the rest of
        the sum over latents and factors. Its first observation gets the rest of the sum over all
        sites, :math:`\log p(x, z) - \log p(z)` without factors. The other sites get zero.
        A scale multiplies the logarithm of the sum, so all sites of a group must have the same one.
        """
        result = {name: table for name, table in tables.items() if name not in self.in_model}
        for group in self._groups(tables):
            self._require_one_scale(group)
            unobserved = [n for n in group if not self._model_sites[n]["is_observed"]]
            latents = [n for n in unobserved if n not in self.in_model]
            observed = [n for n in group if n not in unobserved]
            factors = [n for n in observed if is_factor(self._model_sites[n])]
            joint = [tables[n] for n in unobserved]
            dims = dict(zip(self.in_model, self._model_dims, strict=True))
            dims = {name: dim for name, dim in dims.items() if name in group}
            sites = {name: self._model_sites[name] for name in dims}
            inside = {name: dim for name, dim in dims.items() if self._inner_of[dim]}
            for name in latents:
                of = [other for other, dim in inside.items() if tables[name].shape[dim] > 1]
                if of:
                    raise ValueError(
                        f"latent site {name!r} depends on {of}, which the model enumerates inside "
                        "an inner plate. Sample the latent outside of these values, or enumerate "
                        "it too."
                    )
            if outside := {name: dim for name, dim in dims.items() if name not in inside}:
                # The others are given these and the latents, so their densities sum to one.
                flat = [
                    tables[name].reshape(
                        *tables[name].shape[: self.count], *tables[name].shape[-2:]
                    )
                    for name in group
                    if name in unobserved or name in factors
                    if not any(tables[name].shape[dim] > 1 for dim in inside.values())
                ]
                self.summed_out.append(
                    SummedOut(
                        {name: sites[name] for name in outside},
                        {name: dim + len(self.inner) for name, dim in outside.items()},
                        flat,
                    )
                )
            before = None
            if latents:
                before = self._log_sum(joint)
                self.entangled.append(latents)
                result.update(dict.fromkeys(latents, torch.zeros_like(before)))
                result[latents[0]] = before
            # Factors come before observations, so that a factor of minus infinity stays a factor.
            for others in (factors, [name for name in observed if name not in factors]):
                if not others:
                    continue
                joint = joint + [tables[name] for name in others]
                whole = self._log_sum(joint)
                result.update(dict.fromkeys(others, torch.zeros_like(whole)))
                result[others[0]] = whole
                if before is not None:  # what follows an impossible value has a density of one
                    impossible = before == -math.inf
                    before = torch.where(impossible, 0.0, before)
                    result[others[0]] = torch.where(impossible, 0.0, whole) - before
                before = whole
        return result

    def _require_one_scale(self, group: list[str]) -> None:
        """Raise ValueError if sites whose densities are in one sum have different scales."""
        scales = {name: own_scale(self._model_sites[name]) for name in group}
        first = next(iter(scales))
        for name, scale in scales.items():
            if scale is not scales[first] and not bool(scale == scales[first]):
                raise ValueError(
                    f"sites {first!r} and {name!r} are in one sum over enumerated values and have "
                    f"the scales {float(scales[first]):g} and {float(scale):g}. Give them the same "
                    "scale. If the scale was for training, pass pv.unscaled(model) and "
                    "pv.unscaled(guide)."
                )

    def _log_sum(self, tables: Iterable[Tensor]) -> Tensor:
        """Sum out the enumerated values, from the innermost plates outwards.

        Raises:
            ValueError: A density depends on values of two plates that cross.
        """
        tables = list(tables)
        self._require_nested(tables)
        for plates in sorted({*self._inner_of.values()}, key=len, reverse=True):
            dims = {dim for dim in self._model_dims if self._inner_of[dim] == plates}
            tables = sum_out(tables, dims, self.in_model)
            self._require_nested(tables)
            tables = [self._without_plates(t, plates) for t in tables]
        return sum(tables)

    def _require_nested(self, tables: list[Tensor]) -> None:
        names = dict(zip(self._model_dims, self.in_model, strict=True))
        for table in tables:
            varying = [dim for dim in self._model_dims if table.shape[dim] > 1]
            for one, other in itertools.combinations(varying, 2):
                plates = self._inner_of[one], self._inner_of[other]
                if not (plates[0] <= plates[1] or plates[1] <= plates[0]):
                    raise ValueError(
                        f"sites {names[one]!r} and {names[other]!r} are enumerated inside inner "
                        "plates that cross, and a density depends on both. The sum would have one "
                        "term for each combination of values. Nest the plates, or let the guide "
                        "sample one of the sites."
                    )

    def _without_plates(self, table: Tensor, plates: frozenset[int]) -> Tensor:
        """Sum a table over plates, except those of the enumerated values that it depends on."""
        depends = (self._inner_of[dim] for dim in self._model_dims if table.shape[dim] > 1)
        finished = plates.difference(*depends)
        axes = [self.inner.index(dim) - len(self.inner) - 2 for dim in finished]
        return table.sum(axes, keepdim=True) if axes else table

    def _groups(self, tables: Tables) -> list[list[str]]:
        """Return groups of sites that depend on the same enumerated sites, each in order."""
        groups: list[tuple[set[int], list[str]]] = []
        for name, table in tables.items():
            dims = {dim for dim in self._model_dims if table.shape[dim] > 1}
            if not dims:
                continue
            names = [name]
            for other in [group for group in groups if group[0] & dims]:
                groups.remove(other)
                dims, names = dims | other[0], other[1] + names
            groups.append((dims, names))
        return [sorted(names, key=[*tables].index) for _, names in groups]


_samples_guide = ContextVar("samples_guide", default=False)


@contextlib.contextmanager
def sampled_guides() -> Iterator[None]:
    """Sample the sites that a guide marks for enumeration, instead of averaging over their values.

    A log-weight needs a sample: the average over the values is not inside of its logarithm.
    """
    token = _samples_guide.set(True)
    try:
        yield
    finally:
        _samples_guide.reset(token)


def sampled_if_needed(guide: Program) -> Program:
    """Return the guide without its marks for enumeration, inside :func:`sampled_guides`."""
    return _Sampled()(guide) if _samples_guide.get() else guide


class _Sampled(Messenger):
    def _pyro_sample(self, msg: Site) -> None:
        if msg["infer"].get("enumerate") is not None:
            msg["infer"] = {**msg["infer"], "enumerate": None}


class OwnDimensions(Messenger):
    """Give each enumerated site its own dimension, also under ``pyro.markov``.

    Pyro's handler lets sites of distant steps share a dimension. Here values are summed out one by
    one, so the tables stay small without it.
    """

    def _pyro_sample(self, msg: Site) -> None:
        msg["infer"].pop("_markov_scope", None)


def sum_out(tables: Iterable[Tensor], dims: Iterable[int], names: list[str]) -> list[Tensor]:
    """Sum a product of tables of log-densities over dimensions, one by one.

    The next dimension is always the one that leaves the smallest table, so a chain of T sites needs
    no table of more than two of them.

    Args:
        tables: the logarithms of the factors.
        dims: the dimensions.
        names: the sites of all dimensions, for the error message.

    Returns:
        The logarithms of the factors of the sum, in which these dimensions have size 1.

    Raises:
        ValueError: A table would be too large for memory.
    """
    tables = list(tables)
    left = {dim for dim in dims if any(t.shape[dim] > 1 for t in tables)}

    def size_without(dim: int) -> int:
        shape = torch.broadcast_shapes(*(t.shape for t in tables if t.shape[dim] > 1))
        return math.prod(shape) // shape[dim]

    while left:
        dim = min(left, key=size_without)
        left.remove(dim)
        depending = [t for t in tables if t.shape[dim] > 1]
        check_size(names, depending)
        total = _log_sum_exp(sum(depending), dim)
        tables = [t for t in tables if t.shape[dim] == 1] + [total]
    return tables


def _log_sum_exp(table: Tensor, dim: int) -> Tensor:
    """Return the logarithm of the sum of exp, with a gradient of zero where it is minus infinity.

    There, torch's gradient is NaN.
    """
    impossible = (table.detach() == -math.inf).all(dim, keepdim=True)
    total = torch.where(impossible, 0.0, table).logsumexp(dim, keepdim=True)
    return torch.where(impossible, -math.inf, total)


def _at(table: Tensor, dim: int, index: Tensor) -> Tensor:
    """Return the part of a table (..., K, B) at one value of a dimension for each particle and row.

    Args:
        table: a table.
        dim: the dimension of the values.
        index: the number of the value, (K, B).
    """
    if table.shape[dim] == 1:
        return table
    table = table.expand(*table.shape[:-2], *index.shape)
    shape = [
        1 if d == dim else size for d, size in zip(range(-table.dim(), 0), table.shape, strict=True)
    ]
    return table.gather(dim, index.expand(shape))


def check_size(names: list[str], tables: Iterable[Tensor]) -> None:
    """Raise ValueError if the sum of the tables would be too large for memory."""
    shape = torch.broadcast_shapes(*(table.shape for table in tables))
    if math.prod(shape) > _LARGEST_TABLE:
        *values, particles, rows = shape
        raise ValueError(
            f"the table of all values of the sites {names} has {math.prod(values)} entries for "
            f"each of {particles} particles and {rows} rows, more than {_LARGEST_TABLE} in all. "
            "Enumerate fewer sites together, or use fewer rows or particles."
        )


def _flat(tables: Tables) -> Tables:
    return {name: table.reshape(table.shape[-2:]) for name, table in tables.items()}
