"""One way to walk over data, whether tensors, arrays, a torch Dataset or a DataLoader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from pyro_vae.arguments import positive_integer

Batch: TypeAlias = tuple[Tensor, ...]
Data: TypeAlias = Any  # Tensor | ndarray | tuple of these | Dataset | DataLoader


class Minibatches:
    """Minibatches ``(x, *covariates)`` of any data, on one device.

    Args:
        data: a tensor or array x of N rows; a tuple (x, *covariates) of them; a torch Dataset
            whose items are one of these; or a DataLoader, whose batch size and order then rule.
        batch_size: rows of a minibatch; the last may have fewer.
        device: where the minibatches are wanted.
        shuffle: draw a new order at each pass.
        generator: of that order.
        transform: applied to each x on the device, as dynamic binarisation needs it.
        name: what messages call the data.

    Raises:
        ValueError: there is no row; the lengths differ; a value is NaN or infinite; the data are
            of a kind that cannot be read.
    """

    def __init__(
        self,
        data: Data,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
        name: str = "data",
    ):
        self.batch_size = positive_integer("batch_size", batch_size)
        self.device = torch.device(device)
        self.transform = transform
        self._shuffle = shuffle
        self._generator = generator
        self._name = name
        self.tensors: Batch | None = None
        self._loader: DataLoader | None = None
        self._begun: _Begun | None = None
        if isinstance(data, DataLoader):
            self._loader = data
        elif isinstance(data, Dataset) and not isinstance(data, TensorDataset):
            streamed = isinstance(data, IterableDataset)
            self._loader = DataLoader(
                data,
                batch_size,
                shuffle=None if streamed else shuffle,
                generator=generator,
            )
        else:
            columns = data.tensors if isinstance(data, TensorDataset) else data
            columns = columns if isinstance(columns, tuple | list) else (columns,)
            self.tensors = tuple(
                as_tensor(column, name if i == 0 else f"{name} covariate {i}").to(self.device)
                for i, column in enumerate(columns)
            )
            if not columns:
                raise ValueError(f"{name} is empty: a tuple without x")
            lengths = [len(column) for column in self.tensors]
            if len(set(lengths)) != 1:
                raise ValueError(f"{name} and its covariates must be of one length, got {lengths}")

    @property
    def num_data(self) -> int | None:
        """The number of rows, None where the data are a stream of unknown length."""
        if self.tensors is not None:
            return len(self.tensors[0])
        try:
            return len(self._loader.dataset)
        except TypeError:
            return None

    @property
    def checked(self) -> Batch | None:
        """All columns, as the programs will see them; None if streamed or transformed."""
        return self.tensors if self.transform is None else None

    @property
    def num_batches(self) -> int | None:
        """Minibatches in a pass, None where that is not known beforehand."""
        return None if self.tensors is None else -(-self.num_data // self.batch_size)

    def in_memory(self) -> Batch:
        """Return all rows as tensors, read once from a stream."""
        if self.tensors is not None:
            return self._transformed(column.clone() for column in self.tensors)
        self.first()
        return tuple(torch.cat(columns) for columns in zip(*self, strict=True))

    def first(self) -> Batch:
        """Return the first minibatch in the data's own order; the next pass begins with it."""
        if self.tensors is not None:
            return self._transformed(c[: self.batch_size].clone() for c in self.tensors)
        if self._begun is None:
            self._begun = _Begun(self._stream())
        return self._transformed(column.clone() for column in self._begun.first)

    def __iter__(self) -> Iterator[Batch]:
        return (self.prepare(*selection) for selection in self.selections())

    def selections(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield what :meth:`prepare` makes minibatches of, on the device.

        The numbers of their rows, if the data are tensors; of a stream, its columns as they come.
        """
        if self._loader is not None:
            begun, self._begun = self._begun, None
            yield from self._stream() if begun is None else begun
            return
        if self._shuffle:
            order = torch.randperm(self.num_data, generator=self._generator).to(self.device)
        else:
            order = torch.arange(self.num_data, device=self.device)
        yield from ((rows,) for rows in order.split(self.batch_size))

    def prepare(self, *selection: Tensor) -> Batch:
        """Gather a minibatch and transform its x: operations of tensors alone."""
        if self.tensors is None:
            return self._transformed(selection)
        (rows,) = selection
        return self._transformed(column[rows] for column in self.tensors)

    def _stream(self) -> Iterator[Batch]:
        empty = True
        for batch in self._loader:
            empty = False
            columns = batch if isinstance(batch, tuple | list) else (batch,)
            columns = [as_tensor(column, self._name) for column in columns]
            yield tuple(column.to(self.device, non_blocking=True) for column in columns)
        if empty:
            raise ValueError(
                f"{self._name} is empty: its loader yields no minibatch. (A stream that can be "
                "read only once does not serve for several passes.)"
            )

    def _transformed(self, columns: Iterable[Tensor]) -> Batch:
        """Transform x, which may be written to."""
        x, *covariates = columns
        return (x if self.transform is None else self.transform(x), *covariates)


class _Begun:
    """A pass over a stream that was begun to see its first minibatch, which it keeps."""

    def __init__(self, stream: Iterator[Batch]):
        self.first = next(stream)
        self._rest = stream

    def __iter__(self) -> Iterator[Batch]:
        yield self.first
        yield from self._rest


def as_tensor(values: Any, name: str) -> Tensor:
    """Take one column of data as a tensor with N >= 1 rows and no NaN or infinity.

    Args:
        values: tensor or numpy array (N, ...).
        name: what messages call it.

    Raises:
        ValueError: it is neither, holds no numbers, has no rows, or is not finite.
    """
    if isinstance(values, np.ndarray):
        try:
            values = torch.tensor(values)  # a copy: numpy arrays may be read-only
        except TypeError as error:
            raise ValueError(f"{name} must hold numbers, got dtype {values.dtype}") from error
    if not isinstance(values, Tensor):
        raise ValueError(  # noqa: TRY004 - bad data are a ValueError throughout
            f"{name} must be a tensor, a numpy array, a tuple of these, a torch Dataset or a "
            f"DataLoader, got {type(values).__name__}"
        )
    if values.layout != torch.strided:
        raise ValueError(f"{name} must be dense, got layout {values.layout}: use to_dense()")
    if values.dim() == 0 or len(values) == 0 or values.numel() == 0:
        raise ValueError(
            f"{name} is empty: expected shape (N, *event) with N >= 1, got {tuple(values.shape)}"
        )
    if values.is_floating_point():
        finite = torch.isfinite(values).flatten(1).all(1) if values.dim() > 1 else values.isfinite()
        if not finite.all():
            row = (~finite).nonzero()[0].item()
            raise ValueError(
                f"{name} has NaN or infinite values, first in row {row}: remove or impute them, or "
                "model them as missing with poutine.mask"
            )
    return values
