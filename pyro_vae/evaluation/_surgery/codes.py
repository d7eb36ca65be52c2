"""What ELBO surgery takes from each run of a pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae._programs.terms import Terms
from pyro_vae.evaluation._surgery.gaussians import DiagonalGaussians

Sums = dict[str, Tensor]  # of the parts of a KL, over data
Part = tuple[Tensor, Tensor, Tensor, Sums | None, Sums | None]


@dataclass(frozen=True)
class Codes:
    """The codes that were drawn for B data, K for each.

    Args:
        posteriors: of the data, if they are diagonal Gaussians.
        values: the codes, (K, B, d); or by latent site, if the guide is to be run on them.
        log_guide: log q(z|x_b) of each code under its own datum, (K, B).
    """

    posteriors: DiagonalGaussians | None
    values: Tensor | dict[str, Tensor]
    log_guide: Tensor

    @classmethod
    def of(cls, t: Terms, posteriors: DiagonalGaussians | None) -> Codes:
        """Take them from a run."""
        values = t.samples if posteriors is None else posteriors.codes(t.samples)
        return cls(posteriors, values, t.log_guide)


@dataclass(frozen=True)
class TermAverages:
    """What runs of a pair give for N data, averaged over particles; float64 on the CPU.

    Args:
        log_likelihood: log p(x_n|z), (N,).
        rate: the KL of each posterior to the prior, (N,).
        sampled_rate: the same from the codes, (N,).
        kl_of_sites: average part of the rate, by latent site; None where it is not known.
        kl_of_dimensions: that of each number of each site; likewise.
    """

    log_likelihood: Tensor
    rate: Tensor
    sampled_rate: Tensor
    kl_of_sites: Sums | None
    kl_of_dimensions: Sums | None

    @staticmethod
    def part(t: Terms) -> Part:
        """Return the averages of a minibatch, which :meth:`of_parts` merges."""
        return (
            t.log_likelihood.double().mean(0).cpu(),
            t.kl.double().mean(0).cpu(),
            (t.log_guide - t.log_prior).double().mean(0).cpu(),
            _sums(t.kl_of_sites),
            _sums(t.kl_of_dimensions),
        )

    @classmethod
    def of_parts(cls, parts: Sequence[Part]) -> TermAverages:
        """Merge the averages of minibatches.

        Raises:
            ValueError: a likelihood is zero or infinite, a rate is NaN, or minus infinity.
        """
        *columns, of_sites, of_dimensions = zip(*parts, strict=True)
        log_likelihood, rate, sampled_rate = map(torch.cat, columns)
        _require_numbers(log_likelihood, rate)
        return cls(
            log_likelihood,
            rate,
            sampled_rate,
            kl_of_sites=_average(of_sites, len(rate)),
            kl_of_dimensions=_average(of_dimensions, len(rate)),
        )


def _sums(parts: Callable[[], dict[str, Tensor]]) -> Sums | None:
    """Sum the parts of a KL over the data, averaged over particles; None if there are no parts."""
    try:
        return {name: kl.double().mean(0).sum(0).cpu() for name, kl in parts().items()}
    except ValueError:
        return None


def _require_numbers(log_likelihood: Tensor, rate: Tensor) -> None:
    """Refuse terms that say nothing; an infinite rate says that the prior has no mass somewhere."""
    bad = {
        "log-likelihood": ~log_likelihood.isfinite(),
        "rate (log q(z|x) - log p(z))": ~(rate > -torch.inf),
    }
    for (name, rows), values in zip(bad.items(), (log_likelihood, rate), strict=True):
        if rows.any():
            row = int(rows.nonzero()[0])
            raise ValueError(
                f"the {name} is not finite for {int(rows.sum())} of {len(rows)} data: "
                f"{values[row].item()} in row {row}. Look at the scale of the data, and for values "
                "that the likelihood gives a density of zero"
            )


def _average(parts: Sequence[Sums | None], count: int) -> Sums | None:
    """Average over all data; None where the parts are not known, or not the same, of some."""
    if None in parts or any(part.keys() != parts[0].keys() for part in parts):
        return None
    return {name: torch.stack([part[name] for part in parts]).sum(0) / count for name in parts[0]}
