"""What a guide makes of given rows: the posteriors of one latent, and their even mixture.

A guide is run here inside of a model, whose handlers must not see it; and only up to the latent,
which is not drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Normal, Unit
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Independent

from pyro_vae._programs.agreement import is_delta
from pyro_vae._programs.runs import trace_of
from pyro_vae._programs.sites import Site, base_distribution, data_frame, random_sites
from pyro_vae._utils.random import restored_generators
from pyro_vae.distributions._mixtures import MixtureOfDiagNormals, UniformMixture

Guide = Callable[..., Any]


def posteriors(guide: Guide, site: str, rows: Sequence[Tensor]) -> TorchDistributionMixin:
    """Return q(z|x_n) of the latent at a site, as a batch of distributions.

    Args:
        guide: program of q(z|x), checked by :func:`check_guide`.
        site: name of the latent.
        rows: x ``(N, *event)`` and covariates.

    Returns:
        Batch shape (N,).
    """
    try:
        with poutine.block(), _StopAt(site):
            guide(*rows)
    except _Reached as reached:
        return reached.distribution
    raise ValueError(f"the guide has no site {site!r}")


def uniform_mixture(parts: Sequence[TorchDistributionMixin]) -> TorchDistributionMixin:
    """Mix distributions with equal weights, Gaussians by matrix products.

    Args:
        parts: each of batch shape (n_i,).
    """
    gaussians = [diagonal_gaussian(part) for part in parts]
    if None in gaussians:
        return UniformMixture(parts)
    loc, scale = (torch.cat(each) for each in zip(*gaussians, strict=True))
    return MixtureOfDiagNormals(loc.new_zeros(len(loc)), loc, scale)


def diagonal_gaussian(distribution: TorchDistributionMixin) -> tuple[Tensor, Tensor] | None:
    """Return mean and standard deviation (N, D) if these are independent Gaussians, else None."""
    base = base_distribution(distribution)
    vectors = isinstance(distribution, Independent) and len(distribution.event_shape) == 1
    if not vectors or not isinstance(base, torch.distributions.Normal):
        return None
    return base.loc, base.scale


def check_guide(guide: Guide, site: str, rows: Sequence[Tensor]) -> None:
    """Refuse a guide whose posterior of a latent is not known from x alone.

    Raises:
        ValueError: the guide lacks the site, or gives it a point, or a density that it shares
            with others, or one that depends on what it drew before.
    """
    with restored_generators():  # a check that is made once must not move the noise
        found, once_more = _sites(guide, rows), _sites(guide, rows)
    if site not in found or data_frame(found[site]) is None:
        raise ValueError(
            f'the guide has no site {site!r} in the plate "data"; its sites are {[*found]}. Pass '
            "the name of the latent that the prior is for: site=..."
        )
    if is_delta(found[site]):
        raise ValueError(
            f"the guide gives latent site {site!r} a point (a Delta), which has no density"
        )
    shared = [
        name
        for name, each in found.items()
        if isinstance(each["fn"], Unit) or each["infer"].get("is_auxiliary")
    ]
    if shared:
        raise ValueError(
            f"the guide tells the density of latent site {site!r} together with others, at "
            f"{shared[0]!r}: build it with joint=False"
        )
    with torch.no_grad():
        value = found[site]["value"].clone()  # not as drawn: caches would know it
        again = once_more[site]["fn"].log_prob(value)
        if site != next(iter(found)) and not torch.equal(again, found[site]["fn"].log_prob(value)):
            raise ValueError(
                f"the guide's distribution of latent site {site!r} depends on what it draws "
                f"before, {[*found][: [*found].index(site)]}: its aggregated posterior is an "
                "integral. Let the guide draw that latent first, given x alone."
            )


def _sites(guide: Guide, rows: Sequence[Tensor]) -> dict[str, Site]:
    with torch.no_grad(), poutine.block():
        trace = trace_of(guide, *rows)
    return {site["name"]: site for site in random_sites(trace)}


def stand_in(event_shape: Sequence[int], like: Tensor) -> TorchDistributionMixin:
    """Return what a model has for a prior while its guide, run for that, traces it for shapes.

    Raises:
        ValueError: the guide runs the model for more than that.
    """
    if torch.is_grad_enabled():
        raise ValueError(
            "the guide runs the model, whose prior runs the guide: take a guide that does not "
            "refine its posteriors by the model"
        )
    zeros = torch.zeros(tuple(event_shape), dtype=like.dtype, device=like.device)
    return Normal(zeros, torch.ones_like(zeros)).to_event(len(event_shape))


class _Reached(Exception):  # noqa: N818 - no error, but a way out
    def __init__(self, distribution: TorchDistributionMixin):
        super().__init__()
        self.distribution = distribution


class _StopAt(Messenger):
    """Ends a program where it would draw a site."""

    def __init__(self, site: str):
        super().__init__()
        self._site = site

    def _pyro_sample(self, msg: Site) -> None:
        if msg["name"] == self._site:
            raise _Reached(msg["fn"])
