"""From a family and its parameters for each datum to samples at the latent sites of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistribution, TorchDistributionMixin
from torch import Tensor, nn
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import (
    IndependentTransform,
    ReshapeTransform,
    Transform,
    identity_transform,
)

from pyro_vae import flows
from pyro_vae.guides.families import Family
from pyro_vae.guides.latents import LatentSite
from pyro_vae.sites import DATA_PLATE

JOINT_DENSITY = "_joint_density"  # and the first site's name


class Posterior(nn.Module):
    r"""Samples latent sites from a family's distributions, given parameters for each datum.

    One latent site takes a distribution of its own. Several that are joint take their parts of one
    draw, and the density of all stands at a ``pyro.factor`` behind them, so that it is had at any
    values, drawn or given.

    Args:
        sites: to sample.
        family: makes the family of D dimensions.
        joint: one distribution over all sites, rather than one for each.

    Raises:
        ValueError: the family cannot have these dimensions; joint sites are masked.
    """

    def __init__(
        self, sites: Sequence[LatentSite], family: Callable[[int], Family], joint: bool = True
    ):
        super().__init__()
        self.sites = tuple(sites)
        several = len(sites) > 1 or bool(sites[0].batch_shape)
        names = ", ".join(repr(site.name) for site in sites)
        whole = _make(family, sum(site.shape.numel() for site in sites), names)
        self._joint = joint and several and not whole.independent
        if self._joint:
            if masked := [site.name for site in sites if site.masked]:
                raise ValueError(
                    f"latent site {masked[0]!r} is masked, and cannot be drawn jointly with "
                    "others: pass joint=False"
                )
            made = [whole]
            self._sizes = [whole.num_parameters]
        else:
            made = [_make(family, site.event_shape.numel(), repr(site.name)) for site in sites]
            self._sizes = [
                each.num_parameters * site.batch_shape.numel()
                for each, site in zip(made, sites, strict=True)
            ]
        self.families = nn.ModuleList(made)

    @property
    def num_parameters(self) -> int:
        """How many numbers a datum takes."""
        return sum(self._sizes)

    def forward(
        self,
        parameters: Tensor,
        plates: Mapping[str, pyro.plate],
        masks: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Sample the sites.

        Args:
            parameters: ``(*outer, B, num_parameters)``.
            plates: of the model, by name.
            masks: of masked sites, by name.

        Returns:
            The values by site: drawn, or given by a handler.
        """
        if self._joint:
            (family,) = self.families
            return _Joint(family(parameters), self.sites).sample(plates)
        values = {}
        parts = parameters.split(self._sizes, -1)
        for site, family, rows in zip(self.sites, self.families, parts, strict=True):
            with _surroundings(site, plates, masks):
                values[site.name] = pyro.sample(site.name, _at_site(site, family, rows))
        return values


def _make(family: Callable[[int], Family], dim: int, names: str) -> Family:
    try:
        return family(dim)
    except ValueError as error:
        raise ValueError(f"the guide cannot sample latent site {names}: {error}") from error


def _at_site(site: LatentSite, family: Family, rows: Tensor) -> TorchDistributionMixin:
    """The distribution of a site by itself."""
    if family.independent:
        groups = rows.unflatten(-1, (-1, site.shape.numel())).unbind(-2)
        numbers = [site.from_rows(group, site.event_shape) for group in groups]
        return push_forward(family(numbers), site.bijection, len(site.event_shape))
    distribution = family(site.from_rows(rows, (family.num_parameters,)))
    transforms: list[Transform] = []
    if len(site.event_shape) != 1:
        transforms.append(ReshapeTransform((family.dim,), site.event_shape))
    bijection = site.bijection
    while isinstance(bijection, IndependentTransform):
        bijection = bijection.base_transform
    if bijection != identity_transform:
        if missing := len(site.event_shape) - bijection.domain.event_dim:
            bijection = IndependentTransform(bijection, missing)
        transforms.append(bijection.with_cache(1))
    if not transforms:
        return distribution
    return dist.TransformedDistribution(distribution, transforms)


def push_forward(
    base: TorchDistributionMixin, bijection: Transform, event_dim: int
) -> TorchDistributionMixin:
    """Map a distribution of unconstrained scalars through a bijection onto a support.

    Args:
        base: distribution of scalars, of batch shape ``(..., *event)``.
        bijection: from the reals onto the support, over the event.
        event_dim: how many of the base's rightmost batch dimensions make an event.

    Returns:
        A distribution over the support, in the form that closed-form KLs are known for: the base
        itself where the support is real, and independent scalars where the bijection acts so.
    """
    while isinstance(bijection, IndependentTransform):
        bijection = bijection.base_transform
    if bijection == identity_transform:
        return base.to_event(event_dim)
    inner = bijection.domain.event_dim
    if isinstance(base, dist.Delta):  # a point has no volume that a bijection could change
        log_density = base.log_density.sum(tuple(range(-inner, 0))) if inner else base.log_density
        point = bijection(base.v)
        moved = dist.Delta(point, log_density, event_dim=bijection.codomain.event_dim)
        return moved.to_event(event_dim - inner)
    # The cache lets a sample be scored without inverting; a new one for each draw is never stale.
    bijection = bijection.with_cache(1)
    pushed = dist.TransformedDistribution(base.to_event(inner), [bijection])
    return pushed.to_event(event_dim - inner)


