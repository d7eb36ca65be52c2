"""Fill the gaps of incomplete data, by self-normalized importance sampling of the latents."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from rich.progress import Progress
from torch import Tensor

from pyro_vae._programs.data_plate import name_data_plate
from pyro_vae._programs.enumeration import sampled_guides
from pyro_vae._programs.evaluation import evaluation_mode
from pyro_vae._programs.pair_trace import PairTrace, Program
from pyro_vae._programs.parameters import device_of, parameter_store
from pyro_vae._programs.particles import run_particles
from pyro_vae._programs.predictions import drawn_observations
from pyro_vae._programs.runs import as_guide, trace_of
from pyro_vae._programs.sites import Site, to_particle_layout
from pyro_vae._programs.terms import Terms
from pyro_vae._programs.validation import nonfinite_data
from pyro_vae._utils.checks import check_call, positive_integer, require_callable
from pyro_vae._utils.random import seeded
from pyro_vae._utils.value_checks import values_checked
from pyro_vae.datasets._columns import as_tensor, finite_rows
from pyro_vae.datasets._minibatches import Batch, Minibatches
from pyro_vae.distributions._moments import closed_form_mean
from pyro_vae.distributions._supports import is_angle
from pyro_vae.evaluation._group import LazyBatch
from pyro_vae.evaluation._log_evidence import UnreliableEvidence, untrusted, why_unreliable
from pyro_vae.evaluation._missing_numbers import (
    LeaveOutMissing,
    MissingAtSite,
    accepts_missing,
    find_missing,
    with_zeros,
)
from pyro_vae.evaluation._predict import as_covariates
from pyro_vae.evaluation._runner import Runner
from pyro_vae.evaluation._weights import WeightStream


@dataclass(frozen=True, repr=False, eq=False)
class Imputation:
    r"""Data with filled gaps, on the CPU.

    Args:
        mean: x with :math:`E[x_{mis}|x_{obs}]` in place of missing numbers, ``(N, *event)``. It is
            NaN where the distribution has no mean, as for angles.
        draws: copies of x with samples of :math:`p(x_{mis}|x_{obs})` in place of missing numbers,
            ``(num_draws, N, *event)``.
        observed: the mask of the observed numbers, ``(N, *event)``.
        padding: the mask of the padding, ``(N, *event)``: NaN of x that the model masks whatever
            their value, such as steps after the end of a sequence. They are neither observed nor
            imputed, and are NaN in ``mean`` and ``draws``.
        monte_carlo_errors: standard error of each mean from the samples of z alone,
            ``(N, *event)``. It is zero for an observed number.
        effective_sample_size: :math:`(\sum w)^2 / \sum w^2` of the weights of each row, shape (N,).
        khat: Pareto diagnostic of the weights of each row, shape (N,); see
            :func:`pyro_vae.evaluation.khat`.
        num_samples: samples of z per data point.
    """

    mean: Tensor
    draws: Tensor
    observed: Tensor
    padding: Tensor
    monte_carlo_errors: Tensor
    effective_sample_size: Tensor
    khat: Tensor
    num_samples: int

    @property
    def untrusted(self) -> Tensor:
        """Whether the weights of each row are unreliable, shape (N,); see ``Evidence.untrusted``.

        Rows without missing numbers need no weights, and are reliable.
        """
        unreliable = untrusted(
            self.effective_sample_size, self.khat, self.effective_sample_size, self.num_samples
        )
        return unreliable & self._incomplete

    @property
    def _incomplete(self) -> Tensor:
        """Whether each row has an imputed number, shape (N,)."""
        return _is_incomplete(self.observed | self.padding)

    def __repr__(self) -> str:
        imputed, padding = int((~(self.observed | self.padding)).sum()), int(self.padding.sum())
        incomplete, total = self._incomplete, self.observed.numel() - padding
        left_out = f"; {padding} numbers of padding left out" if padding else ""
        return (
            f"{imputed} of {total} numbers imputed, in {int(incomplete.sum())} of "
            f"{len(incomplete)} rows ({self.num_samples} samples of z for each row; unreliable "
            f"weights in {int(self.untrusted.sum())} rows{left_out})"
        )


def impute(
    model: Program,
    guide: Program,
    x: Tensor,
    *covariates: Tensor,
    observed: Tensor | None = None,
    num_samples: int = 1000,
    num_draws: int = 0,
    batch_size: int = 100,
    pairs_per_pass: int = 5_000,
    vectorize_particles: bool | None = None,
    plate: str | None = None,
    seed: int | None = None,
    progress: bool | Progress = False,
) -> Imputation:
    r"""Estimate and sample missing numbers of x given its observed ones (Mattei & Frellsen 2019).

    .. math::
        E[x_{mis}|x_{obs}] \approx \frac{\sum_k w_k \, E[x_{mis}|z_k]}{\sum_k w_k}, \qquad
        w_k = \frac{p(x_{obs}|z_k) \, p(z_k)}{q(z_k|x)}, \qquad z_k \sim q(z|x)

    A sample of :math:`x_{mis}` takes :math:`z_k` with a probability proportional to its weight, and
    samples :math:`p(x_{mis}|z_k)`.

    The model needs no change: impute leaves out the missing numbers of its observed sites. A model
    that leaves them out itself works too. The numbers of x must be independent given the latents.
    If the guide gives NaN for missing numbers, it gets zeros in their place. NaN that the model
    masks whatever their value, such as the padding of sequences with given lengths, are not
    missing. They stay NaN.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        x: data ``(N, *event)``, floating-point, with NaN for missing numbers.
        *covariates: further arguments of the programs, without missing numbers.
        observed: Boolean mask of the observed numbers, of the shape of x. The values of the other
            numbers are not used. By default, all finite numbers are observed. If a covariate of the
            programs is the mask of the missing numbers, pass it here too, and x without NaN.
        num_samples: K per data point.
        num_draws: the number of imputed copies of x to sample.
        batch_size: number of data points per minibatch.
        pairs_per_pass: number of pairs of a sample and a data point in one run of the programs.
        vectorize_particles: draw all samples in one run; see :func:`pyro_vae.terms`.
        plate: the name of the plate of the data points; see :func:`pyro_vae.terms`.
        seed: of the samples. The random state of the process is restored afterwards.
        progress: show a progress bar, or add one to a rich Progress.

    Returns:
        An :class:`pyro_vae.evaluation.Imputation`.

    Raises:
        TypeError: x is not floating-point, or ``observed`` is not Boolean.
        ValueError: The shapes differ. An observed number or a covariate is NaN or infinite. The
            pair breaks a rule (docs/contract.md). A missing number belongs to a distribution whose
            numbers are not independent, or cannot be traced to one observed site.

    Example:
        >>> import torch, pyro, pyro_vae as pv
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        ...         mean = z @ torch.ones(1, 2)
        ...         pyro.sample("x", dist.Normal(mean, 0.5).to_event(1), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x[:, :1], 1.0).to_event(1))
        >>> filled = pv.impute(model, guide, torch.tensor([[1.0, torch.nan]]), seed=0)
        >>> filled.mean[0, 0].item()
        1.0
        >>> bool((filled.mean[0, 1] - 0.8).abs() < 4 * filled.monte_carlo_errors[0, 1])
        True
    """
    check_call(impute, locals())
    require_callable("model", model)
    require_callable("guide", guide)
    name_data_plate(plate, model, guide)
    num_samples = positive_integer("num_samples", num_samples)
    num_draws = positive_integer("num_draws", num_draws, minimum=0)
    pairs_per_pass = positive_integer("pairs_per_pass", pairs_per_pass)
    x, observed, was_nan = _with_missing(x, observed)
    columns = (x, *as_covariates(covariates, model, guide))
    if differing := [len(each) for each in columns if len(each) != len(x)]:
        raise ValueError(f"covariates must have {len(x)} rows, as x has; got {differing}")
    for number, column in enumerate(columns[1:], start=1):
        if not (finite := finite_rows(column)).all():
            reached = "impute needs complete covariates"
            raise nonfinite_data("x", (~finite).nonzero()[:, 0].cpu(), reached, [number])
    leaving_out = LeaveOutMissing()(model)
    guide = _guide_for(model, leaving_out, guide, columns, was_nan, batch_size, seed)
    with Runner.open(
        "impute",
        leaving_out,
        guide,
        columns,
        data_name="x",
        batch_size=batch_size,
        vectorize_particles=vectorize_particles,
        seed=seed,
        resume=None,
        settings={},
        progress=progress,
        description="impute",
        needs_latents=True,
        weighs=True,
    ) as runner:
        fill = _filler(runner, num_samples, num_draws, pairs_per_pass)
        parts = runner.map_batches(fill, _with_rows(runner.batches, was_nan))
        if runner.interrupted:
            raise KeyboardInterrupt
    means, errors, sizes, khats, draws, padding = map(torch.cat, zip(*parts, strict=True))
    result = Imputation(
        mean=means,
        draws=draws.transpose(0, 1),
        observed=observed,
        padding=padding,
        monte_carlo_errors=errors,
        effective_sample_size=sizes,
        khat=khats,
        num_samples=num_samples,
    )
    incomplete = int(_is_incomplete(observed | padding).sum())
    # The effective sample size is NaN if all weights are zero, or infinite.
    if (without := sizes.isnan() & _is_incomplete(observed | padding)).any():
        warnings.warn(
            f"the missing numbers of {int(without.sum())} of {incomplete} rows are NaN, first in "
            f"row {int(without.nonzero()[0])}: no sample of z has a density above zero there. Use "
            "more samples, or a guide whose samples are inside of the support of the prior.",
            UnreliableEvidence,
            stacklevel=2,
        )
    elif (bad := int(result.untrusted.sum())) > incomplete / 2:
        warnings.warn(
            f"the imputed numbers are unreliable for {bad} of {incomplete} rows. Their "
            f"{why_unreliable(num_samples)}. Use more samples, or a guide that is fitted to data "
            "with missing numbers.",
            UnreliableEvidence,
            stacklevel=2,
        )
    return result


def _is_incomplete(observed: Tensor) -> Tensor:
    """Return whether each row of a mask ``(N, *event)`` has a number that is not observed, (N,)."""
    return ~observed.reshape(len(observed), -1).all(1)


def _with_missing(x: Tensor, observed: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return x with NaN for missing numbers, the mask of observed ones, and that of NaN in x."""
    x = as_tensor(x, "x", finite=False)
    if not x.is_floating_point():
        raise TypeError(
            f"x must be floating-point, because missing numbers are NaN; got {x.dtype}. Convert x "
            "by x.float(), and levels to numbers in [0, 1]"
        )
    finite = x.isfinite()
    if observed is None:
        return x.masked_fill(~finite, torch.nan).contiguous(), finite.cpu(), ~finite
    observed = as_tensor(observed, "observed")
    if observed.dtype != torch.bool:
        raise TypeError(f"observed must be a Boolean mask, got {observed.dtype}")
    if observed.shape != x.shape:
        raise ValueError(
            f"observed must have the shape of x, {tuple(x.shape)}, got {tuple(observed.shape)}"
        )
    observed = observed.to(x.device)
    if (wrong := observed & ~finite).any():
        row = int(_is_incomplete(~wrong).nonzero()[0])
        raise ValueError(
            f"x is NaN or infinite at numbers that observed marks as observed, first in row {row}. "
            "Mark them as missing"
        )
    return x.masked_fill(~observed, torch.nan).contiguous(), observed.cpu(), ~finite


