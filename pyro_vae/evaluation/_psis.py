"""The Pareto diagnostic k-hat of importance weights, for many data points at once."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_LEAST_LOG = -600.0  # of an excess relative to the largest; float64 cannot hold smaller ones
_EQUAL = 1e-4  # nats between the largest weights and a cutoff; float32 cannot resolve much less


def tail_length(num_draws: int) -> int:
    """Return the tail length of S weights, min(S/5, 3 sqrt(S)) (Vehtari et al. 2024)."""
    return math.ceil(min(num_draws / 5, 3 * math.sqrt(num_draws)))


def khat(log_weights: Tensor) -> Tensor:
    r"""Estimate the tail index of importance weights (Vehtari et al. 2024, eq. 7 and sec. 3).

    A generalized Pareto distribution is fitted to the M largest of S weights by the method of
    Zhang & Stephens (2009). Its shape is shrunk towards 1/2 as if by ten more samples. An estimate
    is good for a k-hat below 0.5, usable up to 0.7, and unreliable above.

    Args:
        log_weights: log-weights (S, ...): S samples for each data point.

    Returns:
        k-hat, shape (...), float64. It is minus infinity if the largest weights are equal up to
        rounding (1e-4 nats), as for a guide that equals the posterior. If fewer than five weights
        exceed a cutoff that many others share, it is infinity if these few outweigh all others,
        else NaN. It is also NaN if S is below 21, if a weight is NaN or infinite, or if all weights
        are zero.

    Raises:
        TypeError: ``log_weights`` is not a dense tensor or numpy array of numbers.
        ValueError: ``log_weights`` is empty.

    Example:
        >>> import torch, pyro_vae as pv
        >>> _ = torch.manual_seed(0)
        >>> t = 0.6  # the proposal's scale for a standard normal target: k = 1 - t^2 = 0.64
        >>> z = t * torch.randn(100_000, dtype=torch.float64)
        >>> log_weights = torch.distributions.Normal(0, 1).log_prob(z)
        >>> log_weights -= torch.distributions.Normal(0, t).log_prob(z)
        >>> print(f"{pv.evaluation.khat(log_weights):.1f}")
        0.6
    """
    if not isinstance(log_weights, Tensor) and np.asarray(log_weights).dtype.kind in "biuf":
        log_weights = torch.from_numpy(np.asarray(log_weights, dtype=np.float64))
    if not isinstance(log_weights, Tensor) or log_weights.layout != torch.strided:
        raise TypeError(
            "log_weights must be a dense tensor or numpy array of numbers, got "
            f"{type(log_weights).__name__}"
        )
    num_draws = log_weights.shape[0] if log_weights.dim() else 0
    if num_draws == 0:
        raise ValueError(
            f"log_weights must have shape (S, ...) with S >= 1, got {tuple(log_weights.shape)}"
        )
    largest = min(tail_length(num_draws) + 1, num_draws)
    return khat_of_tail(log_weights.double().topk(largest, dim=0).values, num_draws)


def khat_of_tail(largest: Tensor, num_draws: int) -> Tensor:
    """Estimate k-hat from the M + 1 largest log-weights of S, (M + 1, ...), largest first."""
    if largest.shape[0] < 6 or num_draws < 21:
        return largest.new_full(largest.shape[1:], math.nan)
    relative = (largest - largest[0]).reshape(len(largest), -1)
    columns = relative.exp()
    excess = (columns[:-1] - columns[-1]).flip(0)  # (M, B), ascending, above the cutoff
    share = -(relative[-1] - relative[:-1]).nan_to_num(nan=0.0).expm1()  # both may be -inf
    log_excess = (relative[:-1] + share.log()).flip(0)
    quartile = log_excess[_quartile(excess.shape[0])]
    k = excess.new_full(quartile.shape, -math.inf)
    k[~largest[0].flatten().isfinite()] = math.nan  # a weight is NaN or inf, or all are zero
    if (regular := quartile > _LEAST_LOG).any():
        k[regular] = _fit_generalized_pareto(excess[:, regular])
    if (far := (quartile <= _LEAST_LOG) & quartile.isfinite()).any():
        k[far] = _fit_far_tail(log_excess[:, far])
    k[relative[-1] >= -_EQUAL] = -math.inf
    ties = (quartile == -math.inf) & (log_excess[-1] > -math.inf) & (relative[-1] < -_EQUAL)
    for column in ties.nonzero().flatten():
        tail = log_excess[log_excess[:, column].isfinite(), column]  # without ties
        k[column] = _fit_part(tail.unsqueeze(1), relative[-1, column], num_draws)
    return k.reshape(largest.shape[1:])


def _fit_part(log_excess: Tensor, cutoff: Tensor, num_draws: int) -> Tensor:
    """Fit k to the weights above a cutoff that others share, given as log-excesses (m, 1)."""
    if len(log_excess) < 5:  # too few for a fit; infinity if they outweigh all others
        outweighs = log_excess.logsumexp(0) > cutoff + math.log(num_draws)
        return torch.where(outweighs, math.inf, math.nan)
    far = log_excess[_quartile(len(log_excess))] <= _LEAST_LOG
    fit = _fit_far_tail(log_excess) if far else _fit_generalized_pareto(log_excess.exp())
    return fit.squeeze()


def _quartile(count: int) -> int:
    return int(count / 4 + 0.5) - 1


def _fit_generalized_pareto(excess: Tensor) -> Tensor:
    """Fit the shape k to columns of positive ascending excesses, (M, B) to (B,).

    With b = -k / sigma, b is averaged over a grid with the profile likelihood as weight. The grid
    has quantiles of the prior of Zhang & Stephens (2009), scaled by the first quartile.
    """
    count = excess.shape[0]
    grid = 30 + int(math.sqrt(count))
    steps = torch.arange(1, grid + 1, dtype=excess.dtype, device=excess.device) - 0.5
    b = (1 - (grid / steps).sqrt()).unsqueeze(1) / (3 * excess[_quartile(count)])
    b = b + 1 / excess[-1]  # (grid, B)
    k = torch.log1p(-b.unsqueeze(1) * excess).mean(1)
    log_likelihood = count * (torch.log(-b / k) - k - 1)
    b = (b * log_likelihood.softmax(0)).sum(0)
    k = torch.log1p(-b * excess).mean(0)
    return (count * k + 10 * 0.5) / (count + 10)


def _fit_far_tail(log_excess: Tensor) -> Tensor:
    """Fit k as :func:`_fit_generalized_pareto` does, from the logarithms of the excesses.

    It is for tails whose small excesses underflow relative to the largest. There b = -exp(v) with
    a large v, and the term 1 / (largest excess) is negligible.
    """
    count = log_excess.shape[0]
    log_excess = log_excess - log_excess[-1]
    grid = 30 + int(math.sqrt(count))
    steps = torch.arange(1, grid + 1, dtype=log_excess.dtype, device=log_excess.device) - 0.5
    v = ((grid / steps).sqrt() - 1).log().unsqueeze(1) - math.log(3)
    v = v - log_excess[_quartile(count)]  # (grid, B)
    k = F.softplus(v.unsqueeze(1) + log_excess, threshold=40.0).mean(1)
    log_likelihood = count * (v - k.log() - k - 1)
    v = (v + log_likelihood.log_softmax(0)).logsumexp(0)
    k = F.softplus(v + log_excess, threshold=40.0).mean(0)
    return (count * k + 10 * 0.5) / (count + 10)