@contextlib.contextmanager
def _surroundings(
    site: LatentSite, plates: Mapping[str, pyro.plate], masks: Mapping[str, Tensor]
) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for frame in site.plates:
            stack.enter_context(plates[frame.name])
        if site.name in masks:
            stack.enter_context(poutine.mask(mask=masks[site.name]))
        yield


class _Joint:
    """One draw of all sites, made when the first of them is drawn."""

    def __init__(self, distribution: TorchDistributionMixin, sites: Sequence[LatentSite]):
        self._distribution = distribution
        self._sites = sites
        # Caches let a drawn value be scored without inverting.
        self._bijections = [site.bijection.with_cache(1) for site in sites]
        self._rows: Tensor | None = None

    @property
    def batch_size(self) -> int:
        """B."""
        return self._distribution.batch_shape[-1]

    def sample(self, plates: Mapping[str, pyro.plate]) -> dict[str, Tensor]:
        """Sample every site, then tell the density of all."""
        values = {}
        for number, site in enumerate(self._sites):
            with _surroundings(site, plates, {}):
                values[site.name] = pyro.sample(site.name, _Part(self, site, number))
        with plates[DATA_PLATE]:
            log_prob = self._log_prob([*values.values()])
            pyro.factor(f"{JOINT_DENSITY}_{self._sites[0].name}", log_prob, has_rsample=True)
        return values

    def draw(self, number: int, outer: torch.Size) -> Tensor:
        """Return the value of a site, ``(*outer, *batch dimensions, *event)``, from the draw."""
        if self._rows is None:
            batch = (*outer, *self._distribution.batch_shape[-1:])
            self._rows = self._distribution.expand(batch).rsample()
        rows = self._rows.split([site.shape.numel() for site in self._sites], -1)[number]
        site = self._sites[number]
        value = self._bijections[number](site.from_rows(rows, site.event_shape))
        value._drawn_by = self
        return value

    def _log_prob(self, values: list[Tensor]) -> Tensor:
        """The density of all values, at the data's dimension."""
        drawn = [getattr(value, "_drawn_by", None) is self for value in values]
        if any(drawn) and not all(drawn):
            given, taken = (self._sites[drawn.index(flag)].name for flag in (False, True))
            raise ValueError(
                f"latent site {given!r} is given and {taken!r} is drawn, but the guide draws them "
                "jointly: give all of them, or build the guide with joint=False"
            )
        rows, log_det = [], 0.0
        for site, bijection, value in zip(self._sites, self._bijections, values, strict=True):
            event_dim = len(site.event_shape)
            if not all(drawn):
                on_support = event_dim - bijection.domain.event_dim + bijection.codomain.event_dim
                value = flows.without_repetitions(value, on_support)
            unconstrained = bijection.inv(value)
            rows.append(site.to_rows(unconstrained, self.batch_size, event_dim))
            change = bijection.log_abs_det_jacobian(unconstrained, value)
            change = site.to_rows(change, self.batch_size, event_dim - bijection.domain.event_dim)
            log_det = log_det + change.sum(-1)
        # The draw itself, since a flow keeps what it needs to score it.
        whole = self._rows if all(drawn) else _concatenate(rows)
        log_prob = self._distribution.log_prob(whole) - log_det
        site = self._sites[0]
        left, right = site.nesting + site.data_dim, -1 - site.data_dim
        *outer, batch_size = log_prob.shape
        return log_prob.reshape(*outer, *(1,) * left, batch_size, *(1,) * right)


def _concatenate(rows: list[Tensor]) -> Tensor:
    whole = torch.broadcast_shapes(*(each.shape[:-1] for each in rows))
    rows = [flows.without_repetitions(each) for each in rows]  # they may be one for all data
    batch = torch.broadcast_shapes(*(each.shape[:-1] for each in rows))
    return torch.cat([each.expand(*batch, -1) for each in rows], -1).expand(*whole, -1)


class _Part(TorchDistribution):
    """A site's part of a joint draw; its density is told with that of all."""

    arg_constraints = {}  # noqa: RUF012 - as torch declares them
    has_rsample = True

    def __init__(
        self, joint: _Joint, site: LatentSite, number: int, batch_shape: torch.Size | None = None
    ):
        self._joint, self._site, self._number = joint, site, number
        if batch_shape is None:
            batch_shape = site.batch_dims(joint.batch_size)
        event_shape = site.bijection.forward_shape(site.event_shape)
        super().__init__(torch.Size(batch_shape), torch.Size(event_shape), validate_args=False)

    @property
    def support(self) -> Constraint:
        """The site's."""
        return self._site.bijection.codomain

    def expand(self, batch_shape, _instance=None) -> _Part:
        """Return the part with a larger batch shape."""
        return _Part(self._joint, self._site, self._number, batch_shape)

    def rsample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 - as torch has it
        """Take the part."""
        if sample_shape:
            raise ValueError("a joint draw takes no sample_shape: use a plate")
        batch = self.batch_shape
        return self._joint.draw(self._number, batch[: max(0, len(batch) - self._site.nesting)])

    def log_prob(self, value: Tensor) -> Tensor:
        """Return zeros: the factor behind the sites has the density."""
        return value.new_zeros(self.batch_shape)
