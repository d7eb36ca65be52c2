r"""Encode data: mean, standard deviation and samples of q(z|x) for each data point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pyro import poutine
from rich.progress import Progress
from torch import Tensor

from pyro_vae._programs.data_plate import name_data_plate
from pyro_vae._programs.enumeration import sampled_if_needed
from pyro_vae._programs.pair_trace import PairTrace, Program
from pyro_vae._programs.runs import AtValues, as_guide, trace_of
from pyro_vae._programs.sites import (
    Site,
    is_discrete,
    is_scored,
    random_sites,
    to_particle_layout,
)
from pyro_vae._utils.checks import check_call, positive_integer
from pyro_vae._utils.random import seeded
from pyro_vae.datasets._minibatches import Batch, Data
from pyro_vae.distributions._moments import SampledMoments, closed_form_moments, one_hot
from pyro_vae.evaluation._guide_samples import GuideSampler, guide_trace, local_latents_in
from pyro_vae.evaluation._predict import as_covariates
from pyro_vae.evaluation._runner import Part, Runner


@dataclass(frozen=True, repr=False, eq=False)
class Encoding:
    """The posteriors q(z|x) of N data points at one latent site, on the CPU.

    Args:
        site: name of the latent site.
        mean: means ``(N, *inner plates, *event)``.
        std: standard deviations, of the shape of ``mean``.
        samples: samples ``(S, N, *inner plates, *event)``, or None if none were asked for.
        method: ``"closed form"`` if mean and standard deviation of all data points are exact, else
            ``"samples"``.
        num_particles: number of samples for each estimated mean; 0 for closed form.
        standard_error: standard error of each mean, of the shape of ``mean``. It is zero where the
            mean is exact.
        discrete: whether the latent is discrete.
        masked: whether the programs mask each number, of the shape of ``mean``. A masked number has
            no posterior, as at a step after the end of a sequence. There, ``mean``, ``std``,
            ``standard_error`` and ``samples`` are NaN, and samples that are integers are -1.
    """

    site: str
    mean: Tensor
    std: Tensor
    samples: Tensor | None
    method: Literal["closed form", "samples"]
    num_particles: int
    standard_error: Tensor
    discrete: bool
    masked: Tensor

    def __len__(self) -> int:
        """Return N."""
        return len(self.mean)

    def __repr__(self) -> str:
        how = "in closed form"
        if self.method == "samples":
            error = self.standard_error.masked_fill(self.masked, 0.0).max().item()
            how = f"from {self.num_particles} samples, largest standard error {error:.2g}"
        drawn = "" if self.samples is None else f"; {len(self.samples)} samples each"
        count = int(self.masked.reshape(len(self), -1).any(1).sum())
        masked = f"; NaN in {count} masked data points" if count else ""
        return (
            f"Encoding of {self.site!r}: {len(self)} data points of shape "
            f"{tuple(self.mean.shape[1:])}; mean and std {how}{drawn}{masked}"
        )


def encode(
    model: Program,
    guide: Program,
    x: Data,
    *covariates: Tensor,
    site: str | None = None,
    num_samples: int = 0,
    num_particles: int = 1000,
    batch_size: int = 100,
    plate: str | None = None,
    seed: int | None = None,
    progress: bool | Progress = False,
    description: str = "encode",
) -> Encoding:
    r"""Return the mean and the standard deviation of q(z|x), and samples if wanted.

    .. math::
        \mu(x) = \mathbb{E}_{q(z|x)}[z], \qquad \sigma^2(x) = \mathrm{Var}_{q(z|x)}[z]

    They are the latent representation, or embedding, of x (Kingma & Welling 2014, section 2). They
    are exact if two conditions hold: the distribution of the site has a closed form, and it does
    not depend on latents that the guide samples before it. Otherwise they are estimated from
    ``num_particles`` samples of the guide, and :attr:`Encoding.standard_error` is the error.

    Values are in the space of the latent, not in the unconstrained space of a guide's family.
    These distributions have special moments:

    - A Categorical latent is one-hot coded, so its mean has the probability of each level, in one
      more dimension. Its samples are indices. A site that the guide enumerates is treated equally.
    - Angles have a mean direction in :math:`[-\pi, \pi]` and a circular standard deviation,
      :math:`\sqrt{-2 \log R}` (Mardia & Jupp 2000).
    - A moment that does not exist is NaN or infinite if the distribution has a closed form, as
      for Cauchy and Student's t. Without closed form, its estimate has no meaning.
    - A masked number has no posterior, so its moments and samples are NaN; see
      :attr:`Encoding.masked`. For example, a step after the end of a sequence is masked.

    A guide may draw random numbers other than its latents, as
    :class:`pyro_vae.guides.SemiAmortized` does. Closed forms then belong to one draw of these
    numbers, and ``samples`` to other draws.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x). A guide of points (Delta) has a standard deviation of zero.
        x: the data, as in :func:`pyro_vae.evidence`, in a fixed order.
        *covariates: further arguments of the programs, if ``x`` is a tensor or an array.
        site: name of the latent site. By default, the only latent of the guide.
        num_samples: S, the number of samples of z to return for each data point.
        num_particles: number of samples from which moments without closed form are estimated, at
            least 2. If ``num_samples`` is larger, it is used instead.
        batch_size: data points at a time.
        plate: the name of the plate of the data points; see :func:`pyro_vae.terms`.
        seed: of the samples. The random state of the process is restored afterwards.
        progress: show a progress bar, or add one to a rich Progress.
        description: text before the bar.

    Returns:
        The :class:`Encoding`. In a group of processes, each process returns the whole result.

    Raises:
        ValueError: Data or an argument are invalid, or the pair breaks a rule (docs/contract.md).
            There are several latents and ``site`` is None, or the guide has no such latent. The
            message lists the latents.

    Example:
        >>> import torch, pyro_vae as pv
        >>> model = pv.LatentVariableModel(
        ...     prior=pv.priors.StandardNormal(2),
        ...     likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 16)),
        ... )
        >>> guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(16, [8]))
        >>> x = torch.rand(50, 16).round()
        >>> codes = pv.encode(model, guide, x, num_samples=3, seed=0)
        >>> codes
        Encoding of 'z': 50 data points of shape (2,); mean and std in closed form; 3 samples each
        >>> codes.mean.shape, codes.samples.shape
        (torch.Size([50, 2]), torch.Size([3, 50, 2]))
    """
    check_call(encode, locals())
    name_data_plate(plate, model, guide)
    num_samples = positive_integer("num_samples", num_samples, minimum=0)
    num_particles = max(positive_integer("num_particles", num_particles, minimum=2), num_samples)
    with Runner.open(
        "encode",
        model,
        guide,
        (x, *as_covariates(covariates)) if covariates else x,
        batch_size=batch_size,
        vectorize_particles=None,
        seed=seed,
        resume=None,
        settings={},
        progress=progress,
        description=description,
        data_name="x",
        weighs=True,
        weighs_particles=False,
    ) as runner:
        first = guide_trace(guide, runner.batches.first())
        name = _chosen(site, first, model, guide, runner.batches.first())
        function = _encoder(guide, name, num_samples, num_particles)
        parts = runner.map_batches(function)
        if runner.interrupted:
            raise KeyboardInterrupt
    mean, std, error, masked, *drawn = zip(*parts, strict=True)
    exact = all(part[-1] for part in parts)
    return Encoding(
        site=name,
        mean=torch.cat(mean),
        std=torch.cat(std),
        samples=torch.cat(drawn[0]).movedim(1, 0) if num_samples else None,
        method="closed form" if exact else "samples",
        num_particles=0 if exact else num_particles,
        standard_error=torch.cat(error),
        discrete=is_discrete(local_latents_in(first)[name]["fn"]),
        masked=torch.cat(masked),
    )


def _chosen(
    site: str | None, trace: poutine.Trace, model: Program, guide: Program, batch: Batch
) -> str:
    """Return the name of the latent to encode.

    Raises:
        ValueError: There is no such latent, or not exactly one.
    """
    names = list(local_latents_in(trace))
    if site is None and len(names) == 1:
        return names[0]
    if site is None:
        raise ValueError(
            f"the guide must have one latent in the plate of the data points, but it has {names}. "
            + ("Pass one of them as site." if names else "Sample one in model and guide.")
        )
    if site in names:
        return site
    summed = PairTrace(model, guide, batch).summed
    also = f" The model sums out {summed}, which have no value under the guide." if summed else ""
    raise ValueError(
        f"site must be one of the latents of the guide, {names}, got site={site!r}.{also}"
    )


def _encoder(
    guide: Program, name: str, num_samples: int, num_particles: int
) -> Callable[[Batch], Part]:
    """Return a function that encodes a minibatch.

    Its result has mean, standard deviation, standard error, mask, samples ``(B, S, ...)`` if there
    are any, and whether the moments are exact.
    """
    sampler = GuideSampler(guide)

    def encode_batch(batch: Batch) -> Part:
        site, known = _known_moments(guide, name, batch)
        if known is None:
            moments, drawn = _from_samples(sampler, site, batch, num_samples, num_particles)
            exact = False
        else:
            moments = (*known, torch.zeros_like(known[0]))
            drawn = [part.cpu() for part in sampler.draw(name, batch, num_samples)]
            exact = True
        masked = to_particle_layout(~is_scored(site), site, None)[0]
        samples = (without(torch.cat(drawn), masked.cpu()).movedim(0, 1),) if num_samples else ()
        masked = masked.reshape(*masked.shape, *(1,) * (moments[0].dim() - masked.dim()))
        masked = masked.expand_as(moments[0])  # a Categorical has one more dimension, its levels
        return *(without(each, masked) for each in moments), masked, *samples, exact

    return encode_batch


def without(values: Tensor, masked: Tensor) -> Tensor:
    """Return values with NaN, or -1 for integers, in place of masked numbers."""
    if not masked.any():
        return values
    if values.is_floating_point():
        return values.masked_fill(masked, torch.nan)
    return values.long().masked_fill(masked, -1)  # Booleans and uint8 have no -1


def _from_samples(
    sampler: GuideSampler, site: Site, batch: Batch, num_samples: int, num_particles: int
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    moments, kept, count = SampledMoments(site["fn"]), [], 0
    for part in sampler.draw(site["name"], batch, num_particles):
        moments.add(part)
        if count < num_samples:
            kept.append(part[: num_samples - count].cpu())
        count += len(part)
    dtype = part.dtype if part.is_floating_point() else torch.get_default_dtype()
    return tuple(each.to(dtype) for each in moments.result()), kept


def _known_moments(
    guide: Program, name: str, batch: Batch
) -> tuple[Site, tuple[Tensor, Tensor] | None]:
    """Return a site, and its moments given x if they have a closed form, ``(B, ...)`` each.

    The distribution of the site must not depend on sites sampled before it. So the guide runs
    again at the same random numbers, with other values at all of its sites.
    """
    seed = int(torch.randint(2**62, ()))
    with seeded(seed):
        trace = guide_trace(guide, batch)
    site = local_latents_in(trace)[name]
    moments = _moments_of(site)
    if moments is None or not _sampled_before(trace, name):
        return site, moments
    others = _values(guide_trace(guide, batch))
    with seeded(seed):
        try:
            program = sampled_if_needed(as_guide(AtValues(others)(guide)))
            again = trace_of(program, *batch)
        except (KeyError, NotImplementedError, ValueError):  # it cannot score other values
            return site, None
    changed = _moments_of(local_latents_in(again)[name])
    same = changed is not None and all(map(_are_equal, moments, changed))
    return site, moments if same else None


def _moments_of(site: Site) -> tuple[Tensor, Tensor] | None:
    fn = one_hot(site["fn"])
    found = closed_form_moments(fn)
    if found is None:
        return None
    coded = {**site, "fn": fn}
    return tuple(to_particle_layout(each, coded, None)[0] for each in found)


def _sampled_before(trace: poutine.Trace, name: str) -> bool:
    """Return whether a guide samples any site before the named one."""
    for site in random_sites(trace):
        if site["name"] == name:
            return False
        if not site["is_observed"]:
            return True
    return False


def _values(trace: poutine.Trace) -> dict[str, Any]:
    return {s["name"]: s["value"] for s in random_sites(trace) if not s["is_observed"]}


def _are_equal(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())
