"""Estimates of log p(x): the result, its diagnostics and its warnings."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

from torch import Tensor

from pyro_vae.evaluation._ais import Annealing

UNRELIABLE_KHAT = 0.7
FEWEST_EFFECTIVE = 10.0
FEWEST_JUDGED = 21  # weights; with fewer, k-hat is NaN and few weights are effective anyway


class UnreliableEvidence(UserWarning):
    """An estimate of log p(x) is unreliable according to its diagnostics."""


@dataclass(frozen=True)
class Evidence:
    r"""Estimates of log p(x), in nats, float64 on the CPU.

    Args:
        values: log p(x_n), shape (N,).
        monte_carlo_errors: standard error of each value from the samples of z alone, shape (N,).
            It is NaN for one particle.
        khat: Pareto diagnostic of each value, shape (N,); see :func:`pyro_vae.evaluation.khat`.
        num_particles: samples per data point, or chains in annealed importance sampling.
        dimensions: the number of numbers in a data point x.
        effective_sample_size: :math:`(\sum w)^2 / \sum w^2` of each value's weights, shape (N,).
        mean_log_weights: the mean of the logarithms of each value's weights, shape (N,). If the
            samples come from the guide (``"importance"``), it is an unbiased estimate of the ELBO.
        method: name of the method of estimation.
        annealing: the results of annealed importance sampling at each temperature. None for other
            methods.
    """

    values: Tensor
    monte_carlo_errors: Tensor
    khat: Tensor
    num_particles: int
    dimensions: int
    effective_sample_size: Tensor
    mean_log_weights: Tensor
    method: str = "importance"
    annealing: Annealing | None = None

    @property
    def mean(self) -> float:
        """The average over the data."""
        return self.values.mean().item()

    @property
    def elbo(self) -> float:
        """The average ELBO over the data. NaN unless the method is ``"importance"``."""
        return self.mean_log_weights.mean().item() if self.method == "importance" else math.nan

    @property
    def standard_error(self) -> float:
        """Standard error of the mean, for the population that the data are sampled from.

        It includes the spread of the data and of the samples of z. It is NaN for one data point.
        """
        return standard_error(self.values)

    @property
    def bits_per_dimension(self) -> float:
        r""":math:`-\frac{1}{D \log 2} \frac1N \sum_n \log p(x_n)`, for x of D numbers.

        It is a code length if p(x) is a probability. For a density, it depends on the unit of the
        data. D counts all numbers of x as passed, including the padding of sequences.
        """
        return -self.mean / (self.dimensions * math.log(2))

    @property
    def monte_carlo_error(self) -> float:
        """Standard error of the mean for these data, from the samples of z alone."""
        return self.monte_carlo_errors.square().sum().sqrt().item() / len(self.values)

    @property
    def unreliable_share(self) -> float:
        """The share of data points whose k-hat is above 0.7, or NaN for unreliable weights.

        For example, k-hat is NaN for weights that are all zero, which are unreliable, and for
        weights with many ties, which may be reliable (see :attr:`untrusted`). The share is NaN if
        k-hat is NaN for all data points, such as with fewer than 21 samples.
        """
        return share_above(self.khat, self.untrusted)

    @property
    def untrusted(self) -> Tensor:
        """Whether each value is unreliable, shape (N,).

        A value is unreliable if it is not finite, if its k-hat is above 0.7, or if its effective
        sample size is below 10. With fewer than 21 samples, that limit is a tenth of their number.
        """
        return untrusted(self.values, self.khat, self.effective_sample_size, self.num_particles)

    def __repr__(self) -> str:
        draws = "particles" if self.annealing is None else "chains"
        by = "" if self.method == "importance" else f" by {self.method}"
        return (
            f"log p(x) = {self.mean:.2f} ± {self.standard_error:.2f} nats{by} "
            f"({len(self.values)} data points, {self.num_particles} {draws}, "
            f"{khat_share(self.unreliable_share, self.num_particles)})"
        )


def untrusted(
    values: Tensor, khat: Tensor, effective_sample_size: Tensor, num_particles: int
) -> Tensor:
    """Return whether each estimate of log p(x) is unreliable; see :attr:`Evidence.untrusted`."""
    few = num_particles < FEWEST_JUDGED
    least = num_particles / 10 if few else FEWEST_EFFECTIVE
    # Not <, so that NaN counts as too few. If the effective sample size is large, a k-hat of
    # NaN comes from weights with ties.
    enough = effective_sample_size >= least * (1 - 1e-6)
    return ~(values.isfinite() & enough) | (khat > UNRELIABLE_KHAT)


def warn_of(evidence: Evidence) -> None:
    """Warn, at the line that called the estimator, about an unreliable estimate."""
    infinite = ~evidence.values.isfinite()
    if infinite.any():
        row = int(infinite.nonzero()[0])
        warnings.warn(
            f"the {evidence.method} estimate of log p(x) is {evidence.values[row].item()} for "
            f"{int(infinite.sum())} of {len(infinite)} data points, the first in row {row}. Either "
            "no sample of z has a density above zero there, or a density is too large for its "
            "dtype. Check the scale of the data.",
            UnreliableEvidence,
            stacklevel=3,  # the caller of evidence
        )
    elif evidence.untrusted.double().mean() > 0.5:
        warnings.warn(
            f"the {evidence.method} estimate of log p(x) is unreliable for "
            f"{int(evidence.untrusted.sum())} of {len(evidence.values)} data points. Their "
            f"{why_unreliable(evidence.num_particles)}. The estimate is probably too low. "
            + _REMEDIES[evidence.method],
            UnreliableEvidence,
            stacklevel=3,  # the caller of evidence
        )


_REMEDIES = {
    "importance": "Use more particles, a better guide, or method=pv.evaluation.AIS().",
    "naive": 'Samples from the prior rarely hit the posterior. Use method="importance".',
    "ais": "Use more temperatures or more leapfrog steps.",
}


def why_unreliable(num_samples: int) -> str:
    """Return the signs of unreliable weights of that many samples, without the first word."""
    effective = f"effective sample size is too low (of {num_samples})"
    if num_samples < FEWEST_JUDGED:
        return effective
    return f"k-hat is above {UNRELIABLE_KHAT}, or their {effective}"


def share_above(khat: Tensor, unreliable: Tensor) -> float:
    """Return the share of k-hats that are above 0.7, or NaN where the weights are unreliable.

    It is NaN if all k-hats are NaN.
    """
    if khat.isnan().all():
        return math.nan
    return ((khat > UNRELIABLE_KHAT) | (khat.isnan() & unreliable)).double().mean().item()


def khat_share(share: float, num_samples: int) -> str:
    """Return a text with the share of k-hats above 0.7, or the reason why it is unknown."""
    if not math.isnan(share):
        return f"k-hat > {UNRELIABLE_KHAT}: {share:.1%}"
    few = num_samples < FEWEST_JUDGED
    return f"k-hat: not available{f', needs {FEWEST_JUDGED} samples' if few else ''}"


def standard_error(values: Tensor) -> float:
    """Return the standard error of the mean of independent values, or NaN for a single value."""
    if len(values) < 2:
        return math.nan
    return values.std().item() / math.sqrt(len(values))