def _with_rows(batches: Minibatches, column: Tensor) -> Iterator[LazyBatch]:
    """Yield the minibatches of data in memory, each with the rows of a further column."""
    column = column.to(batches.device)
    for (rows,) in batches.selections():
        yield len(rows), lambda rows=rows: (*batches.prepare(rows), column[rows])


def _guide_for(
    model: Program,
    leaving_out: Program,
    guide: Program,
    columns: Batch,
    was_nan: Tensor,
    batch_size: int,
    seed: int | None,
) -> Program:
    """Return the guide, or one that gets zeros for missing numbers; check that x can be imputed."""

    def guide_of_zeros(x: Tensor, *covariates: Tensor) -> object:
        return guide(with_zeros(x), *covariates)

    rows = _is_incomplete(columns[0].isfinite()).nonzero()[:batch_size, 0]
    if not len(rows):
        return guide
    device = device_of(model, guide)
    *batch, was_nan = (
        column[rows.to(column.device)].to(device).contiguous() for column in (*columns, was_nan)
    )
    with (
        seeded(0 if seed is None else seed),
        parameter_store(model, guide),
        evaluation_mode(model, guide),
        sampled_guides(),
        torch.no_grad(),
    ):
        trace_of(as_guide(guide_of_zeros), *batch)  # the first call of a guide makes its networks
        chosen = guide if accepts_missing(guide, batch) else guide_of_zeros
        find_missing(leaving_out, chosen, tuple(batch), was_nan)
    return chosen


