"""Samples the latent sites of a model from a family, given its parameters for each data point."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import pyro
import pyro.distributions as dist
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn
from torch.distributions.transforms import (
    IndependentTransform,
    ReshapeTransform,
    Transform,
    identity_transform,
)

from pyro_vae._programs.latent_sites import LatentSite, inside
from pyro_vae._programs.sites import ON_SUPPORT
from pyro_vae.distributions._circular import WrappedNormal, maps_onto_angles
from pyro_vae.guides._families import Family
from pyro_vae.guides._joint import JointDraw


class Posterior(nn.Module):
    r"""Samples latent sites from a family's distributions, given parameters for each data point.

    A single latent site has its own distribution. Several joint sites share one, see
    :class:`pyro_vae.guides._joint.JointDraw`.

    Args:
        sites: the latent sites to sample.
        family: function from D to a family of D dimensions.
        joint: use one distribution over all sites, rather than one for each.

    Raises:
        ValueError: The family does not support these dimensions, or a joint site is masked.
    """

    def __init__(
        self, sites: Sequence[LatentSite], family: Callable[[int], Family], joint: bool = True
    ):
        super().__init__()
        self.sites = tuple(sites)
        whole = _joint_family(sites, family) if joint else None
        self._joint = whole is not None
        if self._joint:
            if masked := [site.name for site in sites if site.masked]:
                raise ValueError(
                    f"latent site {masked[0]!r} is masked, so it cannot be sampled jointly with "
                    "other sites, or over an inner plate. Pass joint=False."
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
        """The number of parameters for each data point."""
        return sum(self._sizes)

    def forward(
        self,
        parameters: Tensor,
        plates: Mapping[str, AbstractContextManager],
        masks: Mapping[str, bool | Tensor | None],
    ) -> dict[str, Tensor]:
        """Sample the sites.

        Args:
            parameters: ``(*outer, B, num_parameters)``.
            plates: the plates of the model, by name.
            masks: the masks of masked sites, by name.

        Returns:
            The value of each site by name, sampled here or set by a handler.
        """
        if self._joint:
            (family,) = self.families
            return JointDraw(family(parameters), self.sites).sample(plates)
        values = {}
        parts = parameters.split(self._sizes, -1)
        for site, family, rows in zip(self.sites, self.families, parts, strict=True):
            with inside(site, plates, masks):
                fn = _at_site(site, family, rows)
                values[site.name] = pyro.sample(site.name, fn, infer={ON_SUPPORT: site.bijection})
        return values


def _joint_family(sites: Sequence[LatentSite], family: Callable[[int], Family]) -> Family | None:
    """Return one family for all dimensions of all sites, or None if they are independent."""
    several = len(sites) > 1 or bool(sites[0].batch_shape)
    maker = getattr(family, "func", family)  # of a functools.partial
    if not several or getattr(maker, "independent", False) is True:
        return None
    names = ", ".join(repr(site.name) for site in sites)
    whole = _make(family, sum(site.shape.numel() for site in sites), names)
    # A plain function of D has no attribute "independent", so ask the family that it made.
    return None if whole.independent else whole


def _make(family: Callable[[int], Family], dim: int, names: str) -> Family:
    try:
        return family(dim)
    except ValueError as error:
        raise ValueError(f"the guide cannot sample latent site {names}: {error}") from error


def _at_site(site: LatentSite, family: Family, rows: Tensor) -> TorchDistributionMixin:
    """Return the distribution of a site that is not joint with others."""
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

    For a support of angles, a Gaussian is wrapped around the circle. So its density is continuous
    on the circle.

    Args:
        base: distribution of scalars with batch shape ``(..., *event)``.
        bijection: from the reals onto the support, over the event.
        event_dim: number of the base's rightmost batch dimensions that form an event.

    Returns:
        A distribution over the support, in a form that closed-form KLs accept. For a real support
        it is the base itself. For an elementwise bijection it consists of independent scalars.
    """
    while isinstance(bijection, IndependentTransform):
        bijection = bijection.base_transform
    if bijection == identity_transform:
        return base.to_event(event_dim)
    if maps_onto_angles(bijection) and isinstance(base, dist.Normal):
        return WrappedNormal(base.loc, base.scale).to_event(event_dim)
    inner = bijection.domain.event_dim
    if isinstance(base, dist.Delta):  # a point mass gets no Jacobian term
        log_density = base.log_density.sum(tuple(range(-inner, 0))) if inner else base.log_density
        point = bijection(base.v)
        moved = dist.Delta(point, log_density, event_dim=bijection.codomain.event_dim)
        return moved.to_event(event_dim - inner)
    # With the cache, scoring a sample needs no inverse. Each call makes a new cache, so it is never
    # stale.
    bijection = bijection.with_cache(1)
    pushed = dist.TransformedDistribution(base.to_event(inner), [bijection])
    return pushed.to_event(event_dim - inner)
