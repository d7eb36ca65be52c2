"""The Pareto diagnostic k-hat of importance weights, for many data points at once."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


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
        guide that is the posterior. NaN where the tail has fewer than five weights (S below 21),
        where a weight is NaN or infinite, and where all are zero.

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
        >>> print(f"{pv.khat(log_weights):.1f}")
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
    columns = (largest - largest[0]).exp().reshape(len(largest), -1)
    excess = (columns[:-1] - columns[-1]).flip(0)  # (M, B), ascending, over the cutoff
    quartile = excess[_quartile(excess.shape[0])]
    k = excess.new_full(quartile.shape, -math.inf)
    k[~largest[0].flatten().isfinite()] = math.nan  # a weight is no number, or none is positive
    if (regular := quartile > 0).any():
        k[regular] = _fit_generalized_pareto(excess[:, regular])
    for column in ((quartile <= 0) & (excess[-1] > 0)).nonzero().flatten():
        positive = excess[:, column][excess[:, column] > 0]  # ties with the cutoff are no tail
        k[column] = math.nan
        if len(positive) >= 5:
            k[column] = _fit_generalized_pareto(positive.unsqueeze(1)).squeeze()
    return k.reshape(largest.shape[1:])


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
