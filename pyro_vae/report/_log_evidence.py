"""Log p(x) of each data point by the most reliable of several estimates, with the gaps."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae._capture import Capture
from pyro_vae._programs.evaluation import evaluation_mode
from pyro_vae._programs.local_offsets import LocalMembers, local_members
from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.parameters import device_of, parameter_store
from pyro_vae._programs.terms import terms
from pyro_vae._utils.messages import first_line
from pyro_vae._utils.numerics import MIN_SCALE, inverse_softplus_scale
from pyro_vae._utils.random import seeded
from pyro_vae.datasets._minibatches import Batch
from pyro_vae.evaluation import AIS, Ascent, InferenceGaps, evidence, inference_gaps
from pyro_vae.evaluation._decoder_fit import rows_of_numbers
from pyro_vae.evaluation._log_evidence import UnreliableEvidence, untrusted
from pyro_vae.evaluation._prior_fit import UnconstrainedLatents
from pyro_vae.guides import AmortizedMultivariateNormal

_MANY = 0.1  # share of unreliable estimates from which another estimate is made
_PAIRS_PER_PASS = 50_000
_SAMPLES_OF_START = 100


@dataclass(frozen=True)
class LogEvidence:
    """Log p(x) and the ELBO of each data point, with the gaps if they are known.

    Args:
        values: log p(x_n), shape (N,).
        untrusted: whether each value is unreliable, shape (N,); see
            :attr:`pyro_vae.evaluation.Evidence.untrusted`.
        elbo: the ELBO of the guide, shape (N,).
        gaps: the inference gaps; None if they are unknown.
        members: samples from the best posteriors; None if they are members of the guide's family.
        parameters: of the best posteriors of the data points, (N, P). None if ``gaps`` is None.
        note: the reason why ``gaps`` is None.
    """

    values: Tensor
    untrusted: Tensor
    elbo: Tensor
    gaps: InferenceGaps | None
    members: LocalMembers | None
    parameters: Tensor | None
    note: str

    @property
    def unreliable_share(self) -> float:
        """The share of unreliable values."""
        return _share(self.untrusted)

    @property
    def approximation_gap(self) -> Tensor | None:
        """Log p(x) minus the ELBO of the best member of the guide's family, shape (N,)."""
        return None if self.gaps is None else self.values - self.gaps.best_elbo.values

    @property
    def amortization_gap(self) -> Tensor | None:
        """The ELBO of the best member minus that of the guide, shape (N,)."""
        return None if self.gaps is None else self.gaps.amortization_gap.values


def estimate_log_evidence(
    model: Program,
    guide: Program,
    columns: Batch,
    *,
    ascent: Ascent,
    num_particles: int,
    annealing: AIS | None,
    capture: Capture,
    seed: int | None,
    **options: Any,
) -> LogEvidence:
    """Estimate log p(x) until it is reliable, by estimates of increasing cost.

    They are importance sampling from the guide or its best members, importance sampling from a
    Gaussian with full covariance for each data point, and annealed importance sampling. The
    estimate with the lowest share of unreliable data points is used for all of them. If several
    have it, the highest is used, because unreliable estimates are too low.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        columns: the data, in memory.
        ascent: settings of the ascent for each data point.
        num_particles: importance samples per data point.
        annealing: settings of annealed importance sampling; None does not use it.
        capture: see :func:`pyro_vae.fit`.
        seed: of the samples.
        options: ``vectorize_particles`` and ``progress``.
    """
    options = {"capture": capture, "seed": seed, **options}
    of_gaps = {
        "num_particles": num_particles,
        "ascent": ascent,
        "batch_size": len(columns[0]),
        "pairs_per_pass": _PAIRS_PER_PASS,
        **options,
    }
    gaps, members, parameters, note = None, None, None, ""
    try:
        gaps = _quiet_gaps(model, guide, columns, **of_gaps)
    except (ValueError, TypeError) as error:
        note = first_line(error)
    if gaps is None:
        with _quiet():
            found = evidence(model, guide, columns, num_particles=num_particles, **options)
        estimates, elbo = [(found.values, found.untrusted)], found.mean_log_weights
    else:
        estimates = [_estimate(gaps)]
        elbo, parameters = gaps.amortized_elbo.values, gaps.parameters
        if _share(estimates[0][1]) > _MANY:
            try:
                posteriors = _Posteriors.of(model, guide, columns, gaps, seed)
                better = _quiet_gaps(model, posteriors, columns, **of_gaps)
                estimates.append(_estimate(better))
                members, parameters = posteriors, better.parameters
            except (ValueError, TypeError):  # a latent that such a Gaussian does not have
                pass
    if annealing is not None and min(_share(bad) for _, bad in estimates) > _MANY:
        with _quiet():
            annealed = evidence(model, guide, columns, method=annealing, **options)
        estimates.append((annealed.values, annealed.untrusted))
    values, unreliable = min(estimates, key=_rank)
    return LogEvidence(values, unreliable, elbo, gaps, members, parameters, note)


