"""The missing numbers of x: the sites that observe them, and a model that leaves them out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Independent

from pyro_vae._programs.pair_trace import Factor, PairTrace
from pyro_vae._programs.runs import Program, as_guide, trace_of
from pyro_vae._programs.sites import (
    Site,
    is_deterministic,
    is_factor,
    mask_of,
    random_sites,
    to_particle_layout,
)
from pyro_vae._programs.validation import PROGRAM_ERRORS, checked_run
from pyro_vae._utils.value_checks import values_checked
from pyro_vae.datasets._minibatches import Batch
from pyro_vae.distributions._nan_masked import mask_missing
from pyro_vae.evaluation._layout import NOT_OF_X, Readings


class LeaveOutMissing(Messenger):
    """Leave out the numbers of observed sites that are NaN or infinite."""

    def _pyro_sample(self, msg: Site) -> None:
        value = msg["value"]
        if not msg["is_observed"] or is_factor(msg) or is_deterministic(msg):
            return
        if isinstance(value, Tensor) and not value.isfinite().all():
            try:
                msg["fn"] = mask_missing(msg["fn"])
            except ValueError as error:
                raise ValueError(
                    f"site {msg['name']!r} observes missing numbers: {error}"
                ) from error


def with_zeros(x: Tensor) -> Tensor:
    """Return x with zeros in place of numbers that are NaN or infinite."""
    return x.where(x.isfinite(), 0)


def accepts_missing(guide: Program, batch: Batch) -> bool:
    """Return whether all samples and log-densities of a guide are finite on missing numbers."""
    with torch.no_grad(), values_checked(False):
        try:
            sites = random_sites(trace_of(as_guide(guide), *batch))
            return all(
                bool(each.isfinite().all())
                for site in sites
                for each in (site["value"], site["fn"].log_prob(site["value"]))
            )
        except (ValueError, *PROGRAM_ERRORS):
            return False


@dataclass(frozen=True)
class MissingAtSite:
    """The missing numbers of a minibatch that one site observes.

    Attributes:
        site: the name of the site.
        where: the places of these numbers in the value of the site, flattened in the layout
            ``(B, *inner plates, *event)``. Shape (M,).
        places: their places in the flattened x, shape (M,).
    """

    site: str
    where: Tensor
    places: Tensor

    def of(self, run: PairTrace, values: Tensor, site: Site) -> Tensor:
        """Return the missing numbers of values of the site, ``(K, M)``."""
        return run.to_particle_layout(values, site).flatten(1)[:, self.where]


def find_missing(
    model: Program, guide: Program, batch: Batch, was_nan: Tensor
) -> tuple[PairTrace, list[MissingAtSite], Tensor]:
    """Run a pair, and return the run and the missing numbers of each observed site.

    Args:
        model: program of p(x, z), inside of :class:`LeaveOutMissing`.
        guide: program of q(z|x).
        batch: x ``(B, *event)``, contiguous, with NaN for missing numbers, and covariates.
        was_nan: whether the user gave NaN for each number of x, in the shape of x.

    Returns:
        The run, the missing numbers, and a mask of the numbers of x that are padding: NaN that the
        model masks, and would mask for any other value too.

    Raises:
        ValueError: A missing number is observed by no site or by several sites, or its site does
            not leave it out. A site observes other numbers than those of x, or its numbers are not
            independent given the latents.
    """
    x = batch[0]
    with Readings(x) as readings:
        run = checked_run(model, guide, batch, weighs=True)
    masked = _masked(run, readings, x) & was_nan.flatten()
    padding = _masked_for_any_value(model, guide, batch, masked)
    missing, taken = ~x.isfinite().flatten(), torch.zeros_like(x, dtype=torch.long).flatten()
    missing &= ~padding
    gaps = []
    for factor in run.model.values():
        found = _places_of_x(factor, readings)
        if found is None:
            continue
        where, places = found
        value, left_out = (
            to_particle_layout(each, factor.site, None)[0].flatten()
            for each in (factor.site["value"], _left_out(factor.site))
        )
        gone = missing[places]
        if not gone.any():
            continue
        _check(factor, run, x, places, value[where], left_out[where])
        gaps.append(MissingAtSite(factor.name, where[gone], places[gone]))
        taken.index_add_(0, places[gone], torch.ones_like(places[gone]))
    if (missing & (taken != 1)).any():
        lost, several = int((missing & (taken == 0)).sum()), int((taken > 1).sum())
        raise ValueError(
            f"impute must find the site that observes each missing number of x. No site observes "
            f"{lost} of them unchanged, and several sites observe {several}. The observed sites "
            f"are {[f.name for f in run.model.values() if f.observed]}"
        )
    return run, gaps, padding.reshape(x.shape)


def _places_of_x(factor: Factor, readings: Readings) -> tuple[Tensor, Tensor] | None:
    """Return the numbers of a site that come from x: their places in the site, and in x.

    The result is None if they are unknown, or if the site is not observed.
    """
    value = factor.site["value"]
    places = readings.places(value) if factor.observed and factor.local else None
    if places is None or places.shape != value.shape:
        return None
    places = to_particle_layout(places, factor.site, None)[0].flatten()
    where = (places != NOT_OF_X).nonzero()[:, 0]
    return where, torch.where(places < NOT_OF_X, -2 - places, places)[where]


def _masked(run: PairTrace, readings: Readings, x: Tensor) -> Tensor:
    """Return whether a site masks each number of the flattened x."""
    masked = torch.zeros(x.numel(), dtype=torch.bool, device=x.device)
    for factor in run.model.values():
        found = _places_of_x(factor, readings)
        mask = None if found is None else mask_of(factor.site)
        if mask is not None:
            mask = torch.as_tensor(mask, device=x.device)
            kept = to_particle_layout(mask, factor.site, None)[0].flatten()
            where, places = found
            masked[places[~kept[where]]] = True
    return masked


def _masked_for_any_value(model: Program, guide: Program, batch: Batch, masked: Tensor) -> Tensor:
    """Return which masked numbers of x the model still masks if NaN are replaced by zeros."""
    if not masked.any():
        return masked
    x = with_zeros(batch[0])
    with values_checked(False), Readings(x) as readings:
        try:
            run = PairTrace(model, guide, (x, *batch[1:]))
        except (ValueError, *PROGRAM_ERRORS):  # the program refuses zeros
            return torch.zeros_like(masked)
    return masked & _masked(run, readings, x)


def _left_out(site: Site) -> Tensor:
    """Return whether each number of a site's value is left out of its log-density."""
    value = site["value"]
    missing, mask = ~value.isfinite(), mask_of(site)
    if mask is None:
        return missing
    return missing | ~torch.as_tensor(mask, device=value.device).expand(value.shape)


