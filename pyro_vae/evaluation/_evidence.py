r"""The evidence log p(x) of each datum: by importance sampling, from the guide or otherwise."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from rich.progress import Progress
from torch import Tensor

from pyro_vae._capture import Capture, Captured, check_capture
from pyro_vae._programs import parameters as programs
from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.terms import terms
from pyro_vae._utils.checks import check_call, positive_integer
from pyro_vae._utils.progress import task
from pyro_vae._utils.value_checks import values_checked
from pyro_vae.datasets._minibatches import Batch, Data, Minibatches
from pyro_vae.evaluation._ais import AIS, Annealer, Annealing
from pyro_vae.evaluation._delta_sites import log_likelihood_at_prior_draws, prior_guide
from pyro_vae.evaluation._estimating import estimating
from pyro_vae.evaluation._log_evidence import Evidence, StoppedEvidence, warn_of
from pyro_vae.evaluation._stopping import Stopped, Unfinished, check_resume
from pyro_vae.evaluation._tempered_path import TemperedPath
from pyro_vae.evaluation._together import Together
from pyro_vae.evaluation._walking import minibatches, walk
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
    vectorize_particles: bool = True,
    capture: Capture = "auto",
    seed: int | None = None,
    resume: Stopped | Evidence | None = None,
    progress: bool | Progress = False,
    description: str = "evidence",
) -> Evidence:
    r"""Estimate log p(x) of each datum, by importance sampling (Burda et al. 2016, eq. 8).

    .. math::
        \log \hat p(x) = \log \frac1K \sum_{k=1}^K \frac{p(x, z_k)}{q(z_k|x)},
        \qquad z_k \sim q(z|x)

    Other methods: ``"naive"`` draws from the prior, :math:`\log \frac1K \sum_k p(x|z_k)`, which
    needs about :math:`e^{\mathrm{KL}(p(z|x) \| p(z))}` draws; and :class:`AIS` walks
    chains from the guide, or the prior, to the posterior.

    The weights are streamed: memory is bounded by ``pairs_per_pass`` whatever K and N. The
    standard error is by the delta method, :math:`\sqrt{\mathrm{var}(w)/K} / \bar w`; the estimate
    of log p(x) is low by about half its square. Where more than half of the values cannot be
    trusted, see :attr:`Evidence.untrusted`, a warning says so.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x). Where nothing is drawn from it (``"naive"``, chains that start
            from the prior) it says no more than which pair was fitted.
        data: what :func:`pyro_vae.fit` takes, in an order that is kept.
        method: ``"importance"``, ``"naive"``, or a :class:`AIS`; ``"ais"`` is one as it
            comes.
        num_particles: K, for each datum; annealed importance sampling has its ``num_chains``.
        batch_size: data points at a time.
        pairs_per_pass: (particle, datum) pairs in one run of the programs.
        vectorize_particles: draw many particles in one run; see :func:`pyro_vae.terms`.
        capture: replay the operations of a run as compiled code; see :func:`pyro_vae.fit`.
        seed: fixes the draws and leaves the process's random numbers as they were.
        resume: what a call of the same arguments raised when it was stopped (Ctrl-C); or the
            estimates of the first data, which go on with the draws of the seed that is given.
        progress: show a bar; or a rich Progress to add one to.
        description: text before the bar.

    Returns:
        The :class:`Evidence`. In a group of processes (torch.distributed) each calls with all
        data, does its share of the minibatches, and has the whole of it.

    Raises:
        StoppedEvidence: a KeyboardInterrupt, with the estimates of the data that were done; see
            :class:`pyro_vae.evaluation.Stopped`. A chain that was on its way is dropped.
        ValueError: bad data or arguments, or a pair that breaks the contract; a site is global or
            scaled, so that the weights are not those of single data points; annealed importance
            sampling cannot move a latent, or score the guide.

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
    num_particles = positive_integer("num_particles", num_particles)
    pairs_per_pass = positive_integer("pairs_per_pass", pairs_per_pass)
    check_capture(capture)
    check_resume(resume, Evidence)
    name, ais = _parse(method)
    num_draws = num_particles if ais is None else ais.num_chains
    so_far = resume.partial if isinstance(resume, Stopped) else resume
    if isinstance(so_far, Evidence) and (so_far.method, so_far.num_particles) != (name, num_draws):
        raise ValueError(
            f"resume holds estimates by {so_far.method} of {so_far.num_particles} draws, not by "
            f"{name} of {num_draws}"
        )
    if isinstance(resume, Evidence) and ais is not None and resume.annealing.settings != ais:
        raise ValueError(f"resume holds estimates by {resume.annealing.settings}, not by {ais}")
    # A guide that nothing is drawn from need not be one that could be.
    drawn_from = prior_guide(model) if name == "naive" or (ais and ais.start == "prior") else guide
    settings = {"method": ais or name}
    done = [_columns(resume)] if isinstance(resume, Evidence) else []
    with Together() as together:
        if isinstance(resume, Stopped):
            seed = resume.unfinished.seed_again("evidence", seed, **settings)
            done = resume.unfinished.parts
        seed = together.common_seed(seed)
        batches = Minibatches(data, batch_size, device=programs.device_of(model, guide))
        with (
            estimating(
                "evidence",
                model,
                guide,
                batches,
                vectorize_particles=vectorize_particles,
                seed=seed,
                drawn_from=drawn_from,
                needs_latents=ais is not None,
                weighs=ais is None,
            ) as plate_nesting,
            task(progress, description, batches.num_data, transient=True) as show,
        ):
            advance = together.checked(show)
            dimensions = batches.first()[0][0].numel()  # here: a stream may draw its order anew
            run = _Run(
                model,
                drawn_from,
                batches,
                plate_nesting,
                pairs_per_pass,
                vectorize_particles,
                capture,
                together,
            )
            if ais is None:
                rows, estimate = sys.maxsize, run.sampler(num_particles, name == "naive")
            else:
                rows = max(1, pairs_per_pass // ais.num_chains)
                estimate = run.annealer(ais, rows, partial(advance, 0))
            parts, _ = walk(
                together, minibatches(batches), estimate, rows=rows, done=done, advance=advance
            )
    values, errors, khats, sizes, *seen = map(torch.cat, zip(*parts, strict=True))
    result = Evidence(
        values,
        errors,
        khats,
        num_particles=num_draws,
        dimensions=dimensions,
        effective_sample_size=sizes,
        method=name,
        annealing=Annealing.of_data(ais, seen) if seen else None,
    )
    if together.stopped:
        unfinished = Unfinished("evidence", len(values), seed, settings, parts)
        raise StoppedEvidence(result, unfinished)
    warn_of(result)
    return result


def _columns(evidence: Evidence) -> tuple[Tensor, ...]:
    """Return what a run estimates of each datum."""
    seen = [] if evidence.annealing is None else evidence.annealing.by_datum
    return (
        evidence.values,
        evidence.monte_carlo_errors,
        evidence.khat,
        evidence.effective_sample_size,
        *seen,
    )


@dataclass(frozen=True)
class _Run:
    """What the methods share."""

    model: Program
    guide: Program
    batches: Minibatches
    plate_nesting: int
    pairs_per_pass: int
    vectorize_particles: bool
    capture: Capture
    together: Together

    @property
    def _programs(self) -> dict[str, Program]:
        return {"model": self.model, "guide": self.guide}

    def sampler(
        self, num_particles: int, from_prior: bool
    ) -> Callable[[Batch], tuple[Tensor, ...]]:
        """Return what draws and weighs the particles of a minibatch."""
        # Passes of one size, so that one capture serves all; what the last draws too much is
        # dropped.
        passes = -(-num_particles // max(1, self.pairs_per_pass // len(self.batches.first()[0])))
        options = {
            "num_particles": -(-num_particles // passes),
            "plate_nesting": self.plate_nesting,
            "vectorize_particles": self.vectorize_particles,
        }

        def log_weights(*batch: Tensor) -> list[Tensor]:
            if from_prior:
                return [log_likelihood_at_prior_draws(self.model, *batch, **options)]
            return [terms(self.model, self.guide, *batch, **options).log_weight]

        draw = Captured(
            log_weights,
            watch=self._programs,
            name="a pass of this evidence",
            capture=self.capture,
        )
        draw.calls_left = (
            self.batches.num_batches and self.together.own(self.batches.num_batches) * passes
        )

        def estimate(batch: Batch) -> tuple[Tensor, ...]:
            terms(self.model, self.guide, *batch)  # values are validated with one particle
            weights = WeightStream(num_particles)
            draw.recheck()
            with values_checked(False):
                for _ in range(passes):
                    self.together.check()
                    (drawn,) = draw(*batch)
                    drawn = drawn[: num_particles - weights.count]
                    weights.add(drawn.clone())  # the next pass may overwrite it
            return _summary(weights)

        return estimate

    def annealer(
        self, ais: AIS, rows: int, status: Callable[[str], None]
    ) -> Callable[[Batch], tuple[Tensor, ...]]:
        """Return what walks the chains of so many data at a time."""
        path = TemperedPath(
            self.model,
            self.guide,
            self.batches.first(),
            start=ais.start,
            plate_nesting=self.plate_nesting,
            vectorize_particles=self.vectorize_particles,
        )
        annealer = Annealer(ais, path, watch=self._programs, capture=self.capture)
        num_data = self.batches.num_data
        num_parts = num_data and self.together.own(
            -(-num_data // min(rows, self.batches.batch_size))
        )

        def estimate(batch: Batch) -> tuple[Tensor, ...]:
            terms(self.model, self.guide, *batch)  # values are validated with one particle
            with values_checked(False):
                step_sizes = annealer.step_sizes(batch, num_parts, status)
                weights, annealing = annealer.forward(batch, step_sizes, num_parts, status)
            return *_summary(weights), *annealing.by_datum

        return estimate


def _summary(weights: WeightStream) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = weights.effective_sample_size()
    return weights.log_mean(), weights.error(), weights.khat(), size


def _parse(method: Method) -> tuple[str, AIS | None]:
    if isinstance(method, AIS):
        return "ais", method
    if method == "ais":
        return "ais", AIS()
    if method not in ("importance", "naive"):
        raise ValueError(
            'method must be "importance", "naive", "ais" or a pyro_vae.evaluation.AIS, '
            f"got {method!r}"
        )
    return method, None
