"""Several latent sites drawn from one distribution, each at its own site, and scored anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import pyro
import torch
from pyro.distributions import Unit
from pyro.distributions.torch_distribution import TorchDistribution, TorchDistributionMixin
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_vae import flows
from pyro_vae._programs.latent_sites import LatentSite, inside
from pyro_vae._programs.sites import DATA_PLATE, JOINT_DENSITY, ON_SUPPORT


class JointDraw:
    """One draw of all sites, made when the first of them is drawn.

    Each site takes its part, with a log-density of zero. That of all is the factor after them,
    computed from the values that the sites return: drawn here, or given by a handler.

    Args:
        distribution: of the rows of all sites, batch shape ``(B,)`` and events ``(count,)``.
        sites: that share it.
    """

    def __init__(self, distribution: TorchDistributionMixin, sites: Sequence[LatentSite]):
        self._distribution = distribution
        self._sites = sites
        # Caches let a drawn value be scored without inverting.
        self._bijections = [site.bijection.with_cache(1) for site in sites]
        self._rows: Tensor | None = None
        self._drawn: list[Tensor] = []  # the values that the sites got of the rows

    @property
    def batch_size(self) -> int:
        """B."""
        return self._distribution.batch_shape[-1]

    def sample(self, plates: Mapping[str, AbstractContextManager]) -> dict[str, Tensor]:
        """Sample every site, then tell the density of all."""
        values = {}
        for number, site in enumerate(self._sites):
            with inside(site, plates, {}):
                part = _Part(self, site, number)
                infer = {ON_SUPPORT: site.bijection}
                values[site.name] = pyro.sample(site.name, part, infer=infer)
        with plates[DATA_PLATE]:
            log_prob = self._log_prob([*values.values()])
            density = Unit(log_prob, has_rsample=True)
            name = f"{JOINT_DENSITY}_{self._sites[0].name}"
            infer = {"is_auxiliary": True, JOINT_DENSITY: True}
            pyro.sample(name, density, obs=density.sample(), infer=infer)
        return values

    def draw(self, number: int, outer: torch.Size) -> Tensor:
        """Return the value of a site, ``(*outer, *batch dimensions, *event)``, from the draw."""
        if self._rows is None:
            batch = (*outer, *self._distribution.batch_shape[-1:])
            self._rows = self._distribution.expand(batch).rsample()
        rows = self._rows.split([site.shape.numel() for site in self._sites], -1)[number]
        site = self._sites[number]
        value = self._bijections[number](site.from_rows(rows, site.event_shape))
        self._drawn.append(value)
        return value

    def _log_prob(self, values: list[Tensor]) -> Tensor:
        """The density of all values, at the data's dimension."""
        drawn = [any(value is each for each in self._drawn) for value in values]
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
                value = flows.collapse_expanded_dims(value, on_support)
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
    rows = [flows.collapse_expanded_dims(each) for each in rows]  # they may be one for all data
    batch = torch.broadcast_shapes(*(each.shape[:-1] for each in rows))
    return torch.cat([each.expand(*batch, -1) for each in rows], -1).expand(*whole, -1)


class _Part(TorchDistribution):
    """A site's part of a joint draw; its density is told with that of all."""

    arg_constraints = {}  # noqa: RUF012 - as torch declares them
    has_rsample = True

    def __init__(
        self, joint: JointDraw, site: LatentSite, number: int, batch_shape: torch.Size | None = None
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
