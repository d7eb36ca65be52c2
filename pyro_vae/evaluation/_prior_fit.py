r"""Fit a mixture of Gaussians to the latents by maximum likelihood of x, in place of the prior.

The decoder does not change, so the gain in log p(x) is that of a better prior alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.transforms import Transform

from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.runs import trace_of
from pyro_vae._programs.sites import data_frame, random_sites
from pyro_vae._programs.terms import Terms
from pyro_vae.datasets._minibatches import Batch
from pyro_vae.distributions._supports import support_of

COMPONENTS = (1, 2, 4, 8, 16)
_MOST_STEPS = 100
_FEWEST_STEPS = 10  # components that start close to each other separate in several steps
_LEAST_GAIN = 1e-4  # nats per data point; a smaller gain in a later step ends the fit
# Shares of a dimension's variance that are added to that of each component. Narrow components that
# are far apart need the first, and components of few codes the second.
_SHRINKAGES = (1e-8, 1e-3)
_LEAST_VARIANCE = 1e-30  # of a dimension without spread
_HELD_OUT_SHARE = 0.2
_FEWEST_DATA = 5  # of which one is held out
_NUMBERS_AT_A_TIME = 4_000_000  # 32 MB of float64


class UnconstrainedLatents:
    """The latents of a model as rows of real numbers.

    Args:
        model: program of p(x, z).
        args: a minibatch x, and covariates.
        names: the latents.

    Raises:
        ValueError: A latent is discrete, or its support has no bijection from the reals.
    """

    def __init__(self, model: Program, args: Batch, names: list[str]):
        sites = {site["name"]: site for site in random_sites(trace_of(model, *args))}
        self._transforms: dict[str, Transform] = {}
        for name in names:
            if data_frame(sites[name]) is None:
                raise ValueError(f"latent {name!r} is outside the data plate")
            try:
                self._transforms[name] = biject_to(support_of(sites[name]["fn"]))
            except NotImplementedError as error:
                raise ValueError(f"latent {name!r} has no bijection from the reals") from error

    def __call__(self, samples: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        r"""Return the latents in unconstrained space, and the logarithm of the Jacobian.

        Args:
            samples: the latents, each ``(K, B, *inner plates, *event)``.

        Returns:
            u, shape (K, B, D), and :math:`\log|dz/du|`, shape (K, B).
        """
        codes, jacobians = [], []
        for name, transform in self._transforms.items():
            value = samples[name]
            code = transform.inv(value)
            jacobian = transform.log_abs_det_jacobian(code, value)
            codes.append(code.reshape(*value.shape[:2], -1))
            jacobians.append(jacobian.reshape(*value.shape[:2], -1).sum(-1))
        return torch.cat(codes, -1), sum(jacobians)


@dataclass(frozen=True)
class WeightedCodes:
    """Samples of the latents for N data points, in unconstrained space, float64 on the CPU.

    Attributes:
        codes: u, shape (N, K, D).
        log_prior: log p(u) under the model, shape (N, K).
        log_rest: log p(x|z) - log q(u|x), shape (N, K). Together with the density of a prior it is
            a log-weight.
        masked: whether the model masks a latent of the data point, so that its code has no density
            under a prior, shape (N,).
    """

    codes: Tensor
    log_prior: Tensor
    log_rest: Tensor
    masked: Tensor

    @classmethod
    def of(
        cls,
        draw: Callable[[int, Batch], Terms],
        batches: list[Batch],
        latents: UnconstrainedLatents,
    ) -> WeightedCodes:
        """Draw and score codes.

        Args:
            draw: function of the number of a minibatch and the minibatch that returns its terms.
            batches: the minibatches.
            latents: the map to unconstrained space.
        """
        parts = []
        for number, batch in enumerate(batches):
            t = draw(number, batch)
            codes, jacobian = latents(t.samples)
            log_prior = t.log_prior + jacobian
            rest = t.log_likelihood - t.log_guide - jacobian
            numbers = [each.cpu().double().transpose(0, 1) for each in (codes, log_prior, rest)]
            parts.append([*numbers, t.masked_data().cpu()])
        return cls(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def __getitem__(self, rows: slice | Tensor) -> WeightedCodes:
        """Return the codes of some data points."""
        columns = (self.codes, self.log_prior, self.log_rest, self.masked)
        return WeightedCodes(*(column[rows] for column in columns))

    def log_evidence(self, log_prior: Tensor | None = None) -> Tensor:
        """Return log p(x) of each data point (N,) under a prior with log-densities (N, K)."""
        log_weight = self.log_rest + (self.log_prior if log_prior is None else log_prior)
        return log_weight.logsumexp(1) - math.log(log_weight.shape[1])

    def gains(self, prior: GaussianMixture | None) -> Tensor:
        """Return the gain in log p(x) of each data point (N,) if a prior replaces the model's."""
        if prior is None:
            return torch.zeros(len(self.codes), dtype=torch.float64)
        return self.log_evidence(prior.log_prob(self.codes)) - self.log_evidence()


