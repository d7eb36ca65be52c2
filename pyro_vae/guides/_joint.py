"""Several latent sites sampled from one joint distribution, which scores any values."""

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
from pyro_vae.distributions._moments import GAUSSIANS, pushed_moments


class JointDraw:
    """One joint sample of all sites, made when the first of them is sampled.

    Each site returns its part of the sample, with a log-density of zero. A factor after the sites
    adds the joint log-density. It scores the values that the sites return, which are sampled here
    or set by a handler.

    Args:
        distribution: distribution of the rows of all sites, with batch shape ``(B,)`` and event
            shape ``(count,)``.
        sites: the sites that share the distribution.
    """

    def __init__(self, distribution: TorchDistributionMixin, sites: Sequence[LatentSite]):
        self._distribution = distribution
        self._sites = sites
        # With the caches, scoring a sampled value needs no inverse.
        self._bijections = [site.bijection.with_cache(1) for site in sites]
        self._rows: Tensor | None = None
        self._drawn: list[Tensor] = []  # the values computed from the rows

    @property
    def batch_size(self) -> int:
        """B."""
        return self._distribution.batch_shape[-1]

    def sample(self, plates: Mapping[str, AbstractContextManager]) -> dict[str, Tensor]:
        """Sample every site, then add the factor with the joint log-density."""
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
        """Return a site's part of the sample, ``(*outer, *batch dimensions, *event)``."""
        if self._rows is None:
            batch = (*outer, *self._distribution.batch_shape[-1:])
            self._rows = self._distribution.expand(batch).rsample()
        rows = self._rows.split([site.shape.numel() for site in self._sites], -1)[number]
        site = self._sites[number]
        value = self._bijections[number](site.from_rows(rows, site.event_shape))
        self._drawn.append(value)
        return value

    def moments(self, number: int) -> tuple[Tensor, Tensor]:
        """Return mean and variance of a site's part, in the layout of its samples.

        Raises:
            NotImplementedError: They have no closed form.
        """
        site = self._sites[number]
        sizes = [each.shape.numel() for each in self._sites]
        rows = (self._distribution.mean, self._distribution.variance)
        parts = [site.from_rows(r.split(sizes, -1)[number], site.event_shape) for r in rows]
        gaussian = isinstance(self._distribution, GAUSSIANS)
        found = pushed_moments(*parts, site.bijection, gaussian=gaussian)
        if found is None:
            raise NotImplementedError
        return found

    def _log_prob(self, values: list[Tensor]) -> Tensor:
        """Return the joint log-density of all values, with the batch in the data dimension."""
        drawn = [any(value is each for each in self._drawn) for value in values]
        if any(drawn) and not all(drawn):
            given, taken = (self._sites[drawn.index(flag)].name for flag in (False, True))
            raise ValueError(
                f"latent site {given!r} is given and {taken!r} is drawn, but the guide samples "
                "them jointly. Give the values of all latent sites, or build the guide with "
                "joint=False."
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
        # Score the original sample: a flow has cached its log-determinant.
        whole = self._rows if all(drawn) else _concatenate(rows)
        log_prob = self._distribution.log_prob(whole) - log_det
        site = self._sites[0]
        left, right = site.nesting + site.data_dim, -1 - site.data_dim
        *outer, batch_size = log_prob.shape
        return log_prob.reshape(*outer, *(1,) * left, batch_size, *(1,) * right)


def _concatenate(rows: list[Tensor]) -> Tensor:
    whole = torch.broadcast_shapes(*(each.shape[:-1] for each in rows))
    rows = [flows.collapse_expanded_dims(each) for each in rows]  # all data may share one row
    batch = torch.broadcast_shapes(*(each.shape[:-1] for each in rows))
    return torch.cat([each.expand(*batch, -1) for each in rows], -1).expand(*whole, -1)


class _Part(TorchDistribution):
    """One site's part of a joint sample; the factor after the sites has its log-density."""

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
        """The support of the site."""
        return self._site.bijection.codomain

    @property
    def mean(self) -> Tensor:
        """The mean of the site's part, if it has a closed form."""
        return self._joint.moments(self._number)[0]

    @property
    def variance(self) -> Tensor:
        """The variance of each number of the site's part, if it has a closed form."""
        return self._joint.moments(self._number)[1]

    def expand(self, batch_shape, _instance=None) -> _Part:
        """Return the part with a larger batch shape."""
        return _Part(self._joint, self._site, self._number, batch_shape)

    def rsample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 - as in torch
        """Return this site's part of the joint sample."""
        if sample_shape:
            raise ValueError("sample_shape must be empty for a joint sample. Use a plate.")
        batch = self.batch_shape
        return self._joint.draw(self._number, batch[: max(0, len(batch) - self._site.nesting)])

    def log_prob(self, value: Tensor) -> Tensor:
        """Return zeros, because the factor after the sites has the log-density."""
        return value.new_zeros(self.batch_shape)
