"""Estimates of log p(x): what holds them, judges them, and puts them together."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_vae.evaluation.weighing.annealing import Annealing

UNRELIABLE_KHAT = 0.7
FEWEST_EFFECTIVE = 10.0
FEWEST_JUDGED = 21  # weights, below which k-hat cannot be told, and few are effective anyhow


class UnreliableEvidence(UserWarning):
    """An estimate of log p(x) whose own diagnostics say that it cannot be trusted."""


@dataclass(frozen=True)
class Evidence:
    r"""Estimates of log p(x), in nats, float64 on the CPU.

    Args:
        values: log p(x_n), shape (N,).
        monte_carlo_errors: standard error of each value, of the draws alone, shape (N,); NaN for
            one particle.
        khat: Pareto diagnostic of each value, shape (N,); see :func:`pyro_vae.khat`.
        num_particles: draws for each datum; chains, in annealed importance sampling.
        dimensions: how many numbers a datum x has.
        effective_sample_size: :math:`(\sum w)^2 / \sum w^2` of each value's weights, shape (N,).
        method: how the values were estimated.
        annealing: what annealed importance sampling saw at each temperature; None otherwise.
    """

    values: Tensor
    monte_carlo_errors: Tensor
    khat: Tensor
    num_particles: int
    dimensions: int
    effective_sample_size: Tensor
    method: str = "importance"
    annealing: Annealing | None = None

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

    @property
    def untrusted(self) -> Tensor:
        """Which values cannot be trusted, shape (N,): k-hat above 0.7, or under 10 effective draws.

        None is called so where there are fewer than 21 draws to judge by.
        """
        if self.num_particles < FEWEST_JUDGED:
            return torch.zeros_like(self.khat, dtype=torch.bool)
        return (self.khat > UNRELIABLE_KHAT) | (self.effective_sample_size < FEWEST_EFFECTIVE)

    def __str__(self) -> str:
        draws = "particles" if self.annealing is None else "chains"
        by = "" if self.method == "importance" else f" by {self.method}"
        return (
            f"log p(x) = {self.mean:.2f} ± {self.standard_error:.2f} nats{by} "
            f"({len(self.values)} data, {self.num_particles} {draws}, "
            f"k-hat > 0.7: {self.unreliable_share:.1%})"
        )


class StoppedEvidence(KeyboardInterrupt):
    """An evidence that was interrupted (Ctrl-C) after some of the data.

    Args:
        so_far: the estimates of the data that were done, in their order.

    Attributes:
        evidence: the same; ``pyro_vae.evidence(..., resume=it)`` goes on behind it.
    """

    def __init__(self, so_far: Evidence):
        super().__init__(
            f"evidence was stopped after {len(so_far.values)} data, which this exception's "
            "attribute `evidence` holds: pass it as resume= to go on"
        )
        self.evidence = so_far


def joined(parts: Sequence[Evidence]) -> Evidence:
    """Put data beside data, of one method."""
    per_datum = ("values", "monte_carlo_errors", "khat", "effective_sample_size")
    columns = {name: torch.cat([getattr(part, name) for part in parts]) for name in per_datum}
    seen = [part.annealing for part in parts if part.annealing is not None]
    return replace(parts[0], **columns, annealing=Annealing.of_all(seen) if seen else None)


def warn_of(evidence: Evidence) -> None:
    """Warn the caller's caller of an estimate that is not to be trusted."""
    if evidence.untrusted.double().mean() > 0.5:
        warnings.warn(
            f"the {evidence.method} estimate of log p(x) cannot be trusted for "
            f"{int(evidence.untrusted.sum())} of {len(evidence.values)} data: their k-hat is above "
            f"{UNRELIABLE_KHAT}, or fewer than {FEWEST_EFFECTIVE:.0f} of {evidence.num_particles} "
            "draws count. It is likely too low. " + _REMEDIES[evidence.method],
            UnreliableEvidence,
            stacklevel=3,  # the caller of evidence
        )


_REMEDIES = {
    "importance": "Take more particles, a better guide, or method=pv.AIS().",
    "naive": 'Draws from the prior seldom hit a posterior: take method="importance".',
    "ais": "Take more temperatures, or more leapfrog steps.",
}


def standard_error(values: Tensor) -> float:
    """Return the standard error of the mean of independent values, NaN for a single one."""
    if len(values) < 2:
        return math.nan
    return values.std().item() / math.sqrt(len(values))
