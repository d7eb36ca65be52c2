r"""The evidence log p(x) of each datum: by importance sampling, from the guide or otherwise."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import pyro
import torch
from rich.progress import Progress
from torch import Tensor

from pyro_vae import programs
from pyro_vae.arguments import positive_integer
from pyro_vae.capture import Capture, Captured, check_capture
from pyro_vae.evaluation.estimating import estimating
from pyro_vae.evaluation.weighing.annealing import AIS, Annealer, Annealing
from pyro_vae.evaluation.weighing.log_evidence import (
    Evidence,
    StoppedEvidence,
    joined,
    warn_of,
)
from pyro_vae.evaluation.weighing.points import log_likelihood_at_prior_draws
from pyro_vae.evaluation.weighing.tempering import TemperedPath
from pyro_vae.evaluation.weighing.weights import WeightStream
from pyro_vae.minibatches import Batch, Data, Minibatches
from pyro_vae.progress import task
from pyro_vae.seeding import seeded
from pyro_vae.terms import terms
from pyro_vae.traces import Program

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
    resume: Evidence | None = None,
    progress: bool | Progress = False,
    description: str = "evidence",
) -> Evidence:
    r"""Estimate log p(x) of each datum, by importance sampling (Burda et al. 2016, eq. 8).

    .. math::
        \log \hat p(x) = \log \frac1K \sum_{k=1}^K \frac{p(x, z_k)}{q(z_k|x)},
        \qquad z_k \sim q(z|x)

    Other methods: ``"naive"`` draws from the prior, :math:`\log \frac1K \sum_k p(x|z_k)`, which
    needs about :math:`e^{\mathrm{KL}(p(z|x) \| p(z))}` draws; and :class:`pyro_vae.AIS` walks
    chains from the guide, or the prior, to the posterior.

    The weights are streamed: memory is bounded by ``pairs_per_pass`` whatever K and N. The
    standard error is by the delta method, :math:`\sqrt{\mathrm{var}(w)/K} / \bar w`; the estimate
    of log p(x) is low by about half its square. Where more than half of the values cannot be
    trusted, see :attr:`Evidence.untrusted`, a warning says so.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        data: what :func:`pyro_vae.fit` takes, in an order that is kept.
        method: ``"importance"``, ``"naive"``, or a :class:`pyro_vae.AIS`; ``"ais"`` is one as it
            comes.
        num_particles: K, for each datum; annealed importance sampling has its ``num_chains``.
        batch_size: data points at a time.
        pairs_per_pass: (particle, datum) pairs in one run of the programs.
        vectorize_particles: draw many particles in one run; see :func:`pyro_vae.terms`.
        capture: replay the operations of a run as compiled code; see :func:`pyro_vae.fit`.
        seed: fixes the draws and leaves the process's random numbers as they were.
        resume: of the first data, from a call of the same arguments that was stopped (Ctrl-C): a
            :class:`pyro_vae.StoppedEvidence` holds it. With the seed of that call, the draws
            are those of one that was not stopped.
        progress: show a bar; or a rich Progress to add one to.
        description: text before the bar.

    Returns:
        The :class:`Evidence`.

    Raises:
        StoppedEvidence: a KeyboardInterrupt, with the estimates of the data that were done.
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
        >>> by_chains = pv.evidence(model, guide, x, method=pv.AIS(num_temperatures=10), seed=0)
        >>> bool(((by_chains.values - exact).abs() < 4 * by_chains.monte_carlo_errors).all())
        True
    """
    positive_integer("num_particles", num_particles)
    positive_integer("pairs_per_pass", pairs_per_pass)
    check_capture(capture)
    name, ais = _parse(method)
    num_draws = num_particles if ais is None else ais.num_chains
    if resume is not None and (resume.method, resume.num_particles) != (name, num_draws):
        raise ValueError(
            f"resume holds estimates by {resume.method} of {resume.num_particles} draws, not by "
            f"{name} of {num_draws}"
        )
    batches = Minibatches(data, batch_size, device=programs.device_of(model, guide))
    with (
        estimating(
            "evidence", model, guide, batches, vectorize_particles=vectorize_particles, seed=seed
        ) as plate_nesting,
        task(progress, description, batches.num_data, transient=True) as advance,
    ):
        dimensions = batches.first()[0][0].numel()  # here: a stream may draw its order anew
        run = _Run(
            model,
            guide,
            batches,
            plate_nesting,
            pairs_per_pass,
            vectorize_particles,
            capture,
            0 if resume is None else len(resume.values),
            advance,
        )
        if ais is None:
            estimates = run.sample(num_particles, from_prior=name == "naive")
        else:
            estimates = run.anneal(ais)
        parts = [] if resume is None else [resume]
        try:
            for weights, annealing in estimates:
                values = (weights.log_mean(), weights.error(), weights.khat())
                parts.append(
                    Evidence(
                        *(each.cpu() for each in values),
                        num_particles=weights.count,
                        dimensions=dimensions,
                        effective_sample_size=weights.effective_sample_size().cpu(),
                        method=name,
                        annealing=annealing,
                    )
                )
                advance(len(parts[-1].values))
        except KeyboardInterrupt:
            if not parts:
                raise
            raise StoppedEvidence(joined(parts)) from None
    result = joined(parts)
    warn_of(result)
    return result


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
    num_done: int
    advance: Callable[..., None]

    @property
    def _programs(self) -> dict[str, Program]:
        return {"model": self.model, "guide": self.guide}

    def _parts(self, rows: int) -> Iterator[tuple[Batch, int]]:
        """Yield minibatches in parts of so many rows, and a seed for each; leave out those done.

        So a part's random numbers are the same whether or not those before it are run.
        """
        left = self.num_done
        for batch in self.batches:
            for part in zip(*(column.split(rows) for column in batch), strict=True):
                seed, size = int(torch.randint(2**62, ())), len(part[0])
                if left == 0:
                    yield part, seed
                elif left < size:
                    raise ValueError(
                        f"resume holds {self.num_done} data, which end inside of a pass: resume "
                        "with the data, the batch_size and the method that were stopped"
                    )
                else:
                    left -= size
                    self.advance(size)
        if left:
            raise ValueError(f"resume holds {left} data more than there are")

    def sample(
        self, num_particles: int, *, from_prior: bool
    ) -> Iterator[tuple[WeightStream, Annealing | None]]:
        """Draw and weigh the particles of each minibatch."""
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
        draw.calls_left = self.batches.num_batches and self.batches.num_batches * passes
        for batch, seed in self._parts(sys.maxsize):
            with seeded(seed):
                terms(self.model, self.guide, *batch)  # values are validated with one particle
                weights = WeightStream(num_particles)
                draw.recheck()
                with pyro.validation_enabled(False):
                    for _ in range(passes):
                        (drawn,) = draw(*batch)
                        drawn = drawn[: num_particles - weights.count]
                        weights.add(drawn.clone())  # the next pass may overwrite it
            yield weights, None

    def anneal(self, ais: AIS) -> Iterator[tuple[WeightStream, Annealing]]:
        """Walk the chains of each minibatch, as few data at a time as a pass has pairs for."""
        path = TemperedPath(
            self.model,
            self.guide,
            self.batches.first(),
            start=ais.start,
            plate_nesting=self.plate_nesting,
            vectorize_particles=self.vectorize_particles,
        )
        annealer = Annealer(ais, path, watch=self._programs, capture=self.capture)
        rows = max(1, self.pairs_per_pass // ais.num_chains)
        num_data = self.batches.num_data
        num_parts = num_data and -(-num_data // min(rows, self.batches.batch_size))
        status = functools.partial(self.advance, 0)
        for part, seed in self._parts(rows):
            with seeded(seed):
                terms(self.model, self.guide, *part)  # values are validated with one particle
                with pyro.validation_enabled(False):
                    step_sizes = annealer.step_sizes(part, num_parts, status)
                    weights, annealing = annealer.forward(part, step_sizes, num_parts, status)
            yield weights, annealing


def _parse(method: Method) -> tuple[str, AIS | None]:
    if isinstance(method, AIS):
        return "ais", method
    if method == "ais":
        return "ais", AIS()
    if method not in ("importance", "naive"):
        raise ValueError(
            f'method must be "importance", "naive", "ais" or a pyro_vae.AIS, got {method!r}'
        )
    return method, None
