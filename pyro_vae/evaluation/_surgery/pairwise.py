r"""Log-densities of codes under many Gaussian posteriors, and sums over the posteriors.

Divided by N, the sum over all N posteriors is the aggregated posterior. Each block takes three
steps: a matrix product, exponentials and sums.

The square in :math:`-\tfrac12 \sum_d (z_d - \mu_{jd})^2 / \sigma_{jd}^2` is expanded. The exponents
of all pairs are then one matrix product, of :math:`(z^2, z, 1)` with
:math:`(-1/(2\sigma^2), \mu/\sigma^2, c)`. With narrow posteriors, most digits of this product
cancel, so it is computed in float64. If float64 is not enough, the differences are computed
instead, which is slow. Blocks are small enough to stay in a processor's cache during the three
steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor
from torch.distributions import Normal

from pyro_vae.evaluation._surgery.threads import in_threads

_COLUMNS = 2048
_ROWS = {"cpu": 128}  # times the columns, 2 MB of float64
_ROWS_ELSEWHERE = 16_384  # few kernel launches matter more than the cache
WIDEST = 1e5  # in standard deviations; the error is its square times float64's 1e-16
LOG_DENSITIES_AT_A_TIME = 4_000_000  # if they are kept in memory: 32 MB of float64
_LEAST = -700.0  # exponentials below it are denormal numbers, which are slow on a CPU


@dataclass(frozen=True)
class Extent:
    """The range of Gaussians and codes, which decides how their pairs can be scored.

    Args:
        count: N, the number of Gaussians.
        total: the sum of their means (d,).
        low: the smallest value of all means and codes (d,).
        high: the largest value of all means and codes (d,).
        narrowest: the smallest standard deviation (d,).
    """

    count: Tensor
    total: Tensor
    low: Tensor
    high: Tensor
    narrowest: Tensor

    @classmethod
    def of(cls, loc: Tensor, scale: Tensor, codes: Tensor) -> Extent:
        """Return the extent of N >= 1 Gaussians (N, d) and any codes (..., d)."""
        count = torch.tensor(len(loc), device=loc.device)
        low, high = torch.cat([loc, codes.reshape(-1, loc.shape[1])]).aminmax(dim=0)
        return cls(count, loc.sum(0), low, high, scale.amin(0))

    @classmethod
    def of_all(cls, parts: Sequence[Extent]) -> Extent:
        """Merge extents."""
        columns = ([getattr(part, field.name) for part in parts] for field in fields(cls))
        count, total, low, high, narrowest = map(torch.stack, columns)
        return cls(count.sum(), total.sum(0), low.amin(0), high.amax(0), narrowest.amin(0))

    @property
    def center(self) -> Tensor:
        """The average of the means (d,)."""
        return self.total / self.count

    @property
    def cancels(self) -> bool:
        """Whether expanding the squares may cause an error above about 1e-6 nats."""
        largest = torch.maximum(self.high - self.center, self.center - self.low)
        return bool((largest > WIDEST * self.narrowest).any())


@dataclass(frozen=True)
class Gaussians:
    """A block of Gaussians, prepared once for matrix products with many codes.

    Args:
        loc: means (n, d), float64.
        scale: standard deviations (n, d), float64.
        center: the point that is subtracted from means and codes (d,).
    """

    loc: Tensor
    scale: Tensor
    center: Tensor

    @cached_property
    def columns(self) -> list[tuple[Tensor, Tensor]]:
        """The weights of (z^2, z, 1, 1), in blocks, each with a vector of ones for the sum."""
        some = [
            slice(start, start + _COLUMNS) for start in range(0, max(1, len(self.loc)), _COLUMNS)
        ]
        with closing(in_threads(self._block, some, self.loc.device)) as found:
            return list(found)

    @torch.no_grad()  # a new thread has gradients enabled
    def _block(self, some: slice) -> tuple[Tensor, Tensor]:
        weights = log_density_weights(self.loc[some] - self.center, self.scale[some])
        ones = weights.new_ones(1, weights.shape[1])
        return torch.cat([weights, ones]).contiguous(), ones[0]


def log_sum_of_ratios(loc: Tensor, scale: Tensor, codes: Tensor) -> Tensor:
    r"""Return :math:`\log \sum_j q_j(z_n) / q_n(z_n)` for a code of each of N Gaussians.

    Args:
        loc: means (N, d), float64.
        scale: standard deviations (N, d), float64.
        codes: one sample from each, (N, d), float64.

    Returns:
        Shape (N,), float64, in nats.
    """
    extent = Extent.of(loc, scale, codes)
    all_of_them = Gaussians(loc, scale, extent.center)
    log_own = Normal(loc, scale).log_prob(codes).sum(1)
    return log_sums(lambda: [all_of_them], codes, log_own, extent)


@torch.no_grad()
def log_sums(
    gaussians: Callable[[], Iterable[Gaussians]],
    codes: Tensor,
    log_own: Tensor,
    extent: Extent,
    anywhere: Callable[[bool], bool] = bool,
    check: Callable[[], None] = lambda: None,
) -> Tensor:
    r"""Return :math:`\log \sum_j q_j(z_m) - \log q_{own}(z_m)` for M codes.

    The matrix product also subtracts the log-density of the code's own Gaussian. So the usual
    subtraction of the maximum is not needed. The code is a sample of :math:`q_{own}`, and so
    :math:`E[q_j(z) / q_{own}(z)] = 1`. By Markov's inequality, a ratio almost never exceeds the
    largest float64 number. Rounding can still move a code off a very narrow Gaussian, and its sum
    then overflows. Such codes are scored again by differences.

    Args:
        gaussians: returns all Gaussians, block by block. It is called again if codes are scored
            again.
        codes: (M, d), float64.
        log_own: the log-density of each code under the Gaussian of which it is a sample, (M,).
        extent: of all Gaussians and codes.
        anywhere: returns whether an argument is True in any process. All processes call it.
        check: called often, to raise a deferred interrupt.

    Returns:
        Shape (M,), float64, in nats.
    """
    if extent.cancels:
        return _log_sums_of_differences(gaussians(), codes, log_own, check)
    left = torch.cat([quadratic(codes - extent.center), -log_own.unsqueeze(1)], dim=1)
    total = codes.new_zeros(len(codes))
    for some in gaussians():
        total += _sums_over(left, some.columns, check)
    found = total.log()
    lost = ~total.isfinite()
    if anywhere(bool(lost.any())):
        found[lost] = _log_sums_of_differences(gaussians(), codes[lost], log_own[lost], check)
    return found


def log_densities(loc: Tensor, scale: Tensor, codes: Tensor) -> Tensor:
    """Return the log-density of codes (..., d) under each of N Gaussians, (..., N), float64.

    Args:
        loc: means (N, d), float64.
        scale: standard deviations (N, d), float64.
        codes: any points, float64.
    """
    extent = Extent.of(loc, scale, codes)
    if not extent.cancels:
        return quadratic(codes - extent.center) @ log_density_weights(loc - extent.center, scale)
    rows = codes.reshape(-1, codes.shape[-1]).split(_rows_of_differences(loc))
    found = torch.cat([_by_differences(loc, scale, some) for some in rows])
    return found.reshape(*codes.shape[:-1], len(loc))


def quadratic(codes: Tensor) -> Tensor:
    """Return (z^2, z, 1), shape (..., 2 d + 1), of codes (..., d)."""
    return torch.cat([codes.square(), codes, torch.ones_like(codes[..., :1])], dim=-1)


def log_density_weights(loc: Tensor, scale: Tensor) -> Tensor:
    """Return the weights of :func:`quadratic` in log-densities, shape (2 d + 1, N)."""
    precision = scale.reciprocal().square()
    constant = -0.5 * loc.square() * precision - scale.log() - 0.5 * math.log(2 * math.pi)
    return torch.cat([-0.5 * precision, loc * precision, constant.sum(1, keepdim=True)], dim=1).T


def row_sums(
    left: Tensor,
    right: Tensor,
    values: Tensor | None = None,
    check: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return ``(left @ right).exp() @ values``, shape (R,), in float64.

    Each exponential is at least e^-700, which does not change a sum of larger ones.

    Args:
        left: (R, k), float64.
        right: (k, C), float64.
        values: (C,). The default is ones.
        check: called often, to raise a deferred interrupt.
    """
    values = left.new_ones(right.shape[1]) if values is None else values
    columns = [
        (block.contiguous(), part)
        for block, part in zip(right.split(_COLUMNS, dim=1), values.split(_COLUMNS), strict=True)
    ]
    return _sums_over(left, columns, check)


