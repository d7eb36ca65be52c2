"""log q - log p at the latents of a run, by site and by dimension; log q given other data."""

from __future__ import annotations

from typing import Any

from pyro.distributions import Delta
from torch import Tensor
from torch.distributions import Normal

from pyro_vae._programs.pair_trace import Factor, PairTrace
from pyro_vae._programs.sites import base_distribution, closed_form_kl, mask_of
from pyro_vae.distributions._kl_divergences import known_kl


def kl(run: PairTrace, *, local: bool) -> Tensor:
    """Sum log q - log p over the local (K, B) or global (K,) latents, see ``Terms.kl``."""
    total = run.zeros(local)
    for name, q in run.guide.items():
        if q.local is local:
            total = total + _kl_of_site(run, name)
    return total


def kl_of_sites(run: PairTrace) -> dict[str, Tensor]:
    """Return log q - log p of each local latent, (K, B), see ``Terms.kl_of_sites``.

    Raises:
        ValueError: The guide or the model has one joint density for several latents.
    """
    names = [name for name in run.latents if run.model[name].local]
    if together := [group for group in run.entangled if len(group) > 1]:
        raise ValueError(
            f"cannot compute the KL of each site: the latents {together[0]} have a joint "
            "prior, because they depend on one site that was summed out of the model. Use the KL "
            "of all latents"
        )
    if (behind := _joint_density(run)) is None:
        return {name: _kl_of_site(run, name) for name in names}
    if len(names) > 1:
        raise ValueError(
            f"cannot compute the KL of each site: the guide gives sites {names} one joint density, "
            f"at {behind!r}. Build the guide with joint=False, or use the KL of all latents"
        )
    return {names[0]: kl(run, local=True)}


def kl_of_dimensions(run: PairTrace) -> dict[str, Tensor]:
    """Return log q - log p of each element of each local latent, see ``Terms.kl_of_dimensions``.

    Raises:
        ValueError: The dimensions are masked or scaled, or not independent under both programs.
    """
    if run.entangled or run.averaged:
        raise ValueError(
            "cannot compute the KL of each dimension: latents depend on an enumerated site. Use "
            "the KL of the site"
        )
    found = {}
    for name in run.latents:
        q, p = run.guide[name], run.model[name]
        if q.local:
            each, of_model = _each_dimension(run, q), _each_dimension(run, p)
            value = q.site["value"]
            difference = each.log_prob(value) - of_model.log_prob(value)
            known = known_kl(each, of_model) if _in_order(run) else None
            if known is not None:
                difference = known
            found[name] = run.to_particle_layout(difference, q.site)
    return found


def log_guide_of_pairs(run: PairTrace) -> Tensor:
    """Return log q of each element of a latent given each data point, see ``Terms``.

    Raises:
        ValueError: There is more than one local latent, or its dimensions are not independent.
        TypeError: The latent is not Gaussian under the guide.
    """
    names = [name for name in run.latents if run.guide[name].local]
    if len(names) != 1:
        raise ValueError(
            "the aggregated posterior of a minibatch needs one latent site in the plate "
            f'"data", got {names}. Sample them as one site'
        )
    q = run.guide[names[0]]
    each = _each_dimension(run, q)
    if not isinstance(each, Normal):
        raise TypeError(
            "the aggregated posterior of a minibatch needs Gaussians with independent dimensions, "
            f"but latent site {names[0]!r} has {type(each).__name__} under the guide. Use "
            "AmortizedNormal"
        )
    value, loc, scale = (
        run.to_particle_layout(v, q.site).reshape(run.num_particles, run.batch_size, -1)
        for v in (q.site["value"], each.loc, each.scale)
    )
    return Normal(loc.unsqueeze(1), scale.unsqueeze(1)).log_prob(value.unsqueeze(2))


def _kl_of_site(run: PairTrace, name: str) -> Tensor:
    """Return log q - log p at a site of the guide, or its expectation if known."""
    q = run.guide[name]
    if name not in run.latents:
        return q.log_prob
    p = run.model[name]
    known = _in_order(run) and not run.enumerates  # averaged terms need the sampled difference
    closed_form = closed_form_kl(q.site, p.site) if known else None
    if closed_form is not None:
        return run.reduced(closed_form, q.site)
    return q.log_prob - p.log_prob


def _in_order(run: PairTrace) -> bool:
    """Return whether the guide samples the latents in the model's order.

    In another order, a closed form would hold fixed the sites that depend on its site.
    """
    return [name for name in run.guide if name in run.latents] == run.latents


def _each_dimension(run: PairTrace, factor: Factor) -> Any:
    """Return the distribution of each element of a latent, if the elements are independent."""
    site = factor.site
    each = base_distribution(site["fn"])
    if each.event_shape or _joint_density(run) is not None or isinstance(each, Delta):
        raise ValueError(
            f"cannot compute the KL of each dimension: those of latent site {factor.name!r} are "
            "not independent, or have no density, in the model or the guide. Use a guide such as "
            "AmortizedNormal, or the KL of the site"
        )
    if mask_of(site) is not None or factor.scaled:
        raise ValueError(
            f"cannot compute the KL of each dimension: latent site {factor.name!r} is masked or "
            "scaled. Use the KL of the site"
        )
    return each


def _joint_density(run: PairTrace) -> str | None:
    """Return the site where the guide has the joint density of its latents, or None."""
    behind = [f.name for f in run.guide.values() if f.local and f.name not in run.latents]
    return behind[0] if behind else None
