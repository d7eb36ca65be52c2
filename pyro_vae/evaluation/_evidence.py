r"""Estimate the evidence log p(x) of each data point, by importance sampling or with chains."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from rich.progress import Progress
from torch import Tensor

from pyro_vae._capture import Capture, Captured, check_capture
from pyro_vae._programs.data_plate import name_data_plate
from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.terms import terms
from pyro_vae._programs.validation import checked_run
from pyro_vae._utils.checks import check_call, positive_integer, require_word
from pyro_vae._utils.interrupts import Interrupted
from pyro_vae._utils.precision import Precision, check_precision
from pyro_vae._utils.value_checks import values_checked
from pyro_vae.datasets._minibatches import Batch, Data
from pyro_vae.evaluation._ais import AIS, Annealer, Annealing
from pyro_vae.evaluation._delta_sites import log_likelihood_at_prior_draws, prior_guide
from pyro_vae.evaluation._log_evidence import Evidence, warn_of
from pyro_vae.evaluation._runner import Runner
from pyro_vae.evaluation._tempered_path import TemperedPath
from pyro_vae.evaluation._weights import WeightStream

Method = Literal["importance", "naive", "ais"] | AIS


def evidence(
    model: Program,
    guide: Program,
    data: Data,
    *,
    method: Method = "importance",
    num_particles: int = 5000,
    batch_size: int = 100,
    pairs_per_pass: int = 5_000,
    vectorize_particles: bool | None = None,
    plate: str | None = None,
    capture: Capture = "auto",
    precision: Precision | None = None,
    seed: int | None = None,
    resume: Interrupted | Evidence | None = None,
    progress: bool | Progress = False,
    description: str = "evidence",
) -> Evidence:
    r"""Estimate log p(x) of each data point, by importance sampling (Burda et al. 2016, eq. 8).

    .. math::
        \log \hat p(x) = \log \frac1K \sum_{k=1}^K \frac{p(x, z_k)}{q(z_k|x)},
        \qquad z_k \sim q(z|x)

    ``method="naive"`` samples from the prior, :math:`\log \frac1K \sum_k p(x|z_k)`. It needs about
    :math:`e^{\mathrm{KL}(p(z|x) \| p(z))}` samples. With an :class:`AIS`, Markov chains start at
    samples of the guide or the prior and move to the posterior.

    ``pairs_per_pass`` limits the memory for any K and number of data points. The Monte Carlo error
    is computed by the delta method, :math:`\sqrt{\mathrm{var}(w)/K} / \bar w`. On average, the
    estimate of log p(x) is too low by about half of this error squared. A warning is issued if more
    than half of the values are unreliable (see :attr:`Evidence.untrusted`).

    Args:
        model: program of p(x, z).
        guide: program of q(z|x). With ``"naive"`` or chains from the prior, it is not sampled. It
            is then only needed to find the parameters of the fitted pair.
        data: the data, as in :func:`pyro_vae.fit`, in a fixed order.
        method: ``"importance"``, ``"naive"``, or an :class:`AIS`; ``"ais"`` is ``AIS()``.
        num_particles: K per data point. Annealed importance sampling has ``num_chains`` instead.
        batch_size: number of data points per minibatch.
        pairs_per_pass: number of pairs of a particle and a data point in one run of the programs.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.
        plate: the name of the plate of the data points; see :func:`pyro_vae.terms`.
        capture: replay the operations of a run as compiled code; see :func:`pyro_vae.fit`.
        precision: of float32 matrix products; see :func:`pyro_vae.fit`.
        seed: seed of the samples. The random state of the process is restored afterwards.
        resume: the exception of an interrupted call (Ctrl-C) with the same arguments, or the
            :class:`Evidence` of the first data points. With an Evidence, ``seed`` is used for the
            remaining data points.
        progress: show a progress bar, or add one to a rich Progress.
        description: text before the bar.

    Returns:
        The :class:`Evidence`. In a group of processes (torch.distributed), each process calls
        ``evidence`` with all data, evaluates its share of the minibatches, and returns the whole
        result.

    Raises:
        Interrupted: Ctrl-C was pressed. This KeyboardInterrupt has the estimates for the first data
            points in ``.partial``. Unfinished chains are lost.
        ValueError: Data or an argument are invalid, or the pair breaks a rule (docs/contract.md). A
            site is global or scaled, so a single data point has no importance weight of its own.
            Annealed importance sampling cannot move a latent variable, or cannot score the guide.

    Example:
        >>> import torch, pyro, pyro_vae as pv
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 1.0))  # wider than the posterior
        >>> x = torch.tensor([0.5, -1.0])
        >>> estimate = pv.evidence(model, guide, x, seed=0)
        >>> exact = dist.Normal(0.0, 2**0.5).log_prob(x).double()
        >>> bool(((estimate.values - exact).abs() < 4 * estimate.monte_carlo_errors).all())
        True
        >>> ais = pv.evaluation.AIS(num_temperatures=10)
        >>> by_chains = pv.evidence(model, guide, x, method=ais, seed=0)
        >>> bool(((by_chains.values - exact).abs() < 4 * by_chains.monte_carlo_errors).all())
        True
    """
    check_call(evidence, locals())
    name_data_plate(plate, model, guide)
    num_particles = positive_integer("num_particles", num_particles)
    pairs_per_pass = positive_integer("pairs_per_pass", pairs_per_pass)
    check_capture(capture)
    check_precision(precision)
    name, ais = _parse(method)
    num_draws = num_particles if ais is None else ais.num_chains
    so_far = resume.partial if isinstance(resume, Interrupted) else resume
    if isinstance(so_far, Evidence) and (so_far.method, so_far.num_particles) != (name, num_draws):
        raise ValueError(
            f"resume has estimates by {so_far.method} with {so_far.num_particles} samples for each "
            f"data point, but this call uses {name} with {num_draws}. Pass the arguments of the "
            "earlier call."
        )
    if isinstance(resume, Evidence) and ais is not None and resume.annealing.settings != ais:
        raise ValueError(
            f"resume has estimates by {resume.annealing.settings}, but method is {ais}. Pass the "
            "method of the earlier call."
        )
    # If no sample comes from the guide, another guide is checked with the model.
    drawn_from = prior_guide(model) if name == "naive" or (ais and ais.start == "prior") else guide
    done = [_columns(resume)] if isinstance(resume, Evidence) else []
    with Runner.open(
        "evidence",
        model,
        guide,
        data,
        batch_size=batch_size,
        vectorize_particles=vectorize_particles,
        precision=precision,
        seed=seed,
        resume=None if isinstance(resume, Evidence) else resume,
        done=done,
        settings={"method": ais or name, "num_particles": num_draws},
        progress=progress,
        description=description,
        drawn_from=drawn_from,
        needs_latents=ais is not None,
        weighs=ais is None,
    ) as runner:
        dimensions = runner.batches.first()[0][0].numel()
        if ais is None:
            from_prior = name == "naive"
            estimate = _sampler(runner, num_particles, pairs_per_pass, capture, from_prior)
            parts = runner.map_batches(estimate, done=runner.done)
        else:
            max_rows = max(1, pairs_per_pass // ais.num_chains)
            estimate = _annealer(runner, ais, max_rows, capture)
            parts = runner.map_batches(estimate, done=runner.done, max_rows=max_rows)
    values, errors, khats, sizes, mean_logs, *seen = map(torch.cat, zip(*parts, strict=True))
    result = Evidence(
        values,
        errors,
        khats,
        num_particles=num_draws,
        dimensions=dimensions,
        effective_sample_size=sizes,
        mean_log_weights=mean_logs,
        method=name,
        annealing=Annealing.of_data(ais, seen) if seen else None,
    )
    runner.raise_if_interrupted(result, len(values), parts)
    warn_of(result)
    return result


def _columns(evidence: Evidence) -> tuple[Tensor, ...]:
    """Return the tensors that hold one row for each data point."""
    seen = [] if evidence.annealing is None else evidence.annealing.by_data_point
    return (
        evidence.values,
        evidence.monte_carlo_errors,
        evidence.khat,
        evidence.effective_sample_size,
        evidence.mean_log_weights,
        *seen,
    )


def _sampler(
    runner: Runner, num_particles: int, pairs_per_pass: int, capture: Capture, from_prior: bool
) -> Callable[[Batch], tuple[Tensor, ...]]:
    """Return a function that samples and weights the particles of a minibatch."""
    batches = runner.batches
    # All passes have one size and share a capture. The last pass may have too many particles.
    passes = -(-num_particles // max(1, pairs_per_pass // len(batches.first()[0])))
    options = {"num_particles": -(-num_particles // passes), **runner.particle_options}

    def log_weights(*batch: Tensor) -> list[Tensor]:
        if from_prior:
            return [log_likelihood_at_prior_draws(runner.model, *batch, **options)]
        return [terms(runner.model, runner.guide, *batch, **options).log_weight]

    draw = Captured(
        log_weights, watch=runner.programs, name="a pass of this evidence", capture=capture
    )
    draw.calls_left = batches.num_batches and runner.group.max_share(batches.num_batches) * passes

    def estimate(batch: Batch) -> tuple[Tensor, ...]:
        checked_run(runner.model, runner.guide, batch, weighs=True)
        weights = WeightStream(num_particles)
        draw.recheck()
        with values_checked(False):
            for _ in range(passes):
                runner.group.check()
                (drawn,) = draw(*batch)
                drawn = drawn[: num_particles - weights.count]
                weights.add(drawn.clone())  # the next pass may overwrite it
        return _summary(weights)

    return estimate


def _annealer(
    runner: Runner, ais: AIS, max_rows: int, capture: Capture
) -> Callable[[Batch], tuple[Tensor, ...]]:
    """Return a function that runs the chains of a batch of at most ``max_rows`` data points."""
    batches = runner.batches
    path = TemperedPath(
        runner.model, runner.guide, batches.first(), start=ais.start, **runner.particle_options
    )
    annealer = Annealer(ais, path, watch=runner.programs, capture=capture)
    num_parts = batches.num_data and runner.group.max_share(
        -(-batches.num_data // min(max_rows, batches.batch_size))
    )
    status = partial(runner.advance, 0)

    def estimate(batch: Batch) -> tuple[Tensor, ...]:
        terms(runner.model, runner.guide, *batch)  # values are validated with one particle
        with values_checked(False):
            step_sizes = annealer.step_sizes(batch, num_parts, status)
            weights, annealing = annealer.forward(batch, step_sizes, num_parts, status)
        return *_summary(weights), *annealing.by_data_point

    return estimate


def _summary(weights: WeightStream) -> tuple[Tensor, ...]:
    size = weights.effective_sample_size()
    return weights.log_mean(), weights.error(), weights.khat(), size, weights.mean_log()


def _parse(method: Method) -> tuple[str, AIS | None]:
    if isinstance(method, AIS):
        return "ais", method
    words = ("importance", "naive", "ais")
    require_word("method", method, words, "a pyro_vae.evaluation.AIS")
    return method, AIS() if method == "ais" else None
