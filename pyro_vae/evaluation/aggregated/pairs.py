r"""All pairs of Gaussian posteriors and codes: matrix products, exponentials, sums.

The square in :math:`-\tfrac12 \sum_d (z_d - \mu_{jd})^2 / \sigma_{jd}^2` is multiplied out, so that
the exponents of all pairs are one product of :math:`(z^2, z, 1)` with
:math:`(-1/(2\sigma^2), \mu/\sigma^2, c)`. Where posteriors are narrow the product cancels most of
its digits: it is taken in float64. Blocks are small enough to stay in a processor's cache between
the three steps. Where posteriors are so narrow that float64 is not enough, differences are taken
instead, slowly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.distributions import Normal

from pyro_vae.evaluation.aggregated.threads import in_threads
from pyro_vae.mixtures import MixtureOfNormals

_COLUMNS = 2048
_ROWS = {"cpu": 128}  # with the columns: 2 MB of float64
_ROWS_ELSEWHERE = 16_384  # few launches rather than caches
_WIDEST = 1e5  # in standard deviations: 1e10 of them squared, times the 1e-16 of float64
_DIFFERENCES = 4_000_000  # at a time: 32 MB of float64
_LEAST = -700.0  # below, exponentials are denormal numbers, which a CPU is slow with


@torch.no_grad()
def log_sum_of_ratios(
    loc: Tensor,
    scale: Tensor,
    codes: Tensor,
    advance: Callable[[int], None] = lambda count: None,
) -> Tensor:
    r"""Return :math:`\log \sum_j q_j(z_n) / q_n(z_n)` for a code of each of N Gaussians.

    Log-densities are taken relative to that of the code's own Gaussian, which is part of the
    product: there is no search for the largest. It is not needed, since the code comes from
    :math:`q_n`, under which :math:`E[q_j(z) / q_n(z)] = 1`: by Markov's inequality no ratio passes
    the largest number. Codes whose sum passes it all the same, because rounding moved them off a
    very narrow Gaussian, are scored again by a search for the largest.

    Args:
        loc: means (N, d), float64.
        scale: standard deviations (N, d), float64.
        codes: one draw from each, (N, d), float64.
        advance: called with the number of codes that were done.

    Returns:
        Shape (N,), float64, in nats.
    """
    centre = loc.mean(0)
    loc, codes = loc - centre, codes - centre
    log_own = Normal(loc, scale).log_prob(codes).sum(1)
    if _cancels(loc, scale, codes):
        log_sums = []
        for rows in torch.arange(len(loc), device=loc.device).split(_rows_of_differences(loc)):
            log_sums.append(_by_differences(loc, scale, codes[rows]).logsumexp(1) - log_own[rows])
            advance(len(rows))
        return torch.cat(log_sums)
    left = torch.cat([quadratic(codes), -log_own.unsqueeze(1)], dim=1)
    right = torch.cat([log_density_weights(loc, scale), loc.new_ones(1, len(loc))])
    total = loc.new_zeros(len(loc))
    for rows, sums in row_sums(left, right):
        total[rows] = sums
        advance(rows.stop - rows.start)
    log_sum = total.log()
    lost = ~total.isfinite()
    if lost.any():
        mixture = MixtureOfNormals(loc.new_zeros(len(loc)), loc, scale)
        again = mixture.log_prob(codes[lost]) + math.log(len(loc)) - log_own[lost]
        log_sum[lost] = again
    return log_sum


def log_densities(loc: Tensor, scale: Tensor, codes: Tensor) -> Tensor:
    """Return the log-density of codes (..., d) under each of N Gaussians, (..., N), float64.

    Args:
        loc: means (N, d), float64.
        scale: standard deviations (N, d), float64.
        codes: of any origin, float64.
    """
    centre = loc.mean(0)
    loc, codes = loc - centre, codes - centre
    if not _cancels(loc, scale, codes):
        return quadratic(codes) @ log_density_weights(loc, scale)
    rows = codes.reshape(-1, codes.shape[-1]).split(_rows_of_differences(loc))
    found = torch.cat([_by_differences(loc, scale, some) for some in rows])
    return found.reshape(*codes.shape[:-1], len(loc))


def quadratic(codes: Tensor) -> Tensor:
    """Return (z^2, z, 1), shape (..., 2 d + 1), of codes (..., d)."""
    return torch.cat([codes.square(), codes, torch.ones_like(codes[..., :1])], dim=-1)


def log_density_weights(loc: Tensor, scale: Tensor) -> Tensor:
    """Return what :func:`quadratic` is multiplied with for log-densities, shape (2 d + 1, N)."""
    precision = scale.reciprocal().square()
    constant = -0.5 * loc.square() * precision - scale.log() - 0.5 * math.log(2 * math.pi)
    return torch.cat([-0.5 * precision, loc * precision, constant.sum(1, keepdim=True)], dim=1).T


def row_sums(
    left: Tensor, right: Tensor, values: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows of ``(left @ right).exp() @ values``, in float64, and which ones they are.

    Each exponential is at least e^-700, which is nothing beside one that matters.

    Args:
        left: (R, k), float64.
        right: (k, C), float64.
        values: (C,), ones if not given.
    """
    values = left.new_ones(right.shape[1]) if values is None else values
    columns = [
        (block.contiguous(), part)
        for block, part in zip(right.split(_COLUMNS, dim=1), values.split(_COLUMNS), strict=True)
    ]
    at_a_time = _ROWS.get(left.device.type, _ROWS_ELSEWHERE)
    rows = [slice(start, start + at_a_time) for start in range(0, len(left), at_a_time)]
    totals = in_threads(lambda some: _row_sums(left[some], columns), rows, left.device)
    yield from zip(rows, totals, strict=True)


def _cancels(loc: Tensor, scale: Tensor, codes: Tensor) -> bool:
    """Whether multiplying the square out may cost more than some 1e-6 nats."""
    largest = torch.cat([loc, codes.reshape(-1, loc.shape[1])]).abs().amax(0)
    return bool((largest > _WIDEST * scale.amin(0)).any())


def _by_differences(loc: Tensor, scale: Tensor, codes: Tensor) -> Tensor:
    """Score codes (M, d) without a matrix product: slow, and exact for any width."""
    return Normal(loc, scale).log_prob(codes.unsqueeze(1)).sum(2)


def _rows_of_differences(loc: Tensor) -> int:
    return max(1, _DIFFERENCES // loc.numel())


@torch.no_grad()  # of this thread
def _row_sums(left: Tensor, columns: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    product = left.new_empty(len(left) * _COLUMNS)
    total = left.new_zeros(len(left))
    for weights, part in columns:
        shape = (len(left), weights.shape[1])
        exponents = product[: shape[0] * shape[1]].view(shape)
        torch.mm(left, weights, out=exponents)
        total += exponents.clamp_(min=_LEAST).exp_().mv(part)
    return total
