"""Streams of importance weights: their mean, its standard error and its diagnostics."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_vae.evaluation._psis import khat_of_tail, tail_length


class WeightStream:
    """Accumulates the weights of chunks (K, B).

    Only their sum, the sum of their squares, the sum of their logarithms and the largest weights
    are kept.

    Args:
        num_draws: the total number of weights per data point.
    """

    _ROWS_AT_A_TIME = 1000

    def __init__(self, num_draws: int):
        self.count = 0
        self._num_draws = num_draws
        self._waiting: list[Tensor] = []
        self._log_sums: Tensor | None = None
        self._sum_of_logs = torch.zeros(())
        self._largest: Tensor | None = None

    def add(self, log_weights: Tensor) -> None:
        """Add log-weights, (K, B)."""
        self._waiting.append(log_weights)
        self.count += len(log_weights)
        if sum(map(len, self._waiting)) >= self._ROWS_AT_A_TIME or self.count == self._num_draws:
            self._take_in(torch.cat(self._waiting).double())
            self._waiting = []

    def _take_in(self, largest: Tensor) -> None:
        self._sum_of_logs = self._sum_of_logs + largest.sum(0)
        sums = torch.stack([largest.logsumexp(0), (2 * largest).logsumexp(0)])
        if self._log_sums is not None:
            sums = torch.logaddexp(self._log_sums, sums)
            largest = torch.cat([self._largest, largest])
        self._log_sums = sums
        self._largest = largest.topk(min(self._tail + 1, len(largest)), dim=0).values

    @property
    def _tail(self) -> int:
        return tail_length(self._num_draws)

    def log_mean(self) -> Tensor:
        """Return the logarithm of the mean weight, (B,)."""
        return self._log_sums[0] - math.log(self.count)

    def mean_log(self) -> Tensor:
        """Return the mean of the logarithms of the weights, (B,)."""
        return self._sum_of_logs / self.count

    def effective_sample_size(self) -> Tensor:
        r"""Return :math:`(\sum w)^2 / \sum w^2`, (B,).

        It is K for equal weights, and 1 if a single weight is positive.
        """
        return (2 * self._log_sums[0] - self._log_sums[1]).exp()

    def error(self) -> Tensor:
        """Return the standard error of log_mean: the relative standard error of the mean weight."""
        if self.count == 1:
            return torch.full_like(self._log_sums[0], math.nan)
        # sum(w^2) / sum(w)^2 is 1 / (effective sample size). It is 1/K for equal weights.
        inverse_size = (self._log_sums[1] - 2 * self._log_sums[0]).exp()
        return ((self.count * inverse_size - 1).clamp(min=0) / (self.count - 1)).sqrt()

    def khat(self) -> Tensor:
        """Return the Pareto diagnostic of the weights, (B,)."""
        return khat_of_tail(self._largest, self.count)
