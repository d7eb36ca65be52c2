r"""Posterior collapse: latents that say nothing of their datum, unit by unit, and a verdict."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import pandas as pd
import torch
from pyro import poutine
from rich.progress import Progress
from torch import Tensor

from pyro_vae import programs
from pyro_vae.arguments import positive_integer, positive_number
from pyro_vae.evaluation.aggregated.decomposition import Surgery
from pyro_vae.evaluation.aggregated.subsets import Estimator
from pyro_vae.evaluation.aggregated.surgery import elbo_surgery
from pyro_vae.evaluation.estimating import estimating
from pyro_vae.evaluation.weighing.log_evidence import standard_error
from pyro_vae.minibatches import Batch, Data, Minibatches
from pyro_vae.progress import task
from pyro_vae.sites import arranged, random_sites
from pyro_vae.terms import Terms, terms
from pyro_vae.traces import Program

LEAST_INFORMATION = 0.1  # nats


@dataclass(frozen=True)
class CollapseReport:
    """How much each unit of the latents says of its datum, and all of them together.

    Args:
        units: a row for each number of each latent site, indexed by ``site`` and ``unit``:
            ``activity`` and ``activity_error`` (its standard error, for the population of the
            data), ``active``, ``posterior_variance`` (averaged over the data), ``prior_variance``,
            ``kl`` (nats; NaN where it has no such parts).
        rate: the average KL from guide to prior, in nats.
        surgery: what :func:`pyro_vae.elbo_surgery` finds; None where it cannot be had.
        note: why not.
    """

    units: pd.DataFrame
    rate: float
    surgery: Surgery | None
    note: str = ""

    @property
    def num_active(self) -> int:
        """How many units are active."""
        return int(self.units["active"].sum())

    @property
    def information(self) -> float:
        """The mutual information of datum and latents; the rate, its upper bound, without it."""
        return self.rate if self.surgery is None else self.surgery.mutual_information

    @property
    def state(self) -> str:
        """``"collapsed"``, ``"partly collapsed"`` or ``"healthy"``.

        Collapsed: no unit is active, or the mutual information is below 0.1 nats. Partly
        collapsed: one of several latent sites has no active unit. Healthy: anything else; that a
        latent has units to spare is no fault.
        """
        if not self.num_active or self.information < LEAST_INFORMATION:
            return "collapsed"
        return "healthy" if self.units["active"].groupby("site").any().all() else "partly collapsed"

    @property
    def verdict(self) -> str:
        """The state and its reasons, in a line."""
        active = self.units["active"].groupby("site", sort=False)
        by_site = ", ".join(
            f"{found.sum()} of {len(found)} units active"
            + (f" in {site}" if len(active) > 1 else "")
            for site, found in active
        )
        name = "rate" if self.surgery is None else "mutual information"
        line = f"{self.state}: {by_site}, {name} {max(0.0, self.information):.2f} nats"
        if self.surgery is not None and self.surgery.saturated:
            line += f" (saturated: log N is {self.surgery.log_n:.2f})"
        return line

    def __str__(self) -> str:
        return f"{self.verdict}\n{self.units.to_string(float_format='{:.3f}'.format)}"


def collapse_report(
    model: Program,
    guide: Program,
    data: Data,
    *,
    threshold: float = 0.01,
    num_particles: int = 50,
    estimator: Estimator = "exact",
    batch_size: int = 100,
    vectorize_particles: bool = True,
    seed: int | None = None,
    progress: bool | Progress = False,
    description: str = "collapse",
) -> CollapseReport:
    r"""Tell whether the latents are used, and which of their units are.

    The activity of a unit (Burda et al. 2016, section 5.2) is how far the mean of its posterior
    moves with the datum,

    .. math::
        A_d = \mathrm{Var}_{x}\bigl(\mathbb{E}_{q(z|x)}[z_d]\bigr)

    It is active where that is above a share of the prior's variance of :math:`z_d`: for a standard
    normal prior, above 0.01. :math:`A_d` is estimated without bias: what the draws add to the
    variance of their means is taken off, by the variance among draws of one datum. So it may come
    out a little below zero.

    Any guide will do: a unit is a number of what the guide draws, on the support of its site.
    A unit that is not used has the prior's variance, a KL near zero and no activity. To see how
    the units fare during training, call this between fits of a few epochs each.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        data: what :func:`pyro_vae.fit` takes, read twice; the training set as a rule.
        threshold: that share of the prior's variance.
        num_particles: draws of z for each datum, at least 2.
        estimator: of the mutual information; see :func:`pyro_vae.elbo_surgery`.
        batch_size: data points at a time.
        vectorize_particles: draw many particles in one run; see :func:`pyro_vae.terms`.
        seed: fixes the draws and leaves the process's random numbers as they were.
        progress: show bars; or a rich Progress to add them to.
        description: text before the bars.

    Returns:
        The :class:`CollapseReport`.

    Raises:
        ValueError: bad data or arguments, fewer than two data, or a pair that breaks the contract;
            a site is global or scaled.

    Example:
        >>> import torch, pyro, pyro_vae as pv
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)
        >>> def guide(x):  # the posterior: the second unit is not used
        ...     loc, scale = torch.stack([x / 2, 0 * x], -1), torch.tensor([0.5**0.5, 1.0])
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(loc, scale).to_event(1))
        >>> report = pv.collapse_report(model, guide, 2**0.5 * torch.randn(500), seed=0)
        >>> report.units["active"].tolist()
        [True, False]
        >>> report.verdict.split(",")[0]
        'healthy: 1 of 2 units active'
    """
    positive_integer("num_particles", num_particles, least=2)
    positive_number("threshold", threshold)
    batches = Minibatches(data, batch_size, device=programs.device_of(model, guide))
    moments: list[dict[str, Tensor]] = []
    rates = []
    with (
        estimating(
            "collapse_report",
            model,
            guide,
            batches,
            vectorize_particles=vectorize_particles,
            seed=seed,
        ) as plate_nesting,
        task(progress, description, batches.num_data, transient=True) as advance,
    ):
        for batch in batches:
            t = terms(
                model,
                guide,
                *batch,
                num_particles=num_particles,
                vectorize_particles=vectorize_particles,
                plate_nesting=plate_nesting,
            )
            rates.append(t.kl.double().mean(0))
            moments.append(_moments(t, model, batch))
            advance(len(batch[0]))
    surgery, note = _surgery_or_why_not(
        model,
        guide,
        data,
        batch_size=batch_size,
        estimator=estimator,
        vectorize_particles=vectorize_particles,
        seed=seed,
        progress=progress,
        description=f"{description}: surgery",
    )
    kl = None if surgery is None else surgery.kl_of_dimensions
    rows = []
    for site in moments[0]:
        found = torch.cat([each[site] for each in moments], 1).cpu()
        if found.shape[1] < 2:
            raise ValueError("collapse_report compares data with each other: got a single one")
        kl_of_site = None if kl is None else kl[site]
        rows += _rows(site, found, num_particles, threshold, kl_of_site)
    return CollapseReport(
        pd.DataFrame(rows).set_index(["site", "unit"]),
        torch.cat(rates).mean().item(),
        surgery,
        note,
    )


def _moments(t: Terms, model: Program, batch: Batch) -> dict[str, Tensor]:
    """Return means and variances of guide and prior by latent: (4, B, units)."""
    found = {}
    sites = {s["name"]: s for s in random_sites(poutine.trace(model).get_trace(*batch))}
    for name, draws in t.samples.items():
        draws = draws.double().flatten(2) if draws.dim() > 2 else draws.double().unsqueeze(2)
        site = sites[name]
        mean, variance = site["value"].double(), torch.zeros_like(site["value"]).double()
        # What the distribution knows of itself is surer than its draw.
        with contextlib.suppress(NotImplementedError):
            known = site["fn"].mean.double(), site["fn"].variance.double()
            if not (known[0].isnan() | known[1].isnan()).any():
                mean, variance = known
        of_prior = (arranged(v, site, None)[0].reshape(draws.shape[1:]) for v in (mean, variance))
        found[name] = torch.stack([draws.mean(0), draws.var(0), *of_prior])
    return found


def _rows(
    site: str, moments: Tensor, num_particles: int, threshold: float, kl: tuple[float, ...] | None
) -> list[dict[str, object]]:
    means, variances, prior_means, prior_variances = moments
    count = len(means)
    # What each datum adds to the variance between data, less the noise in its mean.
    squares = (means - means.mean(0)).square() * count / (count - 1) - variances / num_particles
    activity, prior = squares.mean(0), prior_variances.mean(0) + prior_means.var(0)
    scale = torch.where(prior.isfinite(), prior, 1.0)
    return [
        {
            "site": site,
            "unit": unit,
            "activity": activity[unit].item(),
            "activity_error": standard_error(squares[:, unit]),
            "active": activity[unit].item() > threshold * scale[unit].item(),
            "posterior_variance": variances[:, unit].mean().item(),
            "prior_variance": prior[unit].item(),
            "kl": math.nan if kl is None else kl[unit],
        }
        for unit in range(means.shape[1])
    ]


def _surgery_or_why_not(*args, **options) -> tuple[Surgery | None, str]:
    try:
        return elbo_surgery(*args, **options), ""
    except ValueError as error:
        return None, str(error)