def _filler(
    runner: Runner, num_samples: int, num_draws: int, pairs_per_pass: int
) -> Callable[[Batch], tuple[Tensor, ...]]:
    """Return a function that fills the gaps of a minibatch."""
    passes = -(-num_samples // max(1, pairs_per_pass // len(runner.batches.first()[0])))
    sizes = [num_samples // passes + (i < num_samples % passes) for i in range(passes)]

    def fill(batch: Batch) -> tuple[Tensor, ...]:
        *columns, was_nan = batch
        x = columns[0].contiguous()
        batch = (x, *columns[1:])
        single, gaps, padding = find_missing(runner.model, runner.guide, batch, was_nan)
        none = torch.empty(0, dtype=torch.long, device=x.device)
        places = torch.cat([none, *(gap.places for gap in gaps)])
        weights, chosen = WeightStream(num_samples), _Chosen(num_draws)
        averages = _Averages(places // x[0].numel())
        with values_checked(False):
            for size in sizes:
                runner.group.check()
                runs = run_particles(
                    runner.model, runner.guide, batch, {}, size, **runner.particle_options
                )
                t = Terms(runs)
                log_weight = t.log_weight.double()
                weights.add(log_weight)
                if gaps:
                    averages.add(log_weight, _means_given_latents(runs, gaps))
                chosen.add(log_weight, t.samples)
            draws = [_draw(x, single, gaps, z) for z in chosen.latents()]
        if (impossible := weights.log_mean().isneginf()).any():
            missing = places[impossible[places // x[0].numel()]]
            nowhere = x.new_full((len(missing),), torch.nan)
            draws = [_filled(each, missing, nowhere) for each in draws]
        return (
            _filled(x, places, averages.means()),
            _filled(torch.zeros_like(x), places, averages.errors()),
            weights.effective_sample_size(),
            weights.khat(),
            torch.stack(draws, 1) if draws else x.new_empty((len(x), 0, *x.shape[1:])),
            padding,
        )

    return fill


class _Averages:
    """Self-normalized weighted averages of numbers of the rows, from chunks of samples.

    Args:
        rows: the row of each number, shape (M,).
    """

    def __init__(self, rows: Tensor):
        self._rows = rows
        self._largest: Tensor | None = None  # log-weight of each row
        self._center = 0.0  # near the average, so that squares do not cancel
        self._sums = torch.zeros((5, len(rows)), dtype=torch.float64, device=rows.device)

    def add(self, log_weight: Tensor, values: Tensor) -> None:
        """Add samples of the numbers, (K, M), with log-weights (K, B)."""
        # E[x|z] may not exist at samples with a weight of zero.
        values = torch.where(log_weight[:, self._rows].isneginf(), 0.0, values.double())
        largest = log_weight.amax(0).clamp(min=torch.finfo(log_weight.dtype).min)
        if self._largest is None:
            self._center = values.mean(0)
        else:
            largest = torch.maximum(largest, self._largest)
            shrink = (self._largest - largest).exp()[self._rows]
            self._sums *= torch.stack([shrink, shrink, *[shrink.square()] * 3])
        self._largest = largest
        w = (log_weight - largest).exp()[:, self._rows]
        v = values - self._center
        self._sums += torch.stack(
            [each.sum(0) for each in (w, w * v, w * w, w * w * v, (w * v).square())]
        )

    def means(self) -> Tensor:
        """Return the average of each number, (M,)."""
        w, wv, *_ = self._sums
        return self._center + wv / w

    def errors(self) -> Tensor:
        """Return the standard error of each average by the delta method, (M,)."""
        w, wv, w2, w2v, w2v2 = self._sums
        mean = wv / w
        return (w2v2 - 2 * mean * w2v + mean.square() * w2).clamp(min=0.0).sqrt() / w


def _means_given_latents(runs: list[PairTrace], gaps: list[MissingAtSite]) -> Tensor:
    """Return E[x_mis|z] of each missing number, (K, M); NaN if it does not exist."""
    return torch.cat([torch.cat([_mean_of(gap, run) for gap in gaps], 1) for run in runs])


def _mean_of(gap: MissingAtSite, run: PairTrace) -> Tensor:
    site = run.model[gap.site].site
    mean = closed_form_mean(site["fn"])
    if mean is None or is_angle(site["fn"]):
        mean = torch.full_like(site["value"], math.nan)
    return gap.of(run, mean, site)


class _Chosen:
    """Latents that are chosen with probabilities proportional to their weights, from chunks.

    Args:
        num_draws: the number of latents to choose for each row, independently.
    """

    def __init__(self, num_draws: int):
        self._num_draws = num_draws
        self._log_total: Tensor | None = None
        self._latents: dict[str, Tensor] = {}

    def add(self, log_weight: Tensor, samples: dict[str, Tensor]) -> None:
        """Add samples, each ``(K, B, *shape)``, with log-weights (K, B).

        A chunk replaces the latents chosen before with the probability of its share of the weights.
        """
        if not self._num_draws:
            return
        own = log_weight.logsumexp(0)
        total = own if self._log_total is None else torch.logaddexp(self._log_total, own)
        self._log_total = total
        share = (own - total).exp().nan_to_num(nan=1.0)
        size = (self._num_draws, len(share))
        taken = torch.rand(size, dtype=share.dtype, device=share.device) < share
        probabilities = log_weight.softmax(0).nan_to_num(nan=1.0)
        indices = torch.distributions.Categorical(probs=probabilities.T).sample((size[0],))
        rows = torch.arange(size[1], device=share.device)
        for name, values in samples.items():
            new = values[indices, rows]
            old = self._latents.get(name, new)
            at = taken.reshape(*size, *(1,) * (new.dim() - 2))
            self._latents[name] = torch.where(at, new, old)

    def latents(self) -> list[dict[str, Tensor]]:
        """Return the latents of each draw, each ``(B, *shape)``."""
        return [
            {name: values[draw] for name, values in self._latents.items()}
            for draw in range(self._num_draws)
        ]


def _draw(
    x: Tensor, run: PairTrace, gaps: list[MissingAtSite], latents: dict[str, Tensor]
) -> Tensor:
    """Return x with samples of p(x_mis|z) in place of the missing numbers."""
    given = {}
    for name, value in latents.items():
        site = run.guide[name].site
        given[name] = site | {"value": _in_layout_of(site, value)}
    drawn = {site["name"]: site for site in drawn_observations(run.replay_unobserved(given))}
    for gap in gaps:
        site = drawn[gap.site]
        x = _filled(x, gap.places, gap.of(run, site["value"], site)[0])
    return x


def _in_layout_of(site: Site, value: Tensor) -> Tensor:
    """Return a value ``(B, *inner plates, *event)`` in the layout of the value of a site."""
    shape = site["fn"].batch_shape + site["fn"].event_shape
    numbers = torch.arange(shape.numel(), device=value.device).reshape(shape)
    order = to_particle_layout(numbers, site, None)[0].flatten()
    return torch.empty_like(value.flatten()).index_copy_(0, order, value.flatten()).reshape(shape)


def _filled(x: Tensor, places: Tensor, numbers: Tensor) -> Tensor:
    return x.flatten().index_copy(0, places, numbers.to(x.dtype)).reshape(x.shape)
