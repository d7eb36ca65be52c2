"""What ELBO surgery keeps of each run of a pair."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_vae.evaluation.aggregated.gaussians import DiagonalGaussians
from pyro_vae.terms import Terms


@dataclass
class Draws:
    """What runs of a pair leave behind, minibatch after minibatch; averages over particles."""

    log_likelihood: list[Tensor] = field(default_factory=list)
    rate: list[Tensor] = field(default_factory=list)
    sampled_rate: list[Tensor] = field(default_factory=list)
    log_guide: list[Tensor] = field(default_factory=list)
    codes: list[Tensor | dict[str, Tensor]] = field(default_factory=list)
    posteriors: list[DiagonalGaussians] = field(default_factory=list)
    kl_of_sites: list[dict[str, Tensor]] | None = field(default_factory=list)
    kl_of_dimensions: list[dict[str, Tensor]] | None = field(default_factory=list)

    def add(self, t: Terms, q: DiagonalGaussians | None) -> None:
        """Take in a minibatch, and its posteriors if they are diagonal Gaussians."""
        self.log_likelihood.append(t.log_likelihood.double().mean(0))
        self.rate.append(t.kl.double().mean(0))
        self.sampled_rate.append((t.log_guide - t.log_prior).double().mean(0))
        self.log_guide.append(t.log_guide)
        self.codes.append(t.samples if q is None else q.codes(t.samples))
        if q is not None:
            self.posteriors.append(q)
        self.kl_of_sites = _with_parts(self.kl_of_sites, t.kl_of_sites)
        self.kl_of_dimensions = _with_parts(self.kl_of_dimensions, t.kl_of_dimensions)


def _with_parts(
    found: list[dict[str, Tensor]] | None, parts: Callable[[], dict[str, Tensor]]
) -> list[dict[str, Tensor]] | None:
    """Average the parts of a KL over the particles and keep them; None if there are no parts."""
    if found is not None:
        with contextlib.suppress(ValueError):
            return [*found, {name: kl.double().mean(0) for name, kl in parts().items()}]
    return None


def averages(parts: list[dict[str, Tensor]] | None, convert: Callable) -> dict | None:
    """Average parts over all data and convert each; None if there are no parts."""
    if not parts or any(part.keys() != parts[0].keys() for part in parts):
        return None
    return {name: convert(torch.cat([part[name] for part in parts]).mean(0)) for name in parts[0]}
