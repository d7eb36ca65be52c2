r"""Report posterior collapse: the latents, and their units, that carry little information."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from rich.progress import Progress
from torch import Tensor

from pyro_vae._programs.data_plate import name_data_plate
from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.parameters import device_of
from pyro_vae._programs.runs import trace_of
from pyro_vae._programs.sites import (
    Site,
    is_discrete,
    random_sites,
    to_particle_layout,
)
from pyro_vae._programs.terms import Terms, terms
from pyro_vae._utils.checks import check_call, positive_integer, positive_number
from pyro_vae._utils.messages import first_line
from pyro_vae._utils.progress import task
from pyro_vae._utils.user_warnings import warns_once
from pyro_vae.datasets._minibatches import Batch, Data, Minibatches
from pyro_vae.distributions._supports import is_angle
from pyro_vae.evaluation._context import evaluation_context
from pyro_vae.evaluation._growing_rows import GrowingRows
from pyro_vae.evaluation._log_evidence import standard_error
from pyro_vae.evaluation._surgery.codes import TermAverages
from pyro_vae.evaluation._surgery.decomposition import Surgery
from pyro_vae.evaluation._surgery.subsets import Estimator, check_estimator
from pyro_vae.evaluation._surgery.surgery import surgery_or_reason

if TYPE_CHECKING:
    import pandas as pd

LEAST_INFORMATION = 0.1  # nats


@dataclass(frozen=True)
class CollapseReport:
    """The information about x in each unit of the latents, and in all units together.

    Args:
        units: table indexed by ``site`` and ``unit``, with one row for each number in each latent
            site. The columns are

            - ``activity``;
            - ``activity_error``, the standard error of ``activity`` for the population of the data;
            - ``active``;
            - ``posterior_variance``, averaged over the data;
            - ``prior_variance``;
            - ``kl``, in nats, or NaN if the KL has no separate parts for the units.
        rate: average KL from guide to prior, in nats.
        surgery: result of :func:`pyro_vae.elbo_surgery`, None if it cannot be computed.
        note: the reason why ``surgery`` is None, or an empty string.
    """

    units: pd.DataFrame
    rate: float
    surgery: Surgery | None
    note: str = ""

    @property
    def num_active(self) -> int:
        """The number of active units."""
        return int(self.units["active"].sum())

    @property
    def information(self) -> float:
        """The mutual information of x and the latents. If unknown, its upper bound, the rate.

        It is also the rate if the prior depends on covariates. The latents may then depend on the
        covariates alone, and not on x.
        """
        return self.surgery.mutual_information if self._is_informed else self.rate

    @property
    def _is_informed(self) -> bool:
        return self.surgery is not None and not math.isnan(self.surgery.marginal_kl)

    @property
    def state(self) -> str:
        """``"collapsed"``, ``"partly collapsed"`` or ``"healthy"``.

        - ``"collapsed"``: The mutual information is below 0.1 nats. If it is unknown, the rate is
          below 0.1 nats or no unit is active.
        - ``"partly collapsed"``: A latent site has no active unit.
        - ``"healthy"``: All other cases. A latent site may have inactive units.
        """
        if self.information < LEAST_INFORMATION:
            return "collapsed"
        if not self._is_informed and not self.num_active:
            return "collapsed"
        return "healthy" if self.units["active"].groupby("site").any().all() else "partly collapsed"

    @property
    def verdict(self) -> str:
        """The state and its reasons in one line. If reasons disagree, the deciding one is first."""
        little = self.information < LEAST_INFORMATION
        name = "mutual information" if self._is_informed else "rate"
        information = f"{name} {_nats(self.information)} nats"
        if self._is_informed and self.surgery.saturated:
            information += f" (saturated: log N is {self.surgery.log_n:.2f})"
        if little and self.num_active:
            found = self._active_units("are above the activity threshold")
            return f"{self.state}: {information}, below {LEAST_INFORMATION}, though {found}"
        though = "though " if self._is_informed and not little and not self.num_active else ""
        return f"{self.state}: {self._active_units('active')}, {though}{information}"

    def _active_units(self, what: str) -> str:
        active = self.units["active"].groupby("site", sort=False)
        return ", ".join(
            f"{found.sum()} of {len(found)} units {what}"
            + (f" in {site}" if len(active) > 1 else "")
            for site, found in active
        )

    def __repr__(self) -> str:
        lines = [f"{self.verdict}. The KL of each unit in nats per data point:"]
        lines.append(self.units.to_string(float_format="{:.3f}".format))
        if self.note:
            lines.append(f"no mutual information: {self.note}")
        return "\n".join(lines)


@warns_once
def collapse_report(
    model: Program,
    guide: Program,
    data: Data,
    *,
    threshold: float = 0.01,
    num_particles: int = 50,
    estimator: Estimator = "exact",
    batch_size: int = 100,
    vectorize_particles: bool | None = None,
    plate: str | None = None,
    seed: int | None = None,
    progress: bool | Progress = False,
    description: str = "collapse",
) -> CollapseReport:
    r"""Report whether the latents are used, and which of their units are active.

    The activity of a unit (Burda et al. 2016, section 5.2) is the variance of its posterior mean
    over the data,

    .. math::
        A_d = \mathrm{Var}_{x}\bigl(\mathbb{E}_{q(z|x)}[z_d]\bigr)

    A unit is active if two conditions hold:

    - Its activity is above ``threshold`` times the prior's variance of :math:`z_d`. For a standard
      normal prior, this is 0.01 by default. If the prior has no finite variance, a variance of one
      is used.
    - Its KL is above half of ``threshold``. If the unit has no KL of its own, the KL of its site or
      of all latents is used.

    A Gaussian unit that passes the first condition passes the second too, under one normal prior
    for all data. A prior may also depend on covariates or on earlier latents. A unit that only
    follows such a prior has a KL of zero and is not used.

    Masked numbers are left out. A unit that is masked in all data points but one, or in all, has an
    activity of NaN and is not used.

    The estimate of :math:`A_d` is unbiased. The sampling variance of the means is estimated from
    the samples of each data point and subtracted. So the estimate can be slightly below zero.

    Any guide is accepted. A unit is one number in a sample of the guide, on the support of its
    site. An unused unit has the prior's variance, a KL near zero and an activity near zero. To
    follow the units during training, call this function between fits of a few epochs each.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        data: the data, as in :func:`pyro_vae.fit`, read twice; usually the training set.
        threshold: share of the prior's variance that the activity must exceed.
        num_particles: samples of z for each data point, at least 2.
        estimator: estimator of the mutual information; see :func:`pyro_vae.elbo_surgery`.
        batch_size: data points at a time.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.
        plate: the name of the plate of the data points; see :func:`pyro_vae.terms`.
        seed: of the samples. The random numbers of the process are restored afterwards.
        progress: show progress bars, or add them to a rich Progress.
        description: text before the bars.

    Returns:
        The :class:`CollapseReport`.

    Raises:
        ValueError: Data or an argument are invalid, or the pair breaks a rule (docs/contract.md).
            There are fewer than two data points. A site is global or scaled. A likelihood is zero,
            or the rate is NaN. The prior cannot be sampled.

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
    check_call(collapse_report, locals())
    name_data_plate(plate, model, guide)
    import pandas as pd

    num_particles = positive_integer("num_particles", num_particles, minimum=2)
    positive_number("threshold", threshold)
    check_estimator(estimator)
    programs = (model, guide)
    batches = Minibatches(data, batch_size, device=device_of(*programs), programs=programs)
    of_rows, sums = GrowingRows(), []
    moments: defaultdict[str, GrowingRows] = defaultdict(GrowingRows)
    sizes = []
    with (
        evaluation_context(
            "collapse_report",
            model,
            guide,
            batches,
            vectorize_particles=vectorize_particles,
            seed=seed,
            needs_latents=True,
        ) as particle_options,
        task(progress, description, batches.num_data, transient=True) as advance,
    ):
        for batch in batches:
            t = terms(model, guide, *batch, num_particles=num_particles, **particle_options)
            *averages, of_sites, of_dimensions = TermAverages.part(t)
            of_rows.add(torch.stack(averages))
            sums.append((of_sites, of_dimensions))
            sizes.append(len(batch[0]))
            for site, found in _moments(t, model, batch).items():
                moments[site].add(found)
            advance(len(batch[0]))
    surgery, note = surgery_or_reason(
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
    of_batches = zip(of_rows.rows.split(sizes, 1), sums, strict=True)
    merged = TermAverages.of_parts([(*each, *of_batch) for each, of_batch in of_batches])
    rate = merged.rate.mean().item()
    units = []
    for site, each in moments.items():
        found = each.rows
        if found.shape[1] < 2:
            raise ValueError("data must have at least two data points for collapse_report, got one")
        kl = rate if merged.kl_of_sites is None else merged.kl_of_sites[site].item()
        of_units = merged.kl_of_dimensions and merged.kl_of_dimensions[site].flatten()
        units += _rows(site, found, num_particles, threshold, kl, of_units)
    return CollapseReport(
        pd.DataFrame(units).set_index(["site", "unit"]),
        rate,
        surgery,
        note,
    )


def _moments(t: Terms, model: Program, batch: Batch) -> dict[str, Tensor]:
    """Return means and variances under guide and prior for each latent, (4, B, units).

    They are NaN for masked numbers.
    """
    found, masked = {}, t.masked_numbers()
    try:
        sites = {s["name"]: s for s in random_sites(trace_of(model, *batch))}
    except NotImplementedError as error:
        raise ValueError(
            "collapse_report needs samples of the prior, but sampling from the model failed "
            f"(cause: {first_line(error)}). Replace improper priors by proper ones."
        ) from error
    for name, draws in t.samples.items():
        draws = draws.double().flatten(2) if draws.dim() > 2 else draws.double().unsqueeze(2)
        site = sites[name]
        of_prior = (
            to_particle_layout(v, site, None)[0].reshape(draws.shape[1:]) for v in _prior(site)
        )
        found[name] = torch.stack([draws.mean(0), draws.var(0), *of_prior])
        if name in masked:  # its samples mean nothing
            found[name][:, masked[name].reshape(draws.shape[1:])] = math.nan
    return found


def _prior(site: Site) -> tuple[Tensor, Tensor]:
    """Return mean and variance of a latent's prior, or its sample and zero if they are unknown.

    Mean and variance are NaN if they do not exist, as for a Cauchy distribution.
    """
    fn, value = site["fn"], site["value"].double()
    drawn = value, torch.zeros_like(value)
    if is_angle(fn):  # its variance is that of a direction
        return drawn
    try:
        known = fn.mean.double(), fn.variance.double()
    except NotImplementedError:
        return drawn
    without = (known[0].isnan() | known[1].isnan()).any()
    return drawn if without and is_discrete(fn) else known


def _rows(
    site: str,
    moments: Tensor,
    num_particles: int,
    threshold: float,
    kl_of_site: float,
    kl_of_units: Tensor | None,
) -> list[dict[str, object]]:
    means, variances, prior_means, prior_variances = moments
    kept = ~means.isnan()  # the others are masked
    count = kept.sum(0)

    def average(values: Tensor) -> Tensor:
        return torch.where(kept, values, 0.0).sum(0) / count

    # The terms of the variance over the data, each less the noise in the data point's mean.
    unbiased = count / (count - 1)
    squares = (means - average(means)).square() * unbiased - variances / num_particles
    spread = average((prior_means - average(prior_means)).square()) * unbiased
    activity, prior = average(squares), average(prior_variances) + spread
    scale = torch.where(prior.isfinite(), prior, 1.0)
    nan = torch.full_like(activity, math.nan)
    kl = nan if kl_of_units is None else kl_of_units.to(activity)
    tells = kl.nan_to_num(nan=kl_of_site, posinf=math.inf) > threshold / 2
    active = (activity > threshold * scale) & tells
    posterior = average(variances)
    return [
        {
            "site": site,
            "unit": unit,
            "activity": activity[unit].item(),
            "activity_error": standard_error(squares[kept[:, unit], unit]),
            "active": active[unit].item(),
            "posterior_variance": posterior[unit].item(),
            "prior_variance": prior[unit].item(),
            "kl": kl[unit].item(),
        }
        for unit in range(means.shape[1])
    ]


def _nats(information: float) -> str:
    """Format a number of nats. The text is below the least information if the number is."""
    shown = f"{max(information, 0.0):.2f}" if information == information else "nan"
    if information < LEAST_INFORMATION <= float(shown):
        return f"{math.floor(1e4 * information) / 1e4:.4f}"
    return shown
