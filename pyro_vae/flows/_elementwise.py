"""Increasing functions of one number; a network computes their parameters per dimension."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F


class Elementwise(ABC):
    """A family of increasing functions of the reals.

    Attributes:
        num_parameters: number of parameters of one function.
    """

    num_parameters: int

    @abstractmethod
    def map(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Return f(x) and log f'(x), for x ``(..., D)`` and parameters ``(..., D, n)``."""

    @abstractmethod
    def unmap(self, y: Tensor, parameters: Tensor) -> Tensor:
        """Return x such that f(x) = y."""


class Affine(Elementwise):
    r""":math:`f(x) = \mu + \sigma x`, with :math:`|\log\sigma| < 3`."""

    num_parameters = 2

    def map(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Return f(x) and log f'(x)."""
        shift, log_scale = self._split(parameters)
        return shift + log_scale.exp() * x, log_scale.expand(x.shape)

    def unmap(self, y: Tensor, parameters: Tensor) -> Tensor:
        """Return x such that f(x) = y."""
        shift, log_scale = self._split(parameters)
        return (y - shift) * (-log_scale).exp()

    def _split(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = parameters.unbind(-1)
        return shift, 3 * torch.tanh(raw / 3)


class RationalQuadratic(Elementwise):
    r"""A monotone rational-quadratic spline on [-bound, bound] (Durkan et al. 2019, eq. 4-8).

    The spline has K bins, each with a width and a height, and slopes at the K-1 inner knots.
    Outside the interval it is the identity.

    Args:
        bins: K, the number of bins.
        bound: half the width of the interval.
    """

    _LEAST = 1e-3  # minimum of the slopes, and of widths and heights as shares of 1

    def __init__(self, bins: int, bound: float):
        if bins < 2 or bins * self._LEAST >= 1:
            raise ValueError(f"bins must be between 2 and 999, got {bins}")
        if not bound > 0:
            raise ValueError(f"bound must be positive, got {bound}")
        self.bins, self.bound = bins, bound
        self.num_parameters = 3 * bins - 1

    def map(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Return f(x) and log f'(x)."""
        inside = x.abs() < self.bound
        x_inside = x.clamp(-self.bound, self.bound)
        x0, width, y0, height, slope0, slope1 = self._bin(x_inside, parameters, knots=0)
        mean, t = height / width, (x_inside - x0) / width
        rest = 1 - t
        bend = mean + (slope0 + slope1 - 2 * mean) * t * rest
        y = y0 + height * (mean * t * t + slope0 * t * rest) / bend
        slope = slope1 * t * t + 2 * mean * t * rest + slope0 * rest * rest
        log_slope = 2 * mean.log() + slope.log() - 2 * bend.log()
        return torch.where(inside, y, x), torch.where(inside, log_slope, 0.0)

    def unmap(self, y: Tensor, parameters: Tensor) -> Tensor:
        """Return x such that f(x) = y."""
        inside = y.abs() < self.bound
        y_inside = y.clamp(-self.bound, self.bound)
        x0, width, y0, height, slope0, slope1 = self._bin(y_inside, parameters, knots=1)
        mean, rise = height / width, y_inside - y0
        curve = rise * (slope0 + slope1 - 2 * mean)
        a, b, c = height * (mean - slope0) + curve, height * slope0 - curve, -mean * rise
        t = 2 * c / (-b - (b * b - 4 * a * c).clamp(min=0).sqrt())
        return torch.where(inside, x0 + t * width, y)

    def _bin(self, value: Tensor, parameters: Tensor, knots: int) -> tuple[Tensor, ...]:
        """Return the corner, width, height and slopes of the bin that contains a value.

        Args:
            value: ``(..., D)``, within the bounds.
            parameters: ``(..., D, 3K-1)``.
            knots: whether the value is an x (0) or a y (1).
        """
        parameters = parameters.expand(*value.shape, self.num_parameters)
        widths, heights, slopes = parameters.split([self.bins, self.bins, self.bins - 1], -1)
        shares = [self._shares(raw) for raw in (widths, heights)]
        edges = [F.pad(each[..., :-1].cumsum(-1), (1, 0)) for each in shares]  # lower edges
        # softplus(log(e^s - 1)) = s, so zeros give slopes of one, the identity.
        slopes = self._LEAST + F.softplus(slopes + math.log(math.expm1(1 - self._LEAST)))
        slopes = F.pad(slopes, (1, 1), value=1.0)
        share = (value.unsqueeze(-1) / self.bound + 1) / 2
        number = (share >= edges[knots][..., 1:]).sum(-1, keepdim=True)

        def take(values: Tensor, offset: int = 0) -> Tensor:
            return values.gather(-1, number + offset).squeeze(-1)

        x0, y0 = (self.bound * (2 * take(edge) - 1) for edge in edges)
        width, height = (2 * self.bound * take(share) for share in shares)
        return x0, width, y0, height, take(slopes), take(slopes, 1)

    def _shares(self, raw: Tensor) -> Tensor:
        return self._LEAST + (1 - self._LEAST * self.bins) * F.softmax(raw, -1)