@dataclass(frozen=True)
class GaussianMixture:
    """A mixture of C Gaussians with any covariances in D dimensions.

    Attributes:
        weights: shape (C,), of any sum.
        means: shape (C, D).
        covariances: shape (C, D, D).
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor

    def log_prob(self, codes: Tensor) -> Tensor:
        """Return the log-density of codes (..., D), computed in float64."""
        return self.log_joint(codes).logsumexp(-1).to(codes.dtype)

    def log_joint(self, codes: Tensor) -> Tensor:
        """Return the log-density of codes (..., D) and each component, (..., C), in float64."""
        rows = codes.reshape(-1, codes.shape[-1])
        size = max(1, _NUMBERS_AT_A_TIME // self.means.numel())
        parts = [self._log_joint_of_rows(part) for part in rows.split(size)]
        return torch.cat(parts).reshape(*codes.shape[:-1], -1)

    def _log_joint_of_rows(self, codes: Tensor) -> Tensor:
        whitening, log_weights = (each.to(codes.device) for each in self._factors)
        moved = codes.double().unsqueeze(1) - self.means.to(codes.device)  # (M, C, D)
        square = torch.einsum("mcd,ced->mce", moved, whitening).square().sum(-1)
        return log_weights - 0.5 * square

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor]:
        """The inverses of the Cholesky factors, and the log-densities at the means."""
        factors = torch.linalg.cholesky(self.covariances)
        size = self.means.shape[1]
        identity = torch.eye(size, dtype=factors.dtype).expand_as(factors)
        whitening = torch.linalg.solve_triangular(factors, identity, upper=False)
        log_det = factors.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_weights = (self.weights / self.weights.sum()).log()
        return whitening, log_weights - log_det - 0.5 * size * math.log(2 * math.pi)


def fit_prior(codes: WeightedCodes, *, diagonal: bool = False) -> GaussianMixture | None:
    """Return the mixture of :func:`select_mixture`, or None if the prior of the model is better.

    Raises:
        ValueError: As :func:`select_mixture`.
    """
    best = select_mixture(codes, diagonal=diagonal)
    return best.prior if best.gain > 0 else None


class Selected(NamedTuple):
    """A mixture with its arguments of :func:`maximize_evidence` and its gain on held-out data."""

    gain: float
    count: int
    shrinkage: float
    prior: GaussianMixture


def select_mixture(
    codes: WeightedCodes, components: int | None = None, *, diagonal: bool = False
) -> Selected:
    r"""Return the mixture of Gaussians with the largest log p(x) of held-out data points.

    For each number of components, the EM algorithm (Dempster, Laird & Rubin 1977) maximizes

    .. math:: \sum_n \log \sum_k \frac{p(x_n|z_{nk}) \, r(z_{nk})}{q(z_{nk}|x_n)}

    over the mixture r. The data points of the last fifth select the number of components and
    the smallest variance of a component.

    Args:
        codes: of the training data, in random order.
        components: the number of components, or None to select it.
        diagonal: whether the covariances are diagonal.

    Raises:
        ValueError: There are too few data points for a single Gaussian. Or a latent is masked.
    """
    if codes.masked.any():
        raise ValueError(
            f"a prior of all latents needs their values, and the model masks latents of "
            f"{int(codes.masked.sum())} of {len(codes.masked)} data points"
        )
    total, size = len(codes.codes), codes.codes.shape[-1]
    fitted, held_out = split(codes)
    if components is None and (total < _FEWEST_DATA or size > len(fitted.codes)):
        fewest = max(_FEWEST_DATA, math.ceil(size / (1 - _HELD_OUT_SHARE)))
        raise ValueError(
            f"a prior of {size} dimensions needs about {fewest} rows of training data, got {total}"
        )
    possible = [count for count in COMPONENTS if count * size <= len(fitted.codes)]
    found = []
    for count in possible if components is None else [components]:
        for shrinkage in _SHRINKAGES:
            prior = maximize_evidence(fitted, count, shrinkage, diagonal=diagonal)
            gain = held_out.gains(prior).mean().item() if len(held_out.codes) else 0.0
            gain = -math.inf if math.isnan(gain) else gain
            found.append(Selected(gain, count, shrinkage, prior))
    return max(found, key=lambda each: each.gain)


def split(codes: WeightedCodes) -> tuple[WeightedCodes, WeightedCodes]:
    """Return the codes of the first four fifths of the data points, and those of the others."""
    count = math.ceil(len(codes.codes) * (1 - _HELD_OUT_SHARE))
    return codes[:count], codes[count:]


def maximize_evidence(
    codes: WeightedCodes, count: int, shrinkage: float = _SHRINKAGES[0], *, diagonal: bool = False
) -> GaussianMixture:
    """Return the mixture of ``count`` Gaussians with the largest log p(x), by the EM algorithm."""
    points = codes.codes.flatten(0, 1)  # (N K, D)
    log_weight = codes.log_rest + codes.log_prior
    zero = log_weight.amax(1, keepdim=True) == -math.inf  # the old prior has no mass there
    weights = torch.where(zero, codes.log_rest, log_weight).softmax(1).flatten()
    mean = (weights.unsqueeze(1) * points).sum(0) / weights.sum()
    covariance = _covariance(points - mean, weights, diagonal)
    # One number for each dimension, so units have no effect.
    floor = (shrinkage * covariance.diagonal() + 1e-14 * mean.square() + _LEAST_VARIANCE).diag()
    means = mean.unsqueeze(0) if count == 1 else points[torch.multinomial(weights, count)]
    equal = torch.ones(count, dtype=means.dtype)
    prior = GaussianMixture(equal, means, (covariance + floor).expand(count, -1, -1))
    last = -math.inf
    for step in range(_MOST_STEPS):
        joint = prior.log_joint(codes.codes) + codes.log_rest.unsqueeze(2)  # (N, K, C)
        log_evidence = joint.flatten(1).logsumexp(1)
        shares = (joint - log_evidence[:, None, None]).exp().flatten(0, 1)
        reached = log_evidence.mean().item()
        if step >= _FEWEST_STEPS and not reached > last + _LEAST_GAIN:
            break
        last = reached
        totals = shares.sum(0).clamp(min=1e-8)
        means = shares.T @ points / totals.unsqueeze(1)
        covariances = torch.stack(
            [_covariance(points - means[c], shares[:, c], diagonal) for c in range(count)]
        )
        prior = GaussianMixture(totals, means, covariances + floor)
    return prior


def _covariance(centered: Tensor, weights: Tensor, diagonal: bool) -> Tensor:
    total = weights.sum().clamp(min=1e-8)
    if diagonal:
        return torch.diag((weights.unsqueeze(1) * centered.square()).sum(0) / total)
    return (weights.unsqueeze(1) * centered).T @ centered / total
