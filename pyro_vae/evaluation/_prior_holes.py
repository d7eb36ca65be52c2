r"""Holes of the prior: regions in which hardly any data point has its posterior."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field

import torch
from pyro import poutine
from rich.progress import Progress
from torch import Tensor

from pyro_vae._programs.data_plate import name_data_plate
from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.parameters import device_of
from pyro_vae._programs.predictions import warn_of_factors
from pyro_vae._programs.runs import trace_of
from pyro_vae._programs.sites import (
    Unobserve,
    data_frame,
    random_sites,
    to_particle_layout,
    was_observed,
)
from pyro_vae._programs.terms import terms
from pyro_vae._utils.checks import check_call, positive_integer, real_number
from pyro_vae._utils.interrupts import defer_keyboard_interrupt
from pyro_vae._utils.progress import task
from pyro_vae._utils.user_warnings import warns_once
from pyro_vae.datasets._minibatches import Batch, Data, Minibatches
from pyro_vae.evaluation._context import evaluation_context
from pyro_vae.evaluation._predict import mean_of_x
from pyro_vae.evaluation._scoring import guide_log_prob, require_one_density
from pyro_vae.evaluation._surgery.aggregate import Aggregate, refuse_masks

_RESAMPLES = 200
_FEW = 50  # samples, to check that a second run of the guide scores them equally


@dataclass(frozen=True)
class PriorHoles:
    r"""The share of the prior in regions where the aggregated posterior has almost no mass.

    Args:
        share: the share of prior samples with :math:`\log q_{agg}(z)` below the threshold.
        standard_error: standard error of the share, by the bootstrap over both sets of samples,
            with fixed data. It is zero, and says nothing, if no prior sample or each one is below
            the threshold.
        quantile: the share of samples of the aggregated posterior below the threshold.
        threshold: that quantile of :math:`\log q_{agg}(z')`, in nats.
        latents: the H prior samples below the threshold by site, ``(H, *inner plates, *event)``,
            in order of :math:`\log q_{agg}(z)`, lowest first.
        decoded: the mean of x for each of these samples, ``(H, *event of x)``. None if no observed
            site of the model has the shape of x.
        log_ratio: :math:`\log p(z) - \log q_{agg}(z)` of each of these samples, (H,).
        log_aggregate_of_prior: :math:`\log q_{agg}(z)` of all prior samples.
        log_aggregate_of_guide: :math:`\log q_{agg}(z')` of the samples of the aggregated
            posterior. Each is scored without the posterior that it was sampled from.
    """

    share: float
    standard_error: float
    quantile: float
    threshold: float
    latents: dict[str, Tensor] = field(repr=False)
    decoded: Tensor | None = field(repr=False)
    log_ratio: Tensor = field(repr=False)
    log_aggregate_of_prior: Tensor = field(repr=False)
    log_aggregate_of_guide: Tensor = field(repr=False)

    def __repr__(self) -> str:
        return (
            f"{100 * self.share:.1f} ± {100 * self.standard_error:.1f} % of the prior and "
            f"{100 * self.quantile:g} % of the aggregated posterior have\n"
            f"log q_agg(z) < {self.threshold:.2f} nats"
        )


@warns_once
def prior_holes(
    model: Program,
    guide: Program,
    data: Data,
    *,
    num_samples: int = 1000,
    quantile: float = 0.01,
    batch_size: int = 500,
    vectorize_particles: bool | None = None,
    plate: str | None = None,
    seed: int | None = None,
    progress: bool | Progress = False,
    description: str = "holes of the prior",
) -> PriorHoles:
    r"""Estimate the share of the prior where the aggregated posterior has almost no mass.

    .. math::
        P_{z \sim p(z)}\bigl(\log q_{agg}(z) < t\bigr), \qquad
        P_{z' \sim q_{agg}}\bigl(\log q_{agg}(z') < t\bigr) = \alpha

    where :math:`q_{agg}(z) = \frac1N \sum_n q(z|x_n)`. The likelihood was never fitted there, so
    samples from there may decode to bad data. The share is :math:`\alpha` if the prior equals the
    aggregated posterior of the population of the data. A share below :math:`\alpha` means that the
    prior is narrower than the aggregated posterior.

    A sample z' from the posterior of data point n is scored without that posterior, because no
    prior sample has a posterior of its own. So z' is scored like the code of a new data point. The
    threshold has rank :math:`\alpha (M + 1)` among M samples. Therefore the share of a prior that
    matches has expectation :math:`\alpha` for any N and M. If the prior depends on covariates,
    those of random data points are used.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        data: the data of q_agg, usually the training data, as in :func:`pyro_vae.fit`. They are
            read into memory.
        num_samples: M, the number of samples from each of the prior and the aggregated posterior.
        quantile: :math:`\alpha`.
        batch_size: data points at a time.
        vectorize_particles: score many latents in one run of the guide; see
            :func:`pyro_vae.terms`.
        plate: the name of the plate of the data points; see :func:`pyro_vae.terms`.
        seed: of the samples. The random numbers of the process are restored afterwards.
        progress: show a progress bar, or add one to a rich Progress.
        description: text before the bar.

    Returns:
        The :class:`PriorHoles`, with its tensors on the CPU.

    Raises:
        ValueError: Data or an argument are invalid, or the pair breaks a rule (docs/contract.md).
            There are fewer than two data points, or too few samples for the quantile. A site is
            global or scaled. The guide cannot score latents that it did not sample, or scores them
            differently from run to run. Its mask differs between data points. A density is NaN.

    Example:
        >>> import torch, pyro, pyro_vae as pv
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):  # all codes near 3: most of the prior is a hole
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(3 + 0.1 * x, 1.0))
        >>> holes = pv.prior_holes(model, guide, torch.randn(200), seed=0)
        >>> holes.share > 0.5, holes.decoded.shape == holes.log_ratio.shape
        (True, True)
    """
    check_call(prior_holes, locals())
    name_data_plate(plate, model, guide)
    num_samples = positive_integer("num_samples", num_samples)
    if not 0 < real_number("quantile", quantile) < 1:
        raise ValueError(f"quantile must lie between 0 and 1, got {quantile}")
    if not 1 <= quantile * (num_samples + 1) <= num_samples:
        raise ValueError(
            f"quantile={quantile} is too close to 0 or 1 for {num_samples} samples. Raise "
            f"num_samples to at least {math.ceil(1 / min(quantile, 1 - quantile))}"
        )
    batch_size = positive_integer("batch_size", batch_size)
    programs = (model, guide)
    batches = Minibatches(data, batch_size, device=device_of(*programs), programs=programs)
    with (
        defer_keyboard_interrupt() as interrupted,
        evaluation_context(
            "prior_holes",
            model,
            guide,
            batches,
            vectorize_particles=vectorize_particles,
            seed=seed,
            needs_latents=True,
        ) as how,
        task(progress, description, 4 * num_samples, transient=True) as show,
    ):

        def advance(count: int) -> None:
            show(count)
            if interrupted():  # a safe place, outside of Pyro's handlers
                raise KeyboardInterrupt

        refuse_masks(guide, batches.first())
        columns = batches.in_memory()
        count = len(columns[0])
        if count < 2:
            raise ValueError("prior_holes needs at least two data points, got one")
        columns_in_order = Minibatches(columns, batch_size, device=batches.device)
        q_agg = Aggregate(guide, columns_in_order, **how)
        data_of_guide = torch.randint(count, (num_samples,)).to(batches.device)
        drawn: list[dict[str, Tensor]] = []
        for batch in _rows(columns, data_of_guide, batch_size):
            t = terms(model, guide, *batch)
            if not drawn:
                few = {name: value[0, :_FEW] for name, value in t.samples.items()}
                own = guide_log_prob(guide, batch, few, **how).diagonal()
                require_one_density(t.log_guide[0, :_FEW], own)
            drawn.append(t.samples)
            advance(len(batch[0]))
        of_guide = {n: torch.cat([d[n][0] for d in drawn]) for n in drawn[0]}
        own_scores = q_agg.log_prob(of_guide, without=data_of_guide, advance=advance).cpu()
        dreams = []
        data_of_prior = torch.randint(count, (num_samples,)).to(batches.device)
        for batch in _rows(columns, data_of_prior, batch_size):
            dreams.append(_dream(model, guide, batch, list(of_guide)))
            advance(len(batch[0]))
        of_prior = {n: torch.cat([latents[n] for latents, _, _ in dreams]) for n in of_guide}
        log_prior = torch.cat([log_prior for _, log_prior, _ in dreams])
        means = [mean for _, _, mean in dreams]
        decoded = None if None in means else torch.cat(means)
        scores = q_agg.log_prob(of_prior, advance=advance).cpu()
        if (nan := own_scores.isnan().sum() + scores.isnan().sum()) > 0:
            raise ValueError(
                f"log q_agg(z) is NaN for {int(nan)} of {2 * num_samples} samples. Check the scale "
                "of the data"
            )
        share, threshold = _share_below(scores, own_scores, quantile)
        error = _bootstrap_error(scores, own_scores, quantile)
    worst_first = scores.argsort()[: int((scores < threshold).sum())]
    return PriorHoles(
        share=share.item(),
        standard_error=error.item(),
        quantile=float(quantile),
        threshold=threshold.item(),
        latents={name: value.cpu()[worst_first] for name, value in of_prior.items()},
        decoded=None if decoded is None else decoded[worst_first],
        log_ratio=(log_prior.cpu().double() - scores)[worst_first],
        log_aggregate_of_prior=scores,
        log_aggregate_of_guide=own_scores,
    )


def _rows(columns: Batch, rows: Tensor, batch_size: int) -> list[Batch]:
    return [tuple(column[some] for column in columns) for some in rows.split(batch_size)]


def _dream(
    model: Program, guide: Program, batch: Batch, names: list[str]
) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
    """Return latents sampled from the model, their log p(z) (B,), and the means of x or None."""
    trace = trace_of(Unobserve()(model), *batch)
    sites = {site["name"]: site for site in random_sites(trace)}
    warn_of_factors(sites.values())
    latents = {
        name: to_particle_layout(sites[name]["value"], sites[name], None)[0] for name in names
    }
    for name, site in sites.items():
        if was_observed(site) or data_frame(site) is None:
            trace.remove_node(name)
    decoded = None
    with contextlib.suppress(ValueError):  # no site has the shape of x; not needed for the share
        decoded = mean_of_x(poutine.replay(model, trace=trace), *batch)
    for name in set(sites) - set(names):
        if name in trace:
            trace.remove_node(name)
    log_prior = terms(model, poutine.replay(guide, trace=trace), *batch).log_prior[0]
    return latents, log_prior, decoded


def _share_below(scores: Tensor, own_scores: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Return the share of ``scores`` below a quantile of ``own_scores``, and that quantile."""
    position = quantile * (len(own_scores) + 1) - 1  # zero-based, in sorted order
    low = min(math.floor(position), len(own_scores) - 2)
    ordered = own_scores.sort().values
    threshold = torch.lerp(ordered[low], ordered[low + 1], position - low)
    return (scores < threshold).double().mean(), threshold


def _bootstrap_error(scores: Tensor, own_scores: Tensor, quantile: float) -> Tensor:
    shares = []
    for _ in range(_RESAMPLES):
        again, own_again = (
            each[torch.randint(len(each), (len(each),))] for each in (scores, own_scores)
        )
        shares.append(_share_below(again, own_again, quantile)[0])
    return torch.stack(shares).std()
