"""Estimates of log p(x): what holds them, judges them, and puts them together."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

from torch import Tensor

from pyro_vae.evaluation._ais import Annealing

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
        khat: Pareto diagnostic of each value, shape (N,); see :func:`pyro_vae.evaluation.khat`.
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
        """The share of data whose k-hat is above 0.7, or could not be told.

        It cannot of fewer than 21 draws, nor of weights that are infinite, NaN, or all zero.
        """
        return 1.0 - (self.khat <= UNRELIABLE_KHAT).double().mean().item()

    @property
    def untrusted(self) -> Tensor:
        """Which values cannot be trusted, shape (N,).

        Those that are not finite, whose k-hat is above 0.7, or that have fewer than 10 effective
        draws; of fewer than 21 draws, fewer than a tenth of them.
        """
        few = self.num_particles < FEWEST_JUDGED
        least = self.num_particles / 10 if few else FEWEST_EFFECTIVE
        # Not <, so that no number counts as few. A k-hat of NaN beside many effective draws is
        # that of weights with ties.
        enough = self.effective_sample_size >= least * (1 - 1e-6)
        return ~(self.values.isfinite() & enough) | (self.khat > UNRELIABLE_KHAT)

    def __str__(self) -> str:
        draws = "particles" if self.annealing is None else "chains"
        by = "" if self.method == "importance" else f" by {self.method}"
        return (
            f"log p(x) = {self.mean:.2f} ± {self.standard_error:.2f} nats{by} "
            f"({len(self.values)} data, {self.num_particles} {draws}, "
            f"{khat_share(self.khat)})"
        )


def warn_of(evidence: Evidence) -> None:
    """Warn the caller's caller of an estimate that is not to be trusted."""
    infinite = ~evidence.values.isfinite()
    if infinite.any():
        row = int(infinite.nonzero()[0])
        warnings.warn(
            f"the {evidence.method} estimate of log p(x) is {evidence.values[row].item()} for "
            f"{int(infinite.sum())} of {len(infinite)} data, the first in row {row}: no draw of "
            "theirs has a density above zero, or one is too large for its type. Look at the scale "
            "of the data.",
            UnreliableEvidence,
            stacklevel=3,  # the caller of evidence
        )
    elif evidence.untrusted.double().mean() > 0.5:
        warnings.warn(
            f"the {evidence.method} estimate of log p(x) cannot be trusted for "
            f"{int(evidence.untrusted.sum())} of {len(evidence.values)} data: their k-hat is above "
            f"{UNRELIABLE_KHAT}, or hardly any of {evidence.num_particles} "
            "draws count. It is likely too low. " + _REMEDIES[evidence.method],
            UnreliableEvidence,
            stacklevel=3,  # the caller of evidence
        )


_REMEDIES = {
    "importance": "Take more particles, a better guide, or method=pv.evaluation.AIS().",
    "naive": 'Draws from the prior seldom hit a posterior: take method="importance".',
    "ais": "Take more temperatures, or more leapfrog steps.",
}


def khat_share(khat: Tensor) -> str:
    """Say how many of the k-hats are above 0.7, or that they are not known."""
    if khat.isnan().all():
        return f"k-hat > {UNRELIABLE_KHAT}: unknown"
    return f"k-hat > {UNRELIABLE_KHAT}: {1 - (khat <= UNRELIABLE_KHAT).double().mean().item():.1%}"


def standard_error(values: Tensor) -> float:
    """Return the standard error of the mean of independent values, NaN for a single one."""
    if len(values) < 2:
        return math.nan
    return values.std().item() / math.sqrt(len(values))
