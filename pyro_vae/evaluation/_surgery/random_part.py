"""A random part of the data points, whose values represent those of all."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomPart:
    """One random data point of each of S strata (Cochran 1977, chapter 5).

    Args:
        stratum: the number of the stratum of each of N data points, (N,).
        chosen: the data point that is chosen from each stratum, (S,).
    """

    stratum: Tensor
    chosen: Tensor

    @classmethod
    def choose(cls, key: Tensor, size: int, seed: int) -> RandomPart:
        """Choose data points from strata of about equal size, which are ranges of a key.

        Values that grow or fall with the key differ little within a stratum. No linear relation is
        assumed, and the values of an outlier count as one data point.

        Args:
            key: a number for each data point, (N,).
            size: S, less than N.
            seed: of the choice.
        """
        generator = torch.Generator().manual_seed(seed)
        strata = key.argsort(stable=True).tensor_split(size)
        sizes = torch.tensor([len(rows) for rows in strata])
        at = (torch.rand(size, generator=generator, dtype=torch.float64) * sizes).long()
        stratum = torch.empty(len(key), dtype=torch.long)
        stratum[torch.cat(strata)] = torch.arange(size).repeat_interleave(sizes)
        chosen = [rows[i] for rows, i in zip(strata, at.tolist(), strict=True)]
        return cls(stratum, torch.stack(chosen))

    def of_all(self, values: Tensor) -> Tensor:
        """Return a number for each of the N data points from the values of the chosen ones.

        The mean of the numbers is unbiased for the mean of all values. Its standard error, computed
        as for N independent numbers, is that of the estimate. A data point has the value that was
        chosen in its stratum. The chosen data points also have a residual, which adds the variance
        of the choice: the difference from the mean of two neighboring strata (Cochran 1977, section
        5A.12), or of three at the end. The residuals add up to zero.

        Args:
            values: of the chosen data points, (S,).
        """
        size, num_data = len(values), len(self.stratum)
        found = values[self.stratum]
        # Strata 2i and 2i + 1 are a group; the last of an odd number joins the group before it.
        group = (torch.arange(size) // 2).clamp(max=size // 2 - 1)
        count = group.bincount().to(values)
        residuals = values - (group.bincount(values) / count)[group]
        residuals *= (count / (count - 1)).sqrt()[group]
        found[self.chosen] += residuals * (num_data / size) * math.sqrt(1 - size / num_data)
        return found
