"""Samples, quantiles and the density of the prior of one latent site."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_vae._programs.evaluation import evaluation_mode
from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.parameters import parameter_store
from pyro_vae._programs.runs import trace_of
from pyro_vae._programs.sites import (
    Site,
    Unobserve,
    base_distribution,
    data_frame,
    is_discrete,
    is_real,
    random_sites,
    to_particle_layout,
    was_observed,
)
from pyro_vae._utils.messages import first_line
from pyro_vae._utils.random import seeded
from pyro_vae._utils.value_checks import values_checked
from pyro_vae.datasets._columns import Column
from pyro_vae.distributions._supports import support_of
from pyro_vae.plots._density import GridDensity

_AT_ONCE = 500
_RARE = 0.001  # share of the prior beyond each bound
NUM_SAMPLES = 5000
_FREE = "whose numbers can change alone"
NOT_FREE = f"The plot needs a latent {_FREE}. Use pv.plots.interpolations."


class PriorOfSite:
    """The prior of one latent site of a model.

    Args:
        model: program of p(x, z).
        guide: the program whose parameter store the model uses.
        columns: x and covariates, on the device of the pair. Samples use their rows in turn.
        rows: the rows to use; by default, all.
        site: name of the latent site, or None for the only one.
        seed: of the samples.

    Raises:
        ValueError: The model has no such latent, or not exactly one, or the latent is discrete. The
            prior cannot be sampled.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        columns: Sequence[Column],
        site: str | None,
        seed: int | None,
        rows: Tensor | None = None,
    ):
        self._model, self._guide, self._columns, self._seed = model, guide, columns, seed
        self._rows = torch.arange(len(columns[0])) if rows is None else rows
        sites = self._sites(self._batch(self._rows[:2]))
        names = list(sites)
        if site is None and len(names) != 1:
            raise ValueError(
                "the plot needs a latent in the plate of the data points, and the model has "
                f"{len(names)}. "
                + ("Sample one in the model." if not names else self._one_of(sites))
            )
        if site is not None and site not in names:
            raise ValueError(
                f"site must be one of the latents of the model, {names}, got site={site!r}"
            )
        self.site = names[0] if site is None else site
        self._first = sites[self.site]
        self._is_root = names[0] == self.site
        if is_discrete(self._first["fn"]):
            raise ValueError(
                f"site {self.site!r} is discrete, and the plot needs a continuous latent. Pass the "
                f"name of another latent: the model has {names}"
            )

    def _one_of(self, sites: dict[str, Site]) -> str:
        shapes = {name: tuple(self._values(site).shape[1:]) for name, site in sites.items()}
        each = ", ".join(f"site={name!r} of shape {shape}" for name, shape in shapes.items())
        return f"Pass one of them: {each}. The others are sampled from the model."

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the latent of one data point."""
        return tuple(self._values(self._first).shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the latent."""
        return self._value.dtype

    def samples(self, count: int = NUM_SAMPLES) -> Tensor:
        """Return samples ``(count, numbers of the latent)`` on the CPU, in float64."""
        found = []
        with seeded(self._seed):
            for some in (torch.arange(count) % len(self._rows)).split(_AT_ONCE):
                batch = self._batch(self._rows[some])
                values = self._values(self._sites(batch)[self.site])
                found.append(values.reshape(len(values), -1))
        return torch.cat(found).cpu().double()

    @torch.no_grad()
    def quantiles(self, levels: Tensor) -> Tensor:
        """Return quantiles ``(levels, numbers of the latent)`` of the marginals, in float64.

        They are exact for independent numbers with a known quantile function. All others are
        estimated from samples.
        """
        if self._marginals is not None:
            with contextlib.suppress(NotImplementedError):
                rows = torch.stack([self._marginals.icdf(p) for p in levels.to(self._value)])
                return rows[:, 0].reshape(len(rows), -1).cpu().double()
        return self.samples().quantile(levels.double(), dim=0)

    def bounds(self) -> Tensor | None:
        """Return low and high quantiles ``(2, numbers)``, or None if any real number is possible.

        Raises:
            ValueError: One number alone cannot change, as on a simplex.
        """
        self.require_free_numbers()
        if _unconstrained_shape(self._fn) is None or is_real(support_of(self._fn)):
            return None
        return self.quantiles(torch.tensor([_RARE, 1 - _RARE]))

    def require_free_numbers(self) -> None:
        """Raise ValueError if one number of the latent alone cannot change, as on a simplex."""
        if _unconstrained_shape(self._fn) not in (None, self._fn.event_shape):
            raise ValueError(
                f"the plot needs a latent {_FREE}, but those of site {self.site!r} depend on each "
                "other, as on a simplex. Use pv.plots.interpolations"
            )

    @torch.no_grad()
    def density(self, dimensions: list[int], grids: list[Tensor]) -> GridDensity | None:
        """Return the exact density of some dimensions on a grid, or None if it is unknown.

        It is known for independent numbers, and for all numbers of a latent together.
        """
        event = self._value.shape[1:]
        rows = self._value[:1].flatten().expand(len(grids[0]), -1).clone()
        if self._marginals is not None:
            found = []
            for dimension, grid in zip(dimensions, grids, strict=True):
                values = rows.clone()
                values[:, dimension] = grid.to(rows)
                density = _density(self._marginals, values.reshape(-1, 1, *event))[:, 0]
                found.append(density.reshape(len(grid), -1)[:, dimension])
            return GridDensity.of_marginals(found, grids)
        if not self._is_fixed or sorted(dimensions) != list(range(event.numel())):
            return None
        if _unconstrained_shape(self._fn) != self._fn.event_shape:
            return None
        points = torch.cartesian_prod(*grids).reshape(-1, len(grids))
        points = points[:, torch.tensor(dimensions).argsort()].to(rows)
        joint = _density(self._fn, points.reshape(-1, 1, *event))[:, 0]
        return GridDensity.of_joint(joint.reshape([len(grid) for grid in grids]), grids)

    @cached_property
    def _is_fixed(self) -> bool:
        """Whether the prior is one distribution for all data points, without inner plates."""
        shape = self._value.shape
        if not self._is_root or self._values(self._first).shape != shape:
            return False
        if self._fn.batch_shape + self._fn.event_shape != shape:
            return False
        scores = self._fn.log_prob(self._value[:1].expand(shape))
        return bool(torch.allclose(scores, scores[:1].expand_as(scores)))

    @cached_property
    def _marginals(self) -> Any:
        """The distribution of each number, if they are independent and :attr:`_is_fixed`."""
        base = base_distribution(self._fn)
        independent = base.event_shape == () and base.batch_shape == self._value.shape
        return base if independent and self._is_fixed else None

    def _batch(self, rows: Tensor) -> tuple[Tensor, ...]:
        return tuple(column[rows.to(column.device)] for column in self._columns)

    @property
    def _fn(self) -> Any:
        return self._first["fn"]

    @property
    def _value(self) -> Tensor:
        return self._first["value"].detach()

    def _sites(self, batch: tuple[Tensor, ...]) -> dict[str, Site]:
        """Run the model, and return its latents in the plate of the data points, in order."""
        try:
            with parameter_store(self._model, self._guide), evaluation_mode(self._model):
                trace = trace_of(Unobserve()(self._model), *batch)
        except NotImplementedError as error:
            raise ValueError(
                "the plot needs samples of the prior, but sampling from the model failed (cause: "
                f"{first_line(error)}). Replace improper priors by proper ones"
            ) from error
        return {
            site["name"]: site
            for site in random_sites(trace)
            if not was_observed(site) and not site["is_observed"] and data_frame(site) is not None
        }

    @staticmethod
    def _values(site: Site) -> Tensor:
        return to_particle_layout(site["value"], site, None)[0].detach()


def _unconstrained_shape(fn: Any) -> torch.Size | None:
    """Return the shape of a value in unconstrained space, or None if it is unknown.

    It is smaller than that of the value on a simplex, for example.
    """
    try:
        return biject_to(support_of(fn)).inverse_shape(fn.event_shape)
    except (NotImplementedError, ValueError):
        return None


def _density(fn: Any, values: Tensor) -> Tensor:
    """Return the density of a distribution on the CPU, in float64; it is zero off the support."""
    with values_checked(False):
        density = fn.log_prob(values).exp()
    return torch.where(support_of(fn).check(values), density, 0.0).cpu().double()
