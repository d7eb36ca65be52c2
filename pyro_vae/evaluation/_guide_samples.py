"""Sample the latents of a guide without a run of the decoder."""

from __future__ import annotations

from collections.abc import Iterator

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.distributions import constraints

from pyro_vae._programs.enumeration import sampled_if_needed
from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.particles import particle_options
from pyro_vae._programs.runs import as_guide, trace_of
from pyro_vae._programs.scales import unscaled
from pyro_vae._programs.sites import Site, data_frame, is_loss_of_guide, random_sites
from pyro_vae._programs.terms import terms
from pyro_vae.datasets._minibatches import Batch
from pyro_vae.evaluation._delta_sites import inside_all, mask_in_events


def guide_trace(guide: Program, batch: Batch) -> poutine.Trace:
    """Run a guide once and return its trace. Sites that it marks for enumeration are sampled."""
    return trace_of(sampled_if_needed(as_guide(guide)), *batch)


def latents_in(trace: poutine.Trace) -> dict[str, Site]:
    """Return the latent sites of a guide's trace by name, without its auxiliary sites."""
    return {
        site["name"]: site
        for site in random_sites(trace)
        if not (site["is_observed"] or is_loss_of_guide(site) or site["infer"].get("is_auxiliary"))
    }


def local_latents_in(trace: poutine.Trace) -> dict[str, Site]:
    """Return the latent sites of a guide's trace inside the plate ``"data"``, by name."""
    return {n: site for n, site in latents_in(trace).items() if data_frame(site) is not None}


_OBSERVATION = "_no_observation"


class GuideSampler:
    """Draws many samples for each data point from a guide.

    The guide runs with a model that accepts any latents. So no decoder runs, and networks of the
    guide run in the same ways as in :func:`pyro_vae.terms`.

    Args:
        guide: program of q(z|x).
        pairs_per_pass: number of pairs of a sample and a data point in one run.
    """

    def __init__(self, guide: Program, pairs_per_pass: int = 5_000):
        self._guide, self._pairs_per_pass = unscaled(guide), pairs_per_pass
        self._options: dict[str, object] | None = None

    def draw(self, name: str, batch: Batch, num_samples: int) -> Iterator[Tensor]:
        """Yield samples of a site in parts ``(K, B, *inner plates, *event)``."""
        if self._options is None:
            self._options = particle_options(self._any_latents, self._guide, batch, may_fold=True)
        at_once = max(1, self._pairs_per_pass // len(batch[0]))
        for start in range(0, num_samples, at_once):
            count = min(at_once, num_samples - start)
            t = terms(self._any_latents, self._guide, *batch, num_particles=count, **self._options)
            yield t.samples[name]

    def _any_latents(self, *batch: Tensor) -> None:
        """Run a model whose density is one for all values of the guide's latents."""
        with poutine.block():
            sites = latents_in(guide_trace(self._guide, batch))
        for name, site in inside_all(sites | _observation(sites), batch[0]):
            if name == _OBSERVATION:
                pyro.factor(name, torch.zeros((), device=batch[0].device))
            else:
                pyro.sample(name, _anything(site))


def _anything(site: Site) -> TorchDistributionMixin:
    """Return a distribution with a density of one, and with the mask of a site."""
    event_shape = site["fn"].event_shape
    if (mask := mask_in_events(site)) is not None:
        each = dist.ImproperUniform(constraints.real, event_shape, torch.Size())
        return each.mask(mask).to_event(len(event_shape))
    try:
        support = site["fn"].support
    except NotImplementedError:
        support = constraints.real
    return dist.ImproperUniform(support, torch.Size(), event_shape)


def _observation(sites: dict[str, Site]) -> dict[str, Site]:
    """Return a site in the plate ``"data"`` alone, because a model must observe something."""
    local = next(site for site in sites.values() if data_frame(site) is not None)
    plates = (data_frame(local),)
    return {_OBSERVATION: {**local, "fn": Unit(torch.zeros(())), "mask": None,
                           "cond_indep_stack": plates}}  # fmt: skip
