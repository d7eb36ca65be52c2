"""The Pareto diagnostic k-hat of importance weights, for many data points at once."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_LEAST_LOG = -600.0  # of an excess beside the largest: smaller ones are too small for float64


def tail_length(num_draws: int) -> int:
    """Return how many of S weights make the tail: min(S/5, 3 sqrt(S)) (Vehtari et al. 2024)."""
    return math.ceil(min(num_draws / 5, 3 * math.sqrt(num_draws)))


def khat(log_weights: Tensor) -> Tensor:
    r"""Estimate the tail index of importance weights (Vehtari et al. 2024, eq. 7 and sec. 3).

    A generalised Pareto distribution is fitted to the M largest of S weights by the method of
    Zhang & Stephens (2009), its shape shrunk towards 1/2 as if by ten further draws. Below 0.5
    the estimate is good, up to 0.7 usable, above it unreliable.

    Args:
        log_weights: (S, ...), S draws for each of any number of data points.

    Returns:
        k-hat, shape (...), float64. Minus infinity where the largest weights are all equal: a
        guide that is the posterior. Infinity where fewer than five weights stand above a cutoff
        that the others share and outweigh all of these. NaN where they do not, where S is below
        21, where a weight is NaN or infinite, and where all are zero.

    Raises:
        TypeError: they are no dense tensor or array of numbers.
        ValueError: there is no draw.

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
    excess = (columns[:-1] - columns[-1]).flip(0)  # (M, B), ascending, over the cutoff
    share = -(relative[-1] - relative[:-1]).nan_to_num(nan=0.0).expm1()  # two may be -inf
    log_excess = (relative[:-1] + share.log()).flip(0)
    quartile = log_excess[_quartile(excess.shape[0])]
    k = excess.new_full(quartile.shape, -math.inf)
    k[~largest[0].flatten().isfinite()] = math.nan  # a weight is no number, or none is positive
    if (regular := quartile > _LEAST_LOG).any():
        k[regular] = _fit_generalized_pareto(excess[:, regular])
    if (far := (quartile <= _LEAST_LOG) & quartile.isfinite()).any():
        k[far] = _fit_far_tail(log_excess[:, far])
    for column in ((quartile == -math.inf) & (log_excess[-1] > -math.inf)).nonzero().flatten():
        tail = log_excess[log_excess[:, column].isfinite(), column]  # ties are no tail
        k[column] = _fit_part(tail.unsqueeze(1), relative[-1, column], num_draws)
    return k.reshape(largest.shape[1:])


def _fit_part(log_excess: Tensor, cutoff: Tensor, num_draws: int) -> Tensor:
    """Fit the weights above a cutoff that others share, (m, 1), as logarithms of excesses."""
    if len(log_excess) < 5:  # they say nothing; but if they outweigh all others, they are all
        outweighs = log_excess.logsumexp(0) > cutoff + math.log(num_draws)
        return torch.where(outweighs, math.inf, math.nan)
    far = log_excess[_quartile(len(log_excess))] <= _LEAST_LOG
    fit = _fit_far_tail(log_excess) if far else _fit_generalized_pareto(log_excess.exp())
    return fit.squeeze()


def _quartile(count: int) -> int:
    return int(count / 4 + 0.5) - 1


def _fit_generalized_pareto(excess: Tensor) -> Tensor:
    """Fit the shape k to columns of positive ascending excesses, (M, B) to (B,).

    With b = -k / sigma the profile likelihood is averaged over a grid of b under the prior of
    Zhang & Stephens (2009), whose scale is set by the first quartile.
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
    """Fit k as :func:`_fit_generalized_pareto` does, where small excesses are zero beside the last.

    There b is -exp(v) for a v that is large, up to 1 over the largest excess, which is nothing.
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
