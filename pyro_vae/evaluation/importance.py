r"""The evidence log p(x) of each datum, by importance sampling from the guide."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyro
import torch
from rich.progress import Progress
from torch import Tensor

from pyro_vae import programs
from pyro_vae.arguments import positive_integer
from pyro_vae.capture import Capture, Captured, check_capture
from pyro_vae.evaluation.estimating import estimating
from pyro_vae.evaluation.psis import khat_of_tail, tail_length
from pyro_vae.minibatches import Data, Minibatches
from pyro_vae.progress import task
from pyro_vae.terms import terms
from pyro_vae.traces import Program

UNRELIABLE_KHAT = 0.7


@dataclass(frozen=True)
class Evidence:
    """Estimates of log p(x), in nats, float64 on the CPU.

    Args:
        values: log p(x_n), shape (N,).
        monte_carlo_errors: standard error of each value, of the draws alone, shape (N,); NaN for
            one particle.
        khat: Pareto diagnostic of each value, shape (N,); see :func:`pyro_vae.khat`.
        num_particles: draws for each datum.
        dimensions: how many numbers a datum x has.
    """

    values: Tensor
    monte_carlo_errors: Tensor
    khat: Tensor
    num_particles: int
    dimensions: int

    @property
    def mean(self) -> float:
        """The average over the data."""
        return self.values.mean().item()

    @property
    def standard_error(self) -> float:
        """Standard error of the mean, for the population that the data are drawn from.

        It holds the spread of the data and of the draws; NaN for one datum.
        """
        return standard_error(self.values)

    @property
    def bits_per_dimension(self) -> float:
        r""":math:`-\frac{1}{D \log 2} \frac1N \sum_n \log p(x_n)`, for x of D numbers.

        A code length where p(x) is a probability; a density has it for data in the unit that it
        was given. D is that of x as it was passed, the padding of sequences included.
        """
        return -self.mean / (self.dimensions * math.log(2))

    @property
    def monte_carlo_error(self) -> float:
        """Standard error of the mean for these very data: that of the draws alone."""
        return self.monte_carlo_errors.square().sum().sqrt().item() / len(self.values)

    @property
    def unreliable_share(self) -> float:
        """The share of data whose k-hat is above 0.7, or could not be told."""
        return 1.0 - (self.khat <= UNRELIABLE_KHAT).double().mean().item()

    def __str__(self) -> str:
        return (
            f"log p(x) = {self.mean:.2f} ± {self.standard_error:.2f} nats "
            f"({len(self.values)} data, {self.num_particles} particles, "
            f"k-hat > 0.7: {self.unreliable_share:.1%})"
        )


def evidence(
    model: Program,
    guide: Program,
    data: Data,
    *,
    num_particles: int = 5000,
    batch_size: int = 100,
    pairs_per_pass: int = 5_000,
    vectorize_particles: bool = True,
    capture: Capture = "auto",
    seed: int | None = None,
    progress: bool | Progress = False,
    description: str = "evidence",
) -> Evidence:
    r"""Estimate log p(x) of each datum by importance sampling (Burda et al. 2016, eq. 8).

    .. math::
        \log \hat p(x) = \log \frac1K \sum_{k=1}^K \frac{p(x, z_k)}{q(z_k|x)},
        \qquad z_k \sim q(z|x)

    The weights are streamed: memory is bounded by ``pairs_per_pass`` whatever K and N. The
    standard error is by the delta method, :math:`\sqrt{\mathrm{var}(w)/K} / \bar w`; the estimate
    of log p(x) is low by about half its square.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        data: what :func:`pyro_vae.fit` takes, in an order that is kept.
        num_particles: K, for each datum.
        batch_size: data points at a time.
        pairs_per_pass: (particle, datum) pairs in one run of the programs.
        vectorize_particles: draw many particles in one run; see :func:`pyro_vae.terms`.
        capture: replay the operations of a run as compiled code; see :func:`pyro_vae.fit`.
        seed: fixes the draws and leaves the process's random numbers as they were.
        progress: show a bar; or a rich Progress to add one to.
        description: text before the bar.

    Returns:
        The :class:`Evidence`.

    Raises:
        ValueError: bad data or arguments, or a pair that breaks the contract; a site is global or
            scaled, so that the weights are not those of single data points.

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
    """
    positive_integer("num_particles", num_particles)
    positive_integer("pairs_per_pass", pairs_per_pass)
    check_capture(capture)
    batches = Minibatches(data, batch_size, device=programs.device_of(model, guide))
    results = []
    with (
        estimating(
            "evidence", model, guide, batches, vectorize_particles=vectorize_particles, seed=seed
        ) as plate_nesting,
        task(progress, description, batches.num_data, transient=True) as advance,
    ):
        # Passes of one size, so that one capture serves all; what the last draws too much is
        # dropped.
        passes = -(-num_particles // max(1, pairs_per_pass // len(batches.first()[0])))
        particles_per_pass = -(-num_particles // passes)

        def log_weights(*batch: Tensor) -> list[Tensor]:
            t = terms(
                model,
                guide,
                *batch,
                num_particles=particles_per_pass,
                vectorize_particles=vectorize_particles,
                plate_nesting=plate_nesting,
            )
            return [t.log_weight]

        draw = Captured(
            log_weights,
            watch={"model": model, "guide": guide},
            name="a pass of this evidence",
            capture=capture,
        )
        draw.calls_left = batches.num_batches and batches.num_batches * passes
        for batch in batches:
            dimensions = batch[0][0].numel()
            terms(model, guide, *batch)  # values are validated with one particle
            weights = _WeightStream(num_particles)
            draw.recheck()
            with pyro.validation_enabled(False):
                for _ in range(passes):
                    (drawn,) = draw(*batch)
                    drawn = drawn[: num_particles - weights.count]
                    weights.add(drawn.clone())  # the next pass may overwrite it
            results.append((weights.log_mean(), weights.error(), weights.khat()))
            advance(batch[0].shape[0])
    return Evidence(
        *(torch.cat(parts).cpu() for parts in zip(*results, strict=True)),
        num_particles=num_particles,
        dimensions=dimensions,
    )


def standard_error(values: Tensor) -> float:
    """Return the standard error of the mean of independent values, NaN for a single one."""
    if len(values) < 2:
        return math.nan
    return values.std().item() / math.sqrt(len(values))


class _WeightStream:
    """Sums of weights and of their squares, and the largest weights, of chunks (K, B)."""

    _ROWS_AT_A_TIME = 1000

    def __init__(self, num_draws: int):
        self.count = 0
        self._num_draws = num_draws
        self._waiting: list[Tensor] = []
        self._log_sums: Tensor | None = None
        self._largest: Tensor | None = None

    def add(self, log_weights: Tensor) -> None:
        self._waiting.append(log_weights)
        self.count += len(log_weights)
        if sum(map(len, self._waiting)) >= self._ROWS_AT_A_TIME or self.count == self._num_draws:
            self._take_in(torch.cat(self._waiting).double())
            self._waiting = []

    def _take_in(self, largest: Tensor) -> None:
        sums = torch.stack([largest.logsumexp(0), (2 * largest).logsumexp(0)])
        if self._log_sums is not None:
            sums = torch.logaddexp(self._log_sums, sums)
            largest = torch.cat([self._largest, largest])
        self._log_sums = sums
        self._largest = largest.topk(min(self._tail + 1, len(largest)), dim=0).values

    @property
    def _tail(self) -> int:
        return tail_length(self._num_draws)

    def log_mean(self) -> Tensor:
        return self._log_sums[0] - math.log(self.count)

    def error(self) -> Tensor:
        """The standard error of log_mean: that of the mean weight, over the mean weight."""
        if self.count == 1:
            return torch.full_like(self._log_sums[0], math.nan)
        # sum(w^2) / sum(w)^2 is one over the effective sample size: 1/K for equal weights.
        inverse_size = (self._log_sums[1] - 2 * self._log_sums[0]).exp()
        return ((self.count * inverse_size - 1).clamp(min=0) / (self.count - 1)).sqrt()

    def khat(self) -> Tensor:
        return khat_of_tail(self._largest, self.count)
