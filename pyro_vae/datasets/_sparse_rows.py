"""Rows of a sparse matrix that become dense when they are read."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor


class SparseRows:
    """A sparse matrix in memory, whose rows are read as a dense tensor.

    Indices and values are those of the compressed sparse row (CSR) format. The rows that are read
    have torch's default dtype. The whole matrix is never made dense.

    Args:
        starts: places of the first value of each row, and the end of the last row, (N + 1,).
        columns: the column of each value. A row has each column at most once.
        values: the values.
        num_columns: D, the number of columns.
    """

    def __init__(self, starts: Tensor, columns: Tensor, values: Tensor, num_columns: int):
        self._starts, self._columns, self.values = starts, columns, values
        self.shape = torch.Size((len(starts) - 1, num_columns))

    @classmethod
    def of_scipy(cls, matrix: Any) -> SparseRows:
        """Return the rows of a scipy matrix. They share its memory if it is in CSR format."""
        matrix = matrix.tocsr()
        if not matrix.has_canonical_format:
            matrix = matrix.copy()
            matrix.sum_duplicates()
        parts = (_shared(part) for part in (matrix.indptr, matrix.indices, matrix.data))
        return cls(*parts, matrix.shape[1])

    @classmethod
    def of_torch(cls, matrix: Tensor) -> SparseRows:
        """Return the rows of a sparse matrix of torch, on its device."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            matrix = matrix.detach().to_sparse_csr()
        return cls(matrix.crow_indices(), matrix.col_indices(), matrix.values(), matrix.shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | slice | list[int] | Tensor) -> Tensor:
        """Return rows as a dense tensor, (B, D), or (D,) for one integer."""
        if isinstance(rows, int):
            return self[[rows]][0]
        if isinstance(rows, slice):
            rows = torch.arange(*rows.indices(len(self)), device=self.device)
        rows = torch.as_tensor(rows, device=self.device)
        if rows.dtype == torch.bool:
            rows = rows.nonzero()[:, 0]
        starts = self._starts[rows].long()
        counts = self._starts[rows + 1].long() - starts
        ends = counts.cumsum(0)
        total = int(ends[-1]) if len(ends) else 0
        # The values of row i are at starts[i], starts[i] + 1, and so on.
        shift = torch.repeat_interleave(starts - ends + counts, counts, output_size=total)
        places = torch.arange(total, device=self.device) + shift
        numbers = torch.arange(len(rows), device=self.device) * self.shape[1]
        targets = torch.repeat_interleave(numbers, counts, output_size=total)
        dense = torch.zeros(len(rows) * self.shape[1], dtype=self.dtype, device=self.device)
        dense[targets + self._columns[places]] = self.values[places].to(self.dtype)
        return dense.reshape(len(rows), self.shape[1])

    @property
    def device(self) -> torch.device:
        """The device of the matrix."""
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rows."""
        return torch.get_default_dtype()

    def to(self, device: torch.device | str) -> SparseRows:
        """Return the matrix on a device."""
        parts = (part.to(device) for part in (self._starts, self._columns, self.values))
        return SparseRows(*parts, self.shape[1])

    def finite_rows(self) -> Tensor:
        """Return True for each row whose numbers are all finite, shape (N,)."""
        finite = self.values.new_ones(len(self), dtype=torch.bool)
        if not self.values.is_floating_point() or self.values.sum().isfinite():
            return finite
        places = (~self.values.isfinite()).nonzero()[:, 0]
        finite[torch.searchsorted(self._starts, places.to(self._starts), right=True) - 1] = False
        return finite


def is_sparse(values: Any) -> bool:
    """Return whether values are a sparse matrix of scipy or torch."""
    if isinstance(values, Tensor):
        return values.layout != torch.strided
    scipy = sys.modules.get("scipy.sparse")  # a matrix exists only if scipy is imported
    return scipy is not None and scipy.issparse(values)


def _shared(values: np.ndarray) -> Tensor:
    """Return an array as a tensor, without a copy if possible."""
    kind = values.dtype.newbyteorder("=")
    if kind in (np.uint16, np.uint32, np.uint64):  # few operations of torch support them
        kind = np.dtype(np.int64)
    return torch.from_numpy(np.require(values, kind, requirements=["C", "W"]))