def _sums_over(
    left: Tensor, columns: Sequence[tuple[Tensor, Tensor]], check: Callable[[], None]
) -> Tensor:
    rows = left.split(_ROWS.get(left.device.type, _ROWS_ELSEWHERE))
    with closing(in_threads(lambda some: _row_sums(some, columns), rows, left.device)) as totals:
        found = []
        for total in totals:
            found.append(total)
            check()
        return torch.cat(found)


def _by_differences(loc: Tensor, scale: Tensor, codes: Tensor) -> Tensor:
    """Score codes (M, d) without a matrix product, which is slow and accurate for any width."""
    return Normal(loc, scale).log_prob(codes.unsqueeze(1)).sum(2)


def _log_sums_of_differences(
    gaussians: Iterable[Gaussians],
    codes: Tensor,
    log_own: Tensor,
    check: Callable[[], None],
) -> Tensor:
    """Return the sums of :func:`log_sums` without a matrix product."""
    total = torch.full_like(log_own, -math.inf)
    for some in gaussians:
        rows = codes.split(_rows_of_differences(some.loc))
        sums = []
        for each in rows:
            sums.append(_by_differences(some.loc, some.scale, each).logsumexp(1))
            check()
        total = torch.logaddexp(total, torch.cat(sums))
    return total - log_own


def _rows_of_differences(loc: Tensor) -> int:
    return max(1, LOG_DENSITIES_AT_A_TIME // loc.numel())


@torch.no_grad()  # a new thread has gradients enabled
def _row_sums(left: Tensor, columns: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    product = left.new_empty(len(left) * _COLUMNS)
    total = left.new_zeros(len(left))
    for weights, part in columns:
        shape = (len(left), weights.shape[1])
        exponents = product[: shape[0] * shape[1]].view(shape)
        torch.mm(left, weights, out=exponents)
        total += exponents.clamp_(min=_LEAST).exp_().mv(part)
    return total
