"""The codes and the average terms of a run of a pair, for ELBO surgery."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae._programs.terms import Terms
from pyro_vae.evaluation._surgery.control import moments
from pyro_vae.evaluation._surgery.gaussians import DiagonalGaussians

Sums = dict[str, Tensor]  # sums over data points of the parts of a KL
Part = tuple[Tensor, Tensor, Tensor, Tensor, Sums | None, Sums | None]


def noise_of(t: Terms) -> Tensor:
    """Return the rate in closed form minus the sampled rate of each code, (K, B), float64."""
    return t.kl.double() - (t.log_guide - t.log_prior).double()


@dataclass(frozen=True)
class Codes:
    """K codes for each of B data points.

    Args:
        posteriors: of the data points, if they are diagonal Gaussians.
        values: the codes, (K, B, d). If the guide must be run on them, a dictionary by site.
        log_guide: log q(z|x_b) of each code under the posterior of its own data point, (K, B).
        noise: rate in closed form minus the sampled rate of each code, (K, B), on the CPU.
    """

    posteriors: DiagonalGaussians | None
    values: Tensor | dict[str, Tensor]
    log_guide: Tensor
    noise: Tensor

    @classmethod
    def of(cls, t: Terms, posteriors: DiagonalGaussians | None) -> Codes:
        """Read the codes of a run."""
        values = t.samples if posteriors is None else posteriors.codes(t.samples)
        return cls(posteriors, values, t.log_guide, noise_of(t).cpu())


@dataclass(frozen=True)
class TermAverages:
    """The terms of N data points, averaged over particles; float64 on the CPU.

    Args:
        log_likelihood: log p(x_n|z), (N,).
        rate: the KL of each posterior to the prior, (N,).
        noise: the rate in closed form minus the rate that is estimated from the codes, (N,).
        noise_variance: its variance, estimated from the spread of the codes, (N,). Zero for K = 1.
        kl_of_sites: average part of the rate, by latent site; None if it is not known.
        kl_of_dimensions: average part of each number of each site; None if it is not known.
    """

    log_likelihood: Tensor
    rate: Tensor
    noise: Tensor
    noise_variance: Tensor
    kl_of_sites: Sums | None
    kl_of_dimensions: Sums | None

    @staticmethod
    def part(t: Terms) -> Part:
        """Return the averages of a minibatch, which :meth:`of_parts` merges."""
        noise = noise_of(t)
        return (
            t.log_likelihood.double().mean(0).cpu(),
            t.kl.double().mean(0).cpu(),
            *moments(noise, noise).cpu().unbind(1),
            _sums(t.kl_of_sites),
            _sums(t.kl_of_dimensions),
        )

    @classmethod
    def of_parts(cls, parts: Sequence[Part]) -> TermAverages:
        """Merge the averages of minibatches.

        Raises:
            ValueError: A log-likelihood is NaN or infinite. A rate is NaN or minus infinity.
        """
        *columns, of_sites, of_dimensions = zip(*parts, strict=True)
        log_likelihood, rate, noise, noise_variance = map(torch.cat, columns)
        _require_numbers(log_likelihood, rate)
        return cls(
            log_likelihood,
            rate,
            noise,
            noise_variance,
            kl_of_sites=_average(of_sites, len(rate)),
            kl_of_dimensions=_average(of_dimensions, len(rate)),
        )


def _sums(parts: Callable[[], dict[str, Tensor]]) -> Sums | None:
    """Average the parts of a KL over particles, and sum over data; None if there are no parts."""
    try:
        return {name: kl.double().mean(0).sum(0).cpu() for name, kl in parts().items()}
    except ValueError:
        return None


def _require_numbers(log_likelihood: Tensor, rate: Tensor) -> None:
    """Raise ValueError if a log-likelihood is not finite, or a rate is NaN or minus infinity.

    A rate of plus infinity is valid. The prior then has no mass at a sample of the guide.
    """
    bad = {
        "log-likelihood": ~log_likelihood.isfinite(),
        "rate (log q(z|x) - log p(z))": ~(rate > -torch.inf),
    }
    for (name, rows), values in zip(bad.items(), (log_likelihood, rate), strict=True):
        if rows.any():
            row = int(rows.nonzero()[0])
            raise ValueError(
                f"the {name} is not finite for {int(rows.sum())} of {len(rows)} data points. It is "
                f"{values[row].item()} in row {row}. Check the scale of the data, and look for "
                "values that have zero density under the likelihood"
            )


def _average(parts: Sequence[Sums | None], count: int) -> Sums | None:
    """Average over all data points; None if a minibatch has no parts, or other ones."""
    if None in parts or any(part.keys() != parts[0].keys() for part in parts):
        return None
    return {name: torch.stack([part[name] for part in parts]).sum(0) / count for name in parts[0]}
