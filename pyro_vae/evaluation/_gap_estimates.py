"""Estimate log p(x), two ELBOs and their gaps for each data point, with all errors."""

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
BY_CHANCE = 0.01  # probability that chance replaces the estimate of any data point


@dataclass(frozen=True)
class Estimate:
    """A quantity for each data point, in nats, float64 on the CPU.

    Args:
        values: one value for each data point, shape (N,).
        monte_carlo_errors: standard error of each value due to sampling alone, shape (N,).
    """

    values: Tensor
    monte_carlo_errors: Tensor

    @property
    def mean(self) -> float:
        """The average over the data points."""
        return self.values.mean().item()

    @property
    def standard_error(self) -> float:
        """Standard error of the mean, for the population from which the data are sampled."""
        return standard_error(self.values)

    @property
    def monte_carlo_error(self) -> float:
        """Standard error of the mean for exactly these data, due to sampling alone."""
        return self.monte_carlo_errors.square().sum().sqrt().item() / len(self.values)

    def __repr__(self) -> str:
        return f"{self.mean:.3f} ± {self.standard_error:.3f} nats ({len(self.values)} data)"


@dataclass(frozen=True)
class WeightSummary:
    """log mean w and mean log w of the weights w of one guide, with the covariance of errors."""

    log_evidence: Tensor
    elbo: Tensor
    evidence_variance: Tensor
    elbo_variance: Tensor
    covariance: Tensor
    khat: Tensor

    @property
    def columns(self) -> list[Tensor]:
        """All fields in order, each with one row for each data point."""
        return [getattr(self, field.name) for field in fields(self)]

    @classmethod
    def of(cls, draw: Callable[[], Tensor], num_particles: int) -> WeightSummary:
        """Sample ``num_particles`` log-weights for each data point and summarize them."""
        chunks, count = [], 0
        while count < num_particles:
            chunks.append(draw()[: num_particles - count].double().clone())  # draw() reuses it
            count += len(chunks[-1])
        log_weights = torch.cat(chunks)
        log_evidence = log_weights.logsumexp(0) - math.log(count)
        elbo = log_weights.mean(0)
        # Contribution of each sample to both estimates, to first order (the delta method).
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
    """The fields of :class:`InferenceGaps` that have one row for each data point."""

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
    """Return all quantities with their Monte Carlo errors.

    If the best member is clearly worse than the guide, its ascent has failed. The guide is then
    used as the best member.

    Args:
        amortized: summary of samples from the guide.
        best: summary of samples from the best member of the guide's family.
        given: another estimate of log p(x), its error and its k-hat, each (N,), or None.
    """
    margin = CLEARLY * (amortized.elbo_variance + best.elbo_variance).sqrt()
    # Not <: with a NaN, the ascent counts as failed.
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
    sources, own = select_estimator(values, variances, khats), torch.where(failed, 0, 1)
    chosen, its_variance = (each.gather(0, sources[None])[0] for each in (values, variances))
    # log p(x) is at least any ELBO. The estimate from the same samples is never below theirs.
    impossible = chosen < best_elbo - CLEARLY * (its_variance + best_variance).sqrt()
    sources = torch.where(impossible, own, sources)
    log_evidence, evidence_variance, khat_of_it = (
        each.gather(0, sources[None])[0] for each in (values, variances, khats)
    )
    # The errors of two estimates from the same samples partly cancel.
    same_draws = sources == own
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
    """Select one of S estimates of log p(x) for each data point.

    The default is the estimate with the smallest median variance over the data. A choice by the
    variance of each data point would be biased: too small an error comes with too low a value.

    Another estimate is used for a data point if it is reliable (k-hat at most 0.7) and clearly
    higher. The reason is that estimates of p(x) are unbiased. If the samples miss large weights, an
    estimate is too low and its error too small. Only a few large weights make an estimate too high.

    Clearly higher means by three standard errors, and by more if there are many data points. Among
    1000 data points, chance makes about one estimate three standard errors too high. Each estimate
    selected by chance would raise the sum by as much.

    Args:
        values: the estimates, (S, N).
        variances: squared standard errors of the estimates, (S, N).
        khats: Pareto diagnostics, (S, N).

    Returns:
        Numbers of the selected estimates, from 0 to S - 1, (N,).
    """
    values = values.nan_to_num(nan=-math.inf)
    variances = variances.nan_to_num(nan=math.inf)
    least = variances.median(1).values.argmin()
    tries = max(1, (len(values) - 1) * values.shape[1])
    by_chance = statistics.NormalDist().inv_cdf(1 - BY_CHANCE / tries)
    of_least = variances[least].where(variances[least].isfinite(), 0.0)  # 0 if infinite
    margin = max(CLEARLY, by_chance) * (variances + of_least).sqrt()
    higher = (values > values[least] + margin) & (khats <= UNRELIABLE_KHAT)
    highest = values.masked_fill(~higher, -math.inf).argmax(0)
    return torch.where(higher.any(0), highest, least)