def _check(
    factor: Factor, run: PairTrace, x: Tensor, places: Tensor, value: Tensor, left_out: Tensor
) -> None:
    numbers = x.flatten()[places]
    missing, name = ~numbers.isfinite(), factor.name
    if not left_out[missing].all():
        raise ValueError(
            f"site {name!r} observes other values in place of missing numbers of x, without a "
            "mask. Observe x itself. impute leaves out its missing numbers"
        )
    if (value != numbers)[~missing & ~left_out].any():
        raise ValueError(
            f"site {name!r} observes numbers that the model computes from x. Compute them before, "
            "and pass them as x, so that the imputed numbers have the units of x"
        )
    if (base := _base_of(factor.site["fn"])).event_shape:
        raise ValueError(
            f"site {name!r} has a {type(base).__name__} of event shape {tuple(base.event_shape)}. "
            "Its missing numbers depend on the observed ones given the latents, so impute cannot "
            "sample them. Use a distribution of independent numbers"
        )
    summed = [site for group in run.summed_out for site in group.sites.values()]
    summed += run.summed_inside
    shape = factor.site["fn"].batch_shape
    for site in summed:
        dim = site["infer"]["_enumerate_dim"]
        if len(shape) >= -dim and shape[dim] > 1:
            raise ValueError(
                f"site {name!r} depends on {site['name']!r}, which the model sums out. impute "
                "needs a sample of it given the observed numbers: let the guide sample it"
            )


def _base_of(distribution: Any) -> Any:
    while isinstance(distribution, Independent | MaskedDistribution):
        distribution = distribution.base_dist
    return distribution
