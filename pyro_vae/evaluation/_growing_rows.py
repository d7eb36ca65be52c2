"""Results of minibatches in one tensor."""

from __future__ import annotations

import torch
from torch import Tensor


class GrowingRows:
    """Rows that arrive by minibatches, in one tensor on the CPU whose capacity doubles.

    A list of small tensors would outlive the large tensors of each minibatch. They would split the
    memory that these leave, so the next large ones would not fit, and the process would grow.
    """

    def __init__(self) -> None:
        self._held: Tensor | None = None
        self._count = 0

    def add(self, rows: Tensor) -> None:
        """Append rows, which are dimension 1 of a tensor (C, B, ...)."""
        end = self._count + rows.shape[1]
        if self._held is None or end > self._held.shape[1]:
            larger = torch.empty(
                (rows.shape[0], max(1024, 2 * end), *rows.shape[2:]), dtype=rows.dtype
            )
            if self._held is not None:
                larger[:, : self._count] = self.rows
            self._held = larger
        self._held[:, self._count : end] = rows
        self._count = end

    @property
    def rows(self) -> Tensor:
        """All rows, (C, N, ...)."""
        if self._held is None:
            raise ValueError("there are no rows: add some first")
        return self._held[:, : self._count]
