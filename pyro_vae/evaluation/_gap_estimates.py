"""log p(x) and two ELBOs of each datum from log-weights, the gaps between them, and all errors."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pyro_vae.evaluation._log_evidence import UNRELIABLE_KHAT, standard_error
from pyro_vae.evaluation._psis import khat

QUANTITIES = (
    "log_evidence",
    "best_elbo",
    "amortized_elbo",
    "approximation_gap",
    "amortization_gap",
)
SOURCES = ("amortized", "best", "given")  # where an estimate of log p(x) comes from
CLEARLY = 3.0  # standard errors
BY_CHANCE = 0.01  # how often another estimate may be taken, at any of the data, for no reason


@dataclass(frozen=True)
class Estimate:
    """A quantity of each datum, in nats, float64 on the CPU.

    Args:
        values: shape (N,).
        monte_carlo_errors: standard error of each value, of the draws alone, shape (N,).
    """

    values: Tensor
    monte_carlo_errors: Tensor

    @property
    def mean(self) -> float:
        """The average over the data."""
        return self.values.mean().item()

    @property
    def standard_error(self) -> float:
        """Standard error of the mean, for the population that the data are drawn from."""
        return standard_error(self.values)

    @property
    def monte_carlo_error(self) -> float:
        """Standard error of the mean for these very data: that of the draws alone."""
        return self.monte_carlo_errors.square().sum().sqrt().item() / len(self.values)

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.standard_error:.3f}"


@dataclass(frozen=True)
class WeightSummary:
    """Of log-weights w of one guide: log mean w and mean log w, and how their errors covary."""

    log_evidence: Tensor
    elbo: Tensor
    evidence_variance: Tensor
    elbo_variance: Tensor
    covariance: Tensor
    khat: Tensor

    @property
    def columns(self) -> list[Tensor]:
        """All of them, in order, each with a row for each datum."""
        return [getattr(self, field.name) for field in fields(self)]

    @classmethod
    def of(cls, draw: Callable[[], Tensor], num_particles: int) -> WeightSummary:
        """Draw as many log-weights (K, B) as are wanted, and summarise them."""
        chunks, count = [], 0
        while count < num_particles:
            chunks.append(draw()[: num_particles - count].double().clone())  # it is overwritten
            count += len(chunks[-1])
        log_weights = torch.cat(chunks)
        log_evidence = log_weights.logsumexp(0) - math.log(count)
        elbo = log_weights.mean(0)
        # What each draw adds to the two, to first order (the delta method).
        to_evidence = (log_weights - log_evidence).exp() - 1
        to_elbo = log_weights - elbo
        scale = count * (count - 1)
        return cls(
            log_evidence,
            elbo,
            to_evidence.square().sum(0) / scale,
            to_elbo.square().sum(0) / scale,
            (to_evidence * to_elbo).sum(0) / scale,
            khat(log_weights),
        )


@dataclass(frozen=True)
class GapEstimates:
    """What :class:`InferenceGaps` says of each datum, and where ascents have failed."""

    log_evidence: Estimate
    best_elbo: Estimate
    amortized_elbo: Estimate
    approximation_gap: Estimate
    amortization_gap: Estimate
    sources: Tensor
    khat: Tensor
    failed: Tensor


def estimate_gaps(
    amortized: WeightSummary, best: WeightSummary, given: tuple[Tensor, Tensor, Tensor] | None
) -> GapEstimates:
    """Return all quantities, with their Monte Carlo errors.

    Where the best member is clearly worse than the guide, its ascent has failed, and the guide
    takes its place.

    Args:
        amortized: of draws from the guide.
        best: of draws from the best member of its family.
        given: another estimate of log p(x), its error and its k-hat, each (N,).
    """
    margin = CLEARLY * (amortized.elbo_variance + best.elbo_variance).sqrt()
    # Not <, so that an ascent that ended in NaN counts as failed.
    failed = ~(best.elbo >= amortized.elbo - margin)
    best_elbo = torch.where(failed, amortized.elbo, best.elbo)
    best_variance = torch.where(failed, amortized.elbo_variance, best.elbo_variance)
    covariance = torch.where(failed, amortized.covariance, best.covariance)

    estimates = [
        (each.log_evidence, each.evidence_variance, each.khat) for each in (amortized, best)
    ]
    if given is not None:
        estimates.append((given[0], given[1].square(), given[2]))
    values, variances, khats = map(torch.stack, zip(*estimates, strict=True))
    sources = select_estimator(values, variances, khats)
    log_evidence, evidence_variance, khat_of_it = (
        each.gather(0, sources.unsqueeze(0))[0] for each in (values, variances, khats)
    )
    # Errors of the same draws cancel in part.
    same_draws = sources == torch.where(failed, 0, 1)
    shared = torch.where(same_draws, covariance, 0.0)
    of_approximation = evidence_variance + best_variance - 2 * shared
    of_amortization = torch.where(failed, 0.0, best_variance + amortized.elbo_variance)
    found = {
        "log_evidence": (log_evidence, evidence_variance),
        "best_elbo": (best_elbo, best_variance),
        "amortized_elbo": (amortized.elbo, amortized.elbo_variance),
        "approximation_gap": (log_evidence - best_elbo, of_approximation),
        "amortization_gap": (best_elbo - amortized.elbo, of_amortization),
    }
    estimates = {name: Estimate(value, v.clamp(min=0).sqrt()) for name, (value, v) in found.items()}
    return GapEstimates(**estimates, failed=failed, sources=sources, khat=khat_of_it)


def select_estimator(values: Tensor, variances: Tensor, khats: Tensor) -> Tensor:
    """Choose among S estimates of log p(x) of each datum.

    The one of least error at most data: not datum by datum, where an error that is too small comes
    with a value that is too low. But another, where it is reliable and clearly higher: p(x) is
    estimated without bias, so that weights that the draws have missed make a sure estimate too low,
    and nothing but a few large ones makes an estimate too high. Clearly is by three standard errors
    and more, the more data there are: each that was taken by chance would add as much to the sum,
    and among 1000 data one is three standard errors too high.

    Args:
        values: (S, N).
        variances: of their errors, (S, N).
        khats: Pareto diagnostics, (S, N).

    Returns:
        Numbers from 0 to S - 1, (N,).
    """
    values = values.nan_to_num(nan=-math.inf)
    variances = variances.nan_to_num(nan=math.inf)
    least = variances.median(1).values.argmin()
    tries = max(1, (len(values) - 1) * values.shape[1])
    by_chance = statistics.NormalDist().inv_cdf(1 - BY_CHANCE / tries)
    of_least = variances[least].where(variances[least].isfinite(), 0.0)  # where it has no value
    margin = max(CLEARLY, by_chance) * (variances + of_least).sqrt()
    higher = (values > values[least] + margin) & (khats <= UNRELIABLE_KHAT)
    highest = values.masked_fill(~higher, -math.inf).argmax(0)
    return torch.where(higher.any(0), highest, least)