def _estimate(gaps: InferenceGaps) -> tuple[Tensor, Tensor]:
    """Return log p(x) of each data point, and whether it is unreliable."""
    values, errors = gaps.log_evidence.values, gaps.log_evidence.monte_carlo_errors
    count = gaps.num_particles
    effective = count / (1 + (count - 1) * errors.square())  # (sum w)^2 / sum w^2
    return values, untrusted(values, gaps.khat, effective, count)


def _rank(estimate: tuple[Tensor, Tensor]) -> tuple[float, float]:
    values, unreliable = estimate
    return _share(unreliable), -values.double().mean().item()


def _share(unreliable: Tensor) -> float:
    return unreliable.double().mean().item()


def _quiet_gaps(*args: Any, **options: Any) -> InferenceGaps:
    """Return the inference gaps without a warning of failed ascents, whose start is used."""
    with _quiet():
        return inference_gaps(*args, **options)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the warnings of the estimators, which the notes of a diagnosis replace."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UnreliableEvidence)
        warnings.filterwarnings("ignore", message="inference_gaps: ")
        yield


class _Rows(nn.Module):
    """Returns x as rows of floating-point numbers."""

    def forward(self, x: Tensor, *covariates: Any) -> Tensor:
        return rows_of_numbers(x)


class _Posteriors:
    """A Gaussian with full covariance for each data point, in unconstrained space.

    Args:
        guide: samples from the Gaussians.
        start: their parameters (N, P), without correlations.
    """

    def __init__(self, guide: AmortizedMultivariateNormal, start: Tensor):
        self._guide, self._start = guide, start

    @classmethod
    @torch.no_grad()
    def of(
        cls, model: Program, guide: Program, columns: Batch, gaps: InferenceGaps, seed: int | None
    ) -> _Posteriors:
        """Return Gaussians with the means and variances of the best members of a guide's family."""
        device = device_of(model, guide)
        batch = tuple(column.to(device) for column in columns)
        with seeded(seed), parameter_store(model, guide), evaluation_mode(model, guide):
            gaussians = AmortizedMultivariateNormal(model, _Rows()).to(device)
            start = torch.zeros_like(gaussians.parameters_of(*batch))
            members = local_members(guide, batch)
            best = gaps.parameters.to(device)
            t = terms(
                model,
                lambda *batch: members.sample(best, *batch),
                *batch,
                num_particles=_SAMPLES_OF_START,
            )
            names = [site.name for site in gaussians.built["posterior"].sites]
            codes, _ = UnconstrainedLatents(model, batch, names)(t.samples)
        loc, scale = codes.mean(0), codes.std(0).clamp(min=2 * MIN_SCALE)
        size = loc.shape[1]
        if start.shape[1] != size * (size + 3) // 2:
            raise ValueError(f"one Gaussian cannot have the latents {names}")
        start[:, :size] = loc
        start[:, size : 2 * size] = inverse_softplus_scale(scale)
        return cls(gaussians, start)

    def parameters_of(self, x: Tensor, *covariates: Any) -> Tensor:
        """Return the parameters of each data point. Trial runs may have other numbers of rows."""
        rows = torch.arange(len(x), device=self._start.device) % len(self._start)
        return self._start[rows]

    def sample(self, parameters: Tensor, x: Tensor, *covariates: Any) -> Any:
        """Sample from Gaussians with given parameters."""
        return self._guide.sample(parameters, x, *covariates)

    def __call__(self, x: Tensor, *covariates: Any) -> Any:
        """Sample from the Gaussians."""
        return self.sample(self.parameters_of(x, *covariates), x, *covariates)
