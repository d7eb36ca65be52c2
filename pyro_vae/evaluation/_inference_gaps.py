r"""The inference gap: the loss of the guide's family, and that of one encoder for all data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from rich.progress import Progress
from torch import Tensor

from pyro_vae._capture import Capture, Captured, check_capture
from pyro_vae._programs.data_plate import name_data_plate
from pyro_vae._programs.evaluation import gradients_of_values
from pyro_vae._programs.local_offsets import LocalMembers, local_members, require_both_methods
from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.parameters import require_programs, require_trainable_tensors
from pyro_vae._programs.terms import Terms, terms
from pyro_vae._utils.checks import check_call, positive_integer
from pyro_vae._utils.interrupts import Interrupted
from pyro_vae._utils.numerics import gradient_or_zeros
from pyro_vae._utils.precision import Precision, check_precision
from pyro_vae._utils.value_checks import values_checked
from pyro_vae.datasets._minibatches import Batch, Data, Minibatches
from pyro_vae.evaluation._ascent import Ascent
from pyro_vae.evaluation._gap_estimates import (
    QUANTITIES,
    SOURCES,
    Estimate,
    WeightSummary,
    estimate_gaps,
)
from pyro_vae.evaluation._log_evidence import Evidence, khat_share, share_above
from pyro_vae.evaluation._runner import Runner

if TYPE_CHECKING:
    import pandas as pd

_SUM_OF_GAPS = "The sum of both gaps is the mean minus the elbo of pyro_vae.evidence."
_MOST_FAILED = 0.02  # a share; if all ascents end at their start, chance alone makes it 0.001


@dataclass(frozen=True)
class InferenceGaps:
    r"""The gap between log p(x) and the ELBO, split in two. Each quantity is an :class:`Estimate`.

    Args:
        log_evidence: :math:`\log p(x)`.
        best_elbo: the ELBO of the best member of the guide's family for each data point.
        amortized_elbo: the ELBO of the guide.
        approximation_gap: ``log_evidence`` minus ``best_elbo``.
        amortization_gap: ``best_elbo`` minus ``amortized_elbo``.
        parameters: parameters of the best members, (N, P), as ``guide.sample`` accepts them. For a
            guide without that method, they are offsets of the parameters of its distributions, in
            unconstrained space, site by site. They have the dtype of the data.
        sources: the source of each log p(x), shape (N,). It is 0 for importance sampling from the
            guide, 1 for the best member, and 2 for the ``evidence`` argument.
        khat: Pareto diagnostic of the weights of that source, shape (N,).
        failed: whether the ascent of a data point failed, shape (N,). It then ended in NaN, or
            more than three standard errors below its start. The guide replaces the best member
            there, so the amortization gap is zero.
        steps: the number of steps for each minibatch.
        converged: whether the ascent of each minibatch stopped by its ``patience``, at a finite
            ELBO.
        num_particles: samples per data point and guide.
    """

    log_evidence: Estimate
    best_elbo: Estimate
    amortized_elbo: Estimate
    approximation_gap: Estimate
    amortization_gap: Estimate
    parameters: Tensor
    sources: Tensor
    khat: Tensor
    failed: Tensor
    steps: tuple[int, ...]
    converged: tuple[bool, ...]
    num_particles: int

    @property
    def table(self) -> pd.DataFrame:
        """A row for each quantity, with its mean, standard error and Monte Carlo error."""
        import pandas as pd

        columns = ("mean", "standard_error", "monte_carlo_error")
        rows = [[getattr(getattr(self, name), column) for column in columns] for name in QUANTITIES]
        return pd.DataFrame(rows, index=pd.Index(QUANTITIES, name="quantity"), columns=columns)

    def __repr__(self) -> str:
        counts = torch.bincount(self.sources, minlength=len(SOURCES)).tolist()
        used = ", ".join(f"{name} {n}" for name, n in zip(SOURCES, counts, strict=True) if n)
        count = int(self.failed.sum())
        failed = f", {count} data points below their start" if count else ""
        share = share_above(self.khat, self.khat.isnan())
        return (
            f"nats per data point\n{self.table.to_string(float_format='{:.3f}'.format)}\n"
            f"{len(self.sources)} data points, {self.num_particles} particles; "
            f"log p(x) from {used}; {khat_share(share, self.num_particles)}; "
            f"{min(self.steps)} to {max(self.steps)} steps, "
            f"{sum(self.converged)} of {len(self.converged)} ascents converged{failed}"
        )


@torch.inference_mode(False)
@torch.enable_grad()
def inference_gaps(
    model: Program,
    guide: Program,
    data: Data,
    *,
    num_particles: int = 5000,
    ascent: Ascent | None = None,
    evidence: Evidence | None = None,
    batch_size: int = 100,
    pairs_per_pass: int = 5_000,
    vectorize_particles: bool | None = None,
    plate: str | None = None,
    capture: Capture = "auto",
    precision: Precision | None = None,
    seed: int | None = None,
    resume: Interrupted | None = None,
    progress: bool | Progress = False,
    description: str = "inference gaps",
) -> InferenceGaps:
    r"""Split the gap of the ELBO in two (Cremer, Li & Duvenaud 2018).

    .. math::
        \log p(x) - \mathcal{L}[q_{\lambda(x)}] =
        \underbrace{\log p(x) - \mathcal{L}[q^*]}_{\text{approximation gap}}
        + \underbrace{\mathcal{L}[q^*] - \mathcal{L}[q_{\lambda(x)}]}_{\text{amortization gap}},
        \qquad q^* = q_{\lambda^*}, \quad \lambda^* = \arg\max_\lambda \mathcal{L}[q_\lambda]

    for each data point. :math:`\lambda` are the encoder's outputs for a data point. All other
    parameters of the guide belong to the family and are not changed. Examples are the networks of
    an autoregressive flow, a flow that is not amortized, and the offsets of a mixture.

    Any guide is accepted. If it has the methods ``parameters_of`` and ``sample``, as an
    :class:`pyro_vae.guides.AmortizedGuide` has, :math:`\lambda` are the rows of the first. For any
    other program, :math:`\lambda` are the parameters of the distributions at its latent sites, in
    unconstrained space (the logarithm of a scale). A parameter that has the same value for all
    data points belongs to the family. So does a number inside a transform that is not affine. If a
    site depends on latents sampled before it, a data point has one offset of its parameters for all
    values of these latents.

    :math:`\lambda^*` is found by gradient ascent from :math:`\lambda(x)`, for all data points of
    a minibatch in parallel; see :class:`Ascent`. Both ELBOs and log p(x) are then estimated with
    new samples from the two guides. So the noise of the ascent does not bias the best ELBO. If the
    ascent ended more than three standard errors below its start, the start counts as the best
    member.

    There are up to three estimates of log p(x): importance sampling from each of the two guides,
    and ``evidence``. The one with the lowest median standard error over the data is used. Another
    one replaces it at a data point where it is clearly higher, with a k-hat of at most 0.7. The
    difference must be at least three standard errors. For many data points this limit is higher,
    so that chance exceeds it at any of them in only one of a hundred calls. An estimate that is
    clearly below the best ELBO is impossible. The samples of the best member replace it.

    The standard errors do not include two biases of the approximation gap. It is too large if the
    ascent ends below its optimum. It is too small because the estimate of log p(x) is low by about
    half its squared standard error. A longer ascent or more particles reduce these biases, but more
    data points do not.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x). Its methods ``parameters_of(x, *covariates)``, which returns rows
            (B, P), and ``sample(parameters, x, *covariates)``, which runs the guide at those rows,
            are used if it has both.
        data: the data, as in :func:`pyro_vae.fit`; usually held-out data.
        num_particles: samples per data point from each of the two guides, at least 2.
        ascent: settings of the ascent. The default is ``Ascent()``.
        evidence: another estimate of log p(x) for the same data, in the same order.
        batch_size: data points at a time.
        pairs_per_pass: pairs of a particle and a data point in one run of the programs.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.
        plate: the name of the plate of the data points; see :func:`pyro_vae.terms`.
        capture: replay the operations of a run as compiled code; see :func:`pyro_vae.fit`.
        precision: of float32 matrix products; see :func:`pyro_vae.fit`.
        seed: of the samples. The random numbers of the process are restored afterwards.
        resume: the exception of an interrupted call (Ctrl-C) with the same arguments.
        progress: show a progress bar, or add one to a rich Progress.
        description: text before the bar.

    Returns:
        The :class:`InferenceGaps`. In a group of processes (torch.distributed), each process does
        its share of the minibatches and returns the whole result.

    Raises:
        Interrupted: Ctrl-C was pressed. It is a KeyboardInterrupt, and ``.partial`` has the gaps
            for the first minibatches.
        TypeError: The guide has only one of ``parameters_of`` and ``sample``. ``ascent`` is not an
            :class:`Ascent`, or ``evidence`` is not an :class:`Evidence`.
        ValueError: Data or an argument are invalid, or the pair breaks a rule (docs/contract.md).
            A tensor of the pair was made under ``torch.inference_mode``. A site is global or
            scaled. A latent variable is a Delta in the guide or has no reparameterized sample. No
            parameter of the guide's distributions differs between data points, or a distribution
            cannot be made from its parameters. ``evidence`` has another number of data points.

    Example:
        >>> import torch, pyro, pyro_vae as pv
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> guide = pv.guides.AmortizedNormal(model, encoder=torch.nn.Identity())  # not trained
        >>> x = torch.tensor([[0.5], [-1.0]])
        >>> ascent = pv.evaluation.Ascent(learning_rate=0.05, window=50, patience=2)
        >>> gaps = pv.inference_gaps(model, guide, x, ascent=ascent, seed=0)
        >>> gaps.approximation_gap.mean < 0.01 < gaps.amortization_gap.mean
        True
    """
    check_call(inference_gaps, locals())
    name_data_plate(plate, model, guide)
    num_particles = positive_integer("num_particles", num_particles, minimum=2)
    pairs_per_pass = positive_integer("pairs_per_pass", pairs_per_pass)
    check_capture(capture)
    check_precision(precision)
    ascent = Ascent() if ascent is None else ascent
    if not isinstance(ascent, Ascent):
        raise TypeError(f"ascent must be a pyro_vae.evaluation.Ascent, got {ascent!r}")
    require_programs(model, guide)
    require_both_methods(guide)
    require_trainable_tensors(model, guide)
    with Runner.open(
        "inference_gaps",
        model,
        guide,
        data,
        batch_size=batch_size,
        vectorize_particles=vectorize_particles,
        precision=precision,
        may_fold=False,  # its parameters have one row per data point
        seed=seed,
        resume=resume,
        settings={"num_particles": num_particles, "ascent": ascent},
        progress=progress,
        description=description,
    ) as runner:
        given = None if evidence is None else _given(evidence, runner.batches)
        local_guide = local_members(runner.guide, runner.batches.first())
        compare = _comparison(runner, local_guide, ascent, num_particles, pairs_per_pass, capture)
        parts = runner.map_batches(compare, done=runner.done)
    gaps = _gaps(parts, given, num_particles)
    runner.raise_if_interrupted(gaps, len(gaps.sources), parts)
    _warn_of(gaps, ascent)
    return gaps


def _comparison(
    runner: Runner,
    guide: LocalMembers,
    ascent: Ascent,
    num_particles: int,
    pairs_per_pass: int,
    capture: Capture,
) -> Callable[[Batch], tuple[Tensor, ...]]:
    """Return a function that finds best members and computes all log-weights of a minibatch."""
    model, batches = runner.model, runner.batches

    def run(parameters: Tensor, batch: tuple[Tensor, ...], count: int) -> Terms:
        def member(*batch: Tensor) -> dict[str, Tensor]:
            return guide.sample(parameters, *batch)

        return terms(model, member, *batch, num_particles=count, **runner.particle_options)

    def elbo_and_gradient(parameters: Tensor, *batch: Tensor) -> list[Tensor]:
        with gradients_of_values():
            parameters = parameters.detach().requires_grad_()
            t = run(parameters, batch, ascent.num_particles)
            t.require_reparameterized("inference_gaps", _SUM_OF_GAPS)
            elbo = (t.log_likelihood - t.kl).mean(0)
            gradient = gradient_or_zeros(elbo, parameters)
        return [elbo.detach(), gradient]

    passes = -(-num_particles // max(1, pairs_per_pass // len(batches.first()[0])))
    particles_per_pass = -(-num_particles // passes)

    def log_weights(parameters: Tensor, *batch: Tensor) -> list[Tensor]:
        return [run(parameters, batch, particles_per_pass).log_weight]

    capturing = {"watch": runner.programs, "capture": capture}
    step = Captured(elbo_and_gradient, name="a step of the ascent", **capturing)
    draw = Captured(log_weights, name="a pass of inference_gaps", **capturing)
    if batches.num_batches:  # a lower bound
        share = runner.group.max_share(batches.num_batches)
        step.calls_left = share * ascent.window * (1 + ascent.patience)
        draw.calls_left = share * passes * 2

    def compare(batch: Batch) -> tuple[Tensor, ...]:
        terms(model, runner.guide, *batch)  # validate values with one particle
        step.recheck()
        draw.recheck()

        def checked(run: Captured, parameters: Tensor) -> Sequence[Tensor]:
            runner.group.check()
            return run(parameters, *batch)

        with values_checked(False):
            start = guide.parameters_of(*batch)
            end = ascent(partial(checked, step), start)
            drawn = [
                WeightSummary.of(lambda p=p: checked(draw, p)[0], num_particles)
                for p in (start, end.parameters)
            ]
        runner.advance(0, f"{end.steps} steps")
        ended = (torch.tensor(end.steps), torch.tensor(end.converged))
        return start, end.parameters, *drawn[0].columns, *drawn[1].columns, *ended

    return compare


def _warn_of(gaps: InferenceGaps, ascent: Ascent) -> None:
    """Warn, at the line that called the estimator, about ascents that missed the best member."""
    failed = gaps.failed.double().mean().item()
    if failed > _MOST_FAILED:
        warnings.warn(
            f"inference_gaps: the ascents of {failed:.1%} of the data ended clearly below their "
            "start. The guide replaces the best member there, so the amortization gap is too low "
            "and the approximation gap too high. Pass an Ascent with a smaller learning rate or "
            "more particles.",
            stacklevel=3,
        )
    elif not all(gaps.converged):
        warnings.warn(
            f"inference_gaps: {gaps.converged.count(False)} of {len(gaps.converged)} ascents were "
            f"still gaining when they reached {ascent.max_steps} steps. Their approximation gap is "
            "an upper bound. Pass an Ascent with more steps or a larger learning rate.",
            stacklevel=3,
        )


def _gaps(
    minibatches_done: list[tuple[Tensor, ...]],
    given: tuple[Tensor, Tensor, Tensor] | None,
    num_particles: int,
) -> InferenceGaps:
    """Combine the results of all minibatches."""
    *columns, steps, converged = zip(*minibatches_done, strict=True)
    starts, ends, *of_draws = map(torch.cat, columns)
    count = len(of_draws) // 2
    if given is not None:
        given = tuple(column[: len(starts)] for column in given)
    parts = estimate_gaps(WeightSummary(*of_draws[:count]), WeightSummary(*of_draws[count:]), given)
    return InferenceGaps(
        **{name: getattr(parts, name) for name in (*QUANTITIES, "sources", "khat", "failed")},
        parameters=torch.where(parts.failed.unsqueeze(1), starts, ends),
        steps=tuple(int(each) for each in steps),
        converged=tuple(bool(each) for each in converged),
        num_particles=num_particles,
    )


def _given(evidence: Evidence, batches: Minibatches) -> tuple[Tensor, Tensor, Tensor]:
    """Return the values, errors and k-hats of an evidence after checks of its type and length."""
    if not isinstance(evidence, Evidence):
        raise TypeError(f"evidence must be a result of pv.evidence, got {type(evidence).__name__}")
    if batches.num_data != len(evidence.values):
        raise ValueError(
            f"evidence has {len(evidence.values)} values for {batches.num_data or 'streamed'} "
            "data points. Call pv.evidence with the data of this call"
        )
    return evidence.values, evidence.monte_carlo_errors, evidence.khat
