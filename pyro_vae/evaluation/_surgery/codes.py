"""What ELBO surgery takes from each run of a pair."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae._programs.terms import Terms
from pyro_vae.evaluation._surgery.gaussians import DiagonalGaussians

Sums = dict[str, Tensor]  # of the parts of a KL, over data


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
    def part(t: Terms) -> tuple[Tensor, ...]:
        """Return, as tensors, what :meth:`of_parts` needs of a minibatch."""
        kinds = [_sums(parts) for parts in (t.kl_of_sites, t.kl_of_dimensions)]
        what = [parts and [[name, kl.shape] for name, kl in parts.items()] for parts in kinds]
        totals = [kl.flatten() for parts in kinds if parts for kl in parts.values()]
        rate = t.kl.double().mean(0)
        return (
            t.log_likelihood.double().mean(0),
            rate,
            (t.log_guide - t.log_prior).double().mean(0),
            torch.cat([*totals, rate.new_zeros(0)]),
            torch.tensor(list(json.dumps(what).encode()), dtype=torch.uint8),
        )

    @classmethod
    def of_parts(cls, parts: Sequence[tuple[Tensor, ...]]) -> TermAverages:
        """Put minibatches together.

        Raises:
            ValueError: a likelihood is zero or infinite, a rate is NaN, or minus infinity.
        """
        *columns, totals, texts = zip(*parts, strict=True)
        found: list[list[Sums | None]] = []
        for total, text in zip(totals, texts, strict=True):
            kinds, start = [], 0
            for what in json.loads(bytes(text.tolist())):
                kinds.append(None if what is None else {})
                for name, shape in what or ():
                    size = torch.Size(shape).numel()
                    kinds[-1][name] = total[start : start + size].reshape(shape)
                    start += size
            found.append(kinds)
        columns = [torch.cat(column) for column in columns]
        _require_numbers(columns[0], columns[1])
        averages = (_average(kind, len(columns[0])) for kind in zip(*found, strict=True))
        return cls(*columns, *averages)


def _sums(parts: Callable[[], dict[str, Tensor]]) -> Sums | None:
    """Sum the parts of a KL over the data, averaged over particles; None if there are no parts."""
    try:
        return {name: kl.double().mean(0).sum(0) for name, kl in parts().items()}
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
