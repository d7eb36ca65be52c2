"""The guide's posteriors of one latent for given rows, and their uniform mixture.

The guide runs inside a model here, so its sites are blocked from the model's handlers. It runs only
up to the latent, which is not sampled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Normal
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Independent

from pyro_vae._programs.agreement import is_delta
from pyro_vae._programs.runs import trace_of
from pyro_vae._programs.sites import (
    Site,
    base_distribution,
    data_frame,
    is_factor,
    is_scored,
    random_sites,
    to_particle_layout,
)
from pyro_vae._utils.random import restored_generators
from pyro_vae.distributions._mixtures import MixtureOfDiagNormals, UniformMixture

Guide = Callable[..., Any]


def posteriors(guide: Guide, site: str, rows: Sequence[Tensor]) -> TorchDistributionMixin:
    """Return q(z|x_n) of the latent at a site as one batch of distributions.

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
    """Return the mixture with equal weights; diagonal Gaussians are scored by matrix products.

    Args:
        parts: distributions, each of batch shape (n_i,).
    """
    gaussians = [diagonal_gaussian(part) for part in parts]
    if None in gaussians:
        return UniformMixture(parts)
    loc, scale = (torch.cat(each) for each in zip(*gaussians, strict=True))
    return MixtureOfDiagNormals(loc.new_zeros(len(loc)), loc, scale)


def diagonal_gaussian(distribution: TorchDistributionMixin) -> tuple[Tensor, Tensor] | None:
    """Return mean and standard deviation (N, D) of independent Gaussians, else None."""
    base = base_distribution(distribution)
    vectors = isinstance(distribution, Independent) and len(distribution.event_shape) == 1
    if not vectors or not isinstance(base, torch.distributions.Normal):
        return None
    return base.loc, base.scale


def check_guide(guide: Guide, site: str, rows: Sequence[Tensor]) -> Tensor:
    """Raise ValueError if the guide's posterior of a latent depends on more than x.

    Returns:
        Whether each row has a posterior, shape (N,): the guide does not mask its latent.

    Raises:
        ValueError: The guide does not have the site, or its distribution there is a Delta. Or the
            site has a joint density with others, or depends on earlier samples.
    """
    with restored_generators():  # the check must not change the random numbers
        found, once_more = _sites(guide, rows), _sites(guide, rows)
    if site not in found or data_frame(found[site]) is None:
        raise ValueError(
            f'the guide has no site {site!r} in the plate "data"; its sites are {[*found]}. Pass '
            "the name of the latent that has this prior as site=..."
        )
    if is_delta(found[site]):
        raise ValueError(
            f"the guide gives latent site {site!r} a point (a Delta), which has no density. "
            "Use a guide with a density"
        )
    shared = [
        name for name, each in found.items() if is_factor(each) or each["infer"].get("is_auxiliary")
    ]
    if shared:
        raise ValueError(
            f"the guide has one joint density of latent site {site!r} and others, at site "
            f"{shared[0]!r}. To separate them, build it with joint=False"
        )
    with torch.no_grad():
        value = found[site]["value"].clone()  # a copy, because caches recognize the sample
        again = once_more[site]["fn"].log_prob(value)
        if site != next(iter(found)) and not torch.equal(again, found[site]["fn"].log_prob(value)):
            raise ValueError(
                f"the guide's distribution of latent site {site!r} depends on earlier "
                f"samples, {[*found][: [*found].index(site)]}. Its aggregated posterior is then an "
                "integral. Let the guide sample that latent first, given only x."
            )
    scored = to_particle_layout(is_scored(found[site]), found[site], None)[0]
    return scored.reshape(len(scored), -1).all(1)


def _sites(guide: Guide, rows: Sequence[Tensor]) -> dict[str, Site]:
    with torch.no_grad(), poutine.block():
        trace = trace_of(guide, *rows)
    return {site["name"]: site for site in random_sites(trace)}


def stand_in(event_shape: Sequence[int], like: Tensor) -> TorchDistributionMixin:
    """Return a temporary prior for use while the guide, run by this prior, traces the model.

    Raises:
        ValueError: The guide runs the model with gradients enabled, not only to find shapes.
    """
    if torch.is_grad_enabled():
        raise ValueError(
            "the guide runs the model, whose prior runs the guide again. Use a guide that does not "
            "refine its posteriors with the model"
        )
    zeros = torch.zeros(tuple(event_shape), dtype=like.dtype, device=like.device)
    return Normal(zeros, torch.ones_like(zeros)).to_event(len(event_shape))


class RunsGuide(nn.Module):
    """A prior whose density needs a run of a guide.

    Attributes:
        is_running: whether the guide runs now. A call then returns :func:`stand_in`.
    """

    is_running = False


@contextlib.contextmanager
def without_guides(program: Any) -> Iterator[None]:
    """Let priors of a module return :func:`stand_in`, where the density of a prior is not needed.

    Args:
        program: a program. If it is not a module, nothing changes.
    """
    found = program.modules() if isinstance(program, nn.Module) else ()
    changed = [each for each in found if isinstance(each, RunsGuide) and not each.is_running]
    for prior in changed:
        prior.is_running = True
    try:
        yield
    finally:
        for prior in changed:
            prior.is_running = False


class _Reached(Exception):  # noqa: N818 - not an error, but an early exit
    def __init__(self, distribution: TorchDistributionMixin):
        super().__init__()
        self.distribution = distribution


class _StopAt(Messenger):
    """A messenger that stops a program before it samples a site."""

    def __init__(self, site: str):
        super().__init__()
        self._site = site

    def _pyro_sample(self, msg: Site) -> None:
        if msg["name"] == self._site:
            raise _Reached(msg["fn"])
