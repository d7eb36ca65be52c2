r"""Holes of the prior: where it draws latents that the guide gives to hardly any datum."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field

import torch
from pyro import poutine
from rich.progress import Progress
from torch import Tensor

from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.parameters import device_of
from pyro_vae._programs.runs import trace_of
from pyro_vae._programs.sites import Unobserve, data_frame, random_sites, to_particle_layout
from pyro_vae._programs.terms import terms
from pyro_vae._utils.checks import check_call, positive_integer, real_number
from pyro_vae._utils.interrupts import defer_keyboard_interrupt
from pyro_vae._utils.progress import task
from pyro_vae.datasets._minibatches import Batch, Data, Minibatches
from pyro_vae.evaluation._context import evaluation_context
from pyro_vae.evaluation._predict import mean_of_x
from pyro_vae.evaluation._scoring import guide_log_prob, require_one_density
from pyro_vae.evaluation._surgery.aggregate import Aggregate, refuse_masks

_RESAMPLES = 200
_FEW = 50  # draws, which tell whether the guide scores them as it drew them


@dataclass(frozen=True)
class PriorHoles:
    r"""How much of the prior lies where the aggregated posterior has next to nothing.

    Args:
        share: of the prior's draws with :math:`\log q_{agg}(z)` below the threshold.
        standard_error: of the share, by the bootstrap over both kinds of draws, the data held
            fixed; zero says no more than that no draw, or each, lay below.
        quantile: the share of the aggregated posterior's own draws below the threshold.
        threshold: that quantile of :math:`\log q_{agg}(z')`, in nats.
        latents: the prior's draws below the threshold by site, ``(H, *inner plates, *event)``, the
            emptiest place first.
        decoded: the mean of x for each of them, ``(H, *event of x)``; None where no observed site
            of the model has the shape of x.
        log_ratio: :math:`\log p(z) - \log q_{agg}(z)` of each of them, (H,).
        log_aggregate_of_prior: :math:`\log q_{agg}(z)` of all the prior's draws.
        log_aggregate_of_guide: of the draws of the aggregated posterior, each scored without the
            posterior that it was drawn from.
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

    def __str__(self) -> str:
        return (
            f"{100 * self.share:.1f} ± {100 * self.standard_error:.1f} % of the prior lies where "
            f"{100 * self.quantile:g} % of the aggregated posterior do:\n"
            f"log q_agg(z) < {self.threshold:.2f}"
        )


def prior_holes(
    model: Program,
    guide: Program,
    data: Data,
    *,
    num_samples: int = 1000,
    quantile: float = 0.01,
    batch_size: int = 500,
    vectorize_particles: bool = True,
    seed: int | None = None,
    progress: bool | Progress = False,
    description: str = "holes of the prior",
) -> PriorHoles:
    r"""Measure how much prior mass lies where the aggregated posterior has next to none.

    .. math::
        P_{z \sim p(z)}\bigl(\log q_{agg}(z) < t\bigr), \qquad
        P_{z' \sim q_{agg}}\bigl(\log q_{agg}(z') < t\bigr) = \alpha

    with :math:`q_{agg}(z) = \frac1N \sum_n q(z|x_n)`. A model that draws there decodes what its
    likelihood was never fitted on. The share is :math:`\alpha` where the prior is the aggregated
    posterior of the population that the data are drawn from; a share below :math:`\alpha` says that
    the prior is the narrower of the two.

    A draw z' of the posterior of datum n is scored without that posterior, which no draw of the
    prior has to itself: as if N - 1 data stood for q_agg, and it came from a new one. The rank of
    the threshold is :math:`\alpha (M + 1)` for M draws, with which the share of a prior that
    matches has the expectation :math:`\alpha`, for any N and M. A prior that depends on covariates
    is drawn for those of random data.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        data: the data that q_agg is over: the training set, as a rule. What
            :func:`pyro_vae.fit` takes; read into memory.
        num_samples: M, draws of the prior, and as many of the aggregated posterior.
        quantile: :math:`\alpha`.
        batch_size: data points at a time.
        vectorize_particles: score many latents in one run of the guide; see
            :func:`pyro_vae.terms`.
        seed: fixes the draws and leaves the process's random numbers as they were.
        progress: show a bar; or a rich Progress to add one to.
        description: text before the bar.

    Returns:
        The :class:`PriorHoles`, its tensors on the CPU.

    Raises:
        ValueError: bad data or arguments, or a pair that breaks the contract; fewer than two data,
            or too few samples for the quantile; a site is global or scaled; the guide cannot be
            scored at latents that it did not draw, scores them otherwise from run to run, or masks
            them from datum to datum; a density is NaN.

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
    num_samples = positive_integer("num_samples", num_samples)
    if not 0 < real_number("quantile", quantile) < 1:
        raise ValueError(f"quantile must lie between 0 and 1, got {quantile}")
    if not 1 <= quantile * (num_samples + 1) <= num_samples:
        raise ValueError(
            f"the quantile {quantile} of {num_samples} samples is beyond their ends: raise "
            f"num_samples to {math.ceil(1 / min(quantile, 1 - quantile))} at least"
        )
    batch_size = positive_integer("batch_size", batch_size)
    batches = Minibatches(data, batch_size, device=device_of(model, guide))
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
        ) as plate_nesting,
        task(progress, description, 4 * num_samples, transient=True) as show,
    ):

        def advance(count: int) -> None:
            show(count)
            if interrupted():  # here, where no handler of Pyro's is half done
                raise KeyboardInterrupt

        refuse_masks(guide, batches.first())
        columns = batches.in_memory()
        count = len(columns[0])
        if count < 2:
            raise ValueError("an aggregated posterior takes two data at least, got one")
        columns_in_order = Minibatches(columns, batch_size, device=batches.device)
        how = {"plate_nesting": plate_nesting, "vectorize_particles": vectorize_particles}
        q_agg = Aggregate(guide, columns_in_order, **how)
        data_of_guide = torch.randint(count, (num_samples,)).to(batches.device)
        drawn = []
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
                f"log q_agg(z) is NaN for {int(nan)} of {2 * num_samples} draws: look at the scale "
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
    """Return latents drawn by the model, their log p(z) (B,), and the means of x, if it has any."""
    trace = trace_of(Unobserve()(model), *batch)
    sites = {site["name"]: site for site in random_sites(trace)}
    latents = {
        name: to_particle_layout(sites[name]["value"], sites[name], None)[0] for name in names
    }
    for name, site in sites.items():
        if site["infer"].get("was_observed") or data_frame(site) is None:
            trace.remove_node(name)
    decoded = None
    with contextlib.suppress(ValueError):  # no site has the shape of x: the share needs none
        decoded = mean_of_x(poutine.replay(model, trace=trace), *batch)
    for name in set(sites) - set(names):
        if name in trace:
            trace.remove_node(name)
    log_prior = terms(model, poutine.replay(guide, trace=trace), *batch).log_prior[0]
    return latents, log_prior, decoded


def _share_below(scores: Tensor, own_scores: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Return the share of scores below a quantile of the others, and the quantile."""
    position = quantile * (len(own_scores) + 1) - 1  # of the ordered, the first at zero
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
