"""Sample data given the latents of a run, by a second run of the model without observations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from pyro_vae._programs.enumeration import SummedOut, inner_dims
from pyro_vae._programs.pair_trace import PairTrace
from pyro_vae._programs.sites import (
    WAS_GIVEN,
    Site,
    data_frame,
    is_factor,
    random_sites,
    was_observed,
)
from pyro_vae._utils.user_warnings import warn_user
from pyro_vae.distributions._moments import closed_form_mean
from pyro_vae.distributions._supports import is_angle


def predict(run: PairTrace) -> dict[str, Tensor]:
    r"""Sample the local observed sites given the latents of a run, see ``Terms.predict``.

    Sites c that were summed out of the model are sampled from :math:`p(c|z)` first.

    Raises:
        ValueError: The guide enumerates a site, so it has no sampled latents.
    """
    return {site["name"]: run.to_particle_layout(site["value"], site) for site in drawn_sites(run)}


def drawn_sites(run: PairTrace) -> list[Site]:
    """Return the local observed sites with new samples given the latents of a run.

    Raises:
        ValueError: The guide enumerates a site, so it has no sampled latents.
    """
    run.require_drawn()
    # Sites summed out in inner plates are sampled without the factors there.
    inside = [inner_dims(site) for site in run.summed_inside]
    local = [f.site for f in run.model.values() if f.is_factor and f.local]
    beside = [site for site in local if any(plates <= inner_dims(site) for plates in inside)]
    warn_of_factors([*beside, *run.summed_inside])
    given = {}
    for together in run.summed_out:
        for name, index in together.sample().items():
            site = together.sites[name]
            given[name] = site | {"value": _values(site)[run.placed(index, site)]}
    return drawn_observations(run.replay_unobserved(given))


def means(run: PairTrace) -> Iterator[tuple[Site, Tensor]]:
    r"""Yield the local observed sites with new samples, and their means given the latents.

    A mean given sites c that were summed out is averaged over :math:`p(c|z)`. If a site has no
    mean, the result is its sample.
    """
    drawn, inside = drawn_sites(run), run.summed_inside
    if not (run.summed_out or inside):
        yield from ((site, mean_or_draw(site)) for site in drawn)
        return
    given = {name: site for group in run.summed_out for name, site in group.sites.items()}
    trace = run.replay_unobserved(given | {site["name"]: site for site in inside})
    enumerated = {site["name"]: site for site in drawn_observations(trace)}
    for site in drawn:
        mean = known_mean(enumerated[site["name"]])
        # Angles have no average.
        if mean is None or is_angle(site["fn"]):
            yield site, site["value"]
            continue
        for each in reversed(inside):  # a later one may depend on an earlier one
            mean = _averaged_inside(mean, each, trace.nodes[each["name"]]["fn"], site)
        for together in run.summed_out:
            mean = _averaged(mean, together, site, run)
        yield site, mean.reshape(mean.shape[mean.dim() - site["value"].dim() :])


def mean_or_draw(site: Site) -> Tensor:
    """Return the mean of a site's distribution, or the sample if there is no mean."""
    mean = known_mean(site)
    return site["value"] if mean is None else mean


def warn_of_factors(sites: Iterable[Site]) -> None:
    """Warn that samples of a model do not take its factors into account.

    Args:
        sites: the sites of a run of the model. There is no warning if it sampled no latent.
    """
    sites = [*sites]
    sampled = [
        data_frame(site) is not None
        for site in sites
        if not (site["is_observed"] or was_observed(site) or site["infer"].get(WAS_GIVEN))
    ]
    # A factor outside of the plate is a penalty, such as on weights, unless latents are there too.
    factors = [
        site["name"]
        for site in sites
        if is_factor(site) and (data_frame(site) is not None or not all(sampled))
    ]
    if factors and sampled:
        warn_user(
            f"the model has the factor {factors[0]!r}, which is not a density. Latents are sampled "
            "from the distributions of their sites, and the factor has no effect. If it depends on "
            "latents, they do not follow the joint density of the model.",
            key="factor",
        )


def drawn_observations(trace: poutine.Trace) -> list[Site]:
    """Return the sites of the plate ``"data"`` whose observations were removed."""
    return [
        site
        for site in random_sites(trace)
        if was_observed(site) and data_frame(site) is not None and not is_factor(site)
    ]


def _values(site: Site) -> Tensor:
    """Return the values of an enumerated site along the first dimension."""
    event_dim = len(site["fn"].event_shape)
    values = site["value"].movedim(site["infer"]["_enumerate_dim"] - event_dim, 0)
    return values.flatten(1, values.dim() - event_dim - 1)[:, 0]


def known_mean(site: Site) -> Tensor | None:
    """Return the mean of a site's distribution, or None if it does not exist or is unknown.

    Angles have a mean direction.
    """
    mean = closed_form_mean(site["fn"])
    return None if mean is None or mean.isnan().any() else mean


def _averaged(mean: Tensor, together: SummedOut, site: Site, run: PairTrace) -> Tensor:
    """Average a mean over sites that were summed out, if it depends on them."""
    event_dim = len(site["fn"].event_shape)
    dims = {}
    for name, each in together.sites.items():
        dim = each["infer"]["_enumerate_dim"] - event_dim
        if -dim <= mean.dim() and mean.shape[dim] > 1:
            dims[name] = dim
    if not dims:
        return mean
    weights = run.placed(together.log_prob(dims).exp(), site, together.width)
    weights = weights.reshape(*weights.shape, *(1,) * event_dim)
    return (mean * weights).sum([*dims.values()], keepdim=True)


def _averaged_inside(
    mean: Tensor, enumerated: Site, fn: TorchDistributionMixin, site: Site
) -> Tensor:
    """Average a mean over a site that was summed out inside an inner plate.

    No latent depends on such a site. So its density given the latents is its own, ``fn``.
    """
    event_dim, dim = len(site["fn"].event_shape), enumerated["infer"]["_enumerate_dim"]
    if event_dim - dim > mean.dim() or mean.shape[dim - event_dim] == 1:
        return mean
    weights = fn.log_prob(enumerated["value"]).softmax(dim)
    weights = weights.reshape(*weights.shape, *(1,) * event_dim)
    return (mean * weights).sum(dim - event_dim, keepdim=True)
