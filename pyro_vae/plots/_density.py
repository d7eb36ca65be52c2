"""Densities on a grid, and the regions that hold a given share of samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

POINTS = 200  # of a grid, in each dimension
_AT_ONCE = 5000  # Gaussians


@dataclass(frozen=True)
class GridDensity:
    """The density of a latent in one or two dimensions, on an even grid.

    Args:
        grids: the points (G,) of each dimension.
        marginals: the density (G,) of each dimension alone.
        joint: the density ``(G, G)`` of two dimensions, or that of one dimension.
    """

    grids: list[Tensor]
    marginals: list[Tensor]
    joint: Tensor

    @classmethod
    def of_joint(cls, joint: Tensor, grids: list[Tensor]) -> GridDensity:
        """Return a density with marginals that are sums over the grid."""
        if len(grids) == 1:
            return cls(grids, [joint], joint)
        steps = [grid[1] - grid[0] for grid in grids]
        return cls(grids, [joint.sum(1) * steps[1], joint.sum(0) * steps[0]], joint)

    @classmethod
    def of_marginals(cls, marginals: list[Tensor], grids: list[Tensor]) -> GridDensity:
        """Return the density of independent dimensions."""
        joint = marginals[0] if len(grids) == 1 else torch.outer(*marginals)
        return cls(grids, marginals, joint)

    def at(self, points: Tensor) -> Tensor:
        """Return the density at points ``(M, 2)``, interpolated; zero outside of the grid."""
        places, inside = [], torch.ones(len(points), dtype=torch.bool)
        for values, grid in zip(points.T, self.grids, strict=True):
            place = (values - grid[0]) / (grid[1] - grid[0])
            inside &= (place >= 0) & (place <= len(grid) - 1)
            places.append(place.clamp(0, len(grid) - 1 - 1e-9))
        (i, j), (u, v) = [p.long() for p in places], [p.frac() for p in places]
        f = self.joint
        low = (1 - v) * f[i, j] + v * f[i, j + 1]
        high = (1 - v) * f[i + 1, j] + v * f[i + 1, j + 1]
        return torch.where(inside, (1 - u) * low + u * high, 0.0)

    def levels(self, samples: Tensor, masses: list[float]) -> list[float]:
        """Return the densities above which given shares of the samples ``(M, 2)`` lie."""
        return self.at(samples).quantile(1 - torch.tensor(masses).double()).tolist()


def grid_around(*samples: Tensor) -> Tensor:
    """Return an even grid (POINTS,) that holds nearly all of each set of samples (M,)."""
    ends = torch.stack([each.quantile(torch.tensor([0.001, 0.999]).double()) for each in samples])
    low, high = ends[:, 0].min(), ends[:, 1].max()
    margin = 0.05 * (high - low).clamp(min=1e-6)
    return torch.lerp(low - margin, high + margin, torch.linspace(0, 1, POINTS).double())


def gaussian_mixture(loc: Tensor, scale: Tensor, grids: list[Tensor]) -> GridDensity:
    r"""Return the density of an even mixture of N Gaussians with independent dimensions.

    Standard deviations are at least the distance of two points of the grid. A narrower Gaussian
    would lie between the points.

    Args:
        loc: means ``(N, dimensions)``.
        scale: standard deviations, of the same shape.
        grids: an even grid (G,) for each of the one or two dimensions.
    """
    marginals = [torch.zeros_like(grid) for grid in grids]
    joint = torch.zeros([len(grid) for grid in grids], dtype=torch.double)
    for some, widths in zip(loc.split(_AT_ONCE), scale.split(_AT_ONCE), strict=True):
        each = [
            _density(some[:, d, None], widths[:, d, None].clamp(min=grid[1] - grid[0]), grid)
            for d, grid in enumerate(grids)
        ]
        for marginal, density in zip(marginals, each, strict=True):
            marginal += density.sum(0) / len(loc)
        if len(grids) == 2:
            joint += each[0].T @ each[1] / len(loc)
    return GridDensity(grids, marginals, joint if len(grids) == 2 else marginals[0])


def smoothed(samples: Tensor, grids: list[Tensor]) -> GridDensity:
    """Estimate the density of samples ``(M, dimensions)`` with Gaussian kernels (Scott 1992)."""
    count, size = samples.shape
    width = samples.std(0) * count ** (-1 / (size + 4))
    return gaussian_mixture(samples, width.expand_as(samples), grids)


def _density(loc: Tensor, scale: Tensor, at: Tensor) -> Tensor:
    return (-0.5 * ((at - loc) / scale).square()).exp() / (math.sqrt(2 * math.pi) * scale)
