"""One way to walk over data, whether tensors, arrays, a torch Dataset or a DataLoader."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)
from torch.utils.data.distributed import DistributedSampler

from pyro_vae.arguments import positive_integer
from pyro_vae.seeding import OwnSequence

Batch: TypeAlias = tuple[Tensor, ...]
Data: TypeAlias = Any  # Tensor | ndarray | tuple of these | Dataset | DataLoader

_ROWS_OF_A_DIGEST = 1000


class Minibatches:
    """Minibatches ``(x, *covariates)`` of any data, on one device.

    Args:
        data: a tensor or array x of N rows; a tuple (x, *covariates) of them; a torch Dataset
            whose items are one of these; or a DataLoader, whose batch size and order then rule.
            Rows of a ``numpy.memmap`` are read from the file as they are needed.
        batch_size: rows of a minibatch; the last may have fewer.
        device: where the minibatches are wanted.
        shuffle: draw a new order at each pass.
        generator: of that order; what a stream draws for its own order is seeded from it too.
        transform: applied to each x on the device, as dynamic binarisation needs it.
        name: what messages call the data.

    Raises:
        TypeError: ``transform`` cannot be called.
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
        if transform is not None and not callable(transform):
            raise TypeError(f"transform must be a function of x, got {transform!r}")
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
            )
        elif any(isinstance(column, np.memmap) for column in _columns(data)):
            rows = _RowsOnDisk(_columns(data), name)
            shuffle = shuffle and self.batch_size < len(rows)
            order = RandomSampler(rows) if shuffle else SequentialSampler(rows)
            self._loader = DataLoader(
                rows, sampler=BatchSampler(order, batch_size, drop_last=False), batch_size=None
            )
        else:
            columns = _columns(data)
            self.tensors = tuple(
                as_tensor(column, name if i == 0 else f"{name} covariate {i}").to(self.device)
                for i, column in enumerate(columns)
            )
            if not columns:
                raise ValueError(f"{name} is empty: a tuple without x")
            _require_one_length(self.tensors, name)

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
    def is_share(self) -> bool:
        """Whether each process of a group is given rows of its own: by a DistributedSampler."""
        return any(isinstance(s, DistributedSampler) for s in _samplers(self._loader))

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

    def digest(self) -> str | None:
        """Return what tells data in memory from others: of their types, shapes and first rows."""
        if self.tensors is None:
            return None
        found = hashlib.sha256()
        for column in self.tensors:
            rows = column[:_ROWS_OF_A_DIGEST].detach().cpu().contiguous()
            found.update(f"{column.dtype} {tuple(column.shape)}".encode())
            found.update(rows.reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()[:16]

    def first(self) -> Batch:
        """Return the first minibatch in the data's own order; the next pass begins with it."""
        if self.tensors is not None:
            return self._transformed(c[: self.batch_size].clone() for c in self.tensors)
        if self._begun is None:
            self._begun = _Begun(self._stream())
        return self._transformed(column.clone() for column in self._begun.first)

    def spread(self) -> Batch:
        """Return a minibatch from all over the data; the first one of a stream."""
        if self.tensors is None:
            return self.first()
        size = min(self.batch_size, self.num_data)
        rows = torch.linspace(0, self.num_data - 1, size, dtype=torch.float64).long()
        return self.prepare(rows.to(self.device))

    def __iter__(self) -> Iterator[Batch]:
        return (self.prepare(*selection) for selection in self.selections())

    def order(self) -> list[Tensor]:
        """Return the state of the generators that the order of the next pass will come from."""
        return [generator.get_state() for generator in self._generators()]

    def set_order(self, states: Sequence[Tensor]) -> None:
        """Have the next pass come in the order of those states."""
        for generator, state in zip(self._generators(), states, strict=True):
            generator.set_state(state)

    def begin_from(self, seed: int) -> None:
        """Have the next pass come in the order that a seed gives, and from its beginning."""
        self._begun = None
        for generator in self._generators():
            generator.manual_seed(seed)

    def selections(self, start: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """Yield what :meth:`prepare` makes minibatches of, on the device.

        The numbers of their rows, if the data are tensors; of a stream, its columns as they come.

        Args:
            start: how many minibatches of the pass to leave out.
        """
        if self._loader is not None:
            begun, self._begun = self._begun, None
            stream = self._stream() if begun is None else begun
            yield from itertools.islice(stream, start, None)
            return
        # A minibatch of all data keeps their order: a guide may have parameters by position.
        if self._shuffle and self.batch_size < self.num_data:
            order = torch.randperm(self.num_data, generator=self._generator).to(self.device)
        else:
            order = torch.arange(self.num_data, device=self.device)
        if len(rest := order[start * self.batch_size :]):
            yield from ((rows,) for rows in rest.split(self.batch_size))

    def prepare(self, *selection: Tensor) -> Batch:
        """Gather a minibatch and transform its x: operations of tensors alone."""
        if self.tensors is None:
            return self._transformed(selection)
        (rows,) = selection
        return self._transformed(column[rows] for column in self.tensors)

    def _generators(self) -> list[torch.Generator]:
        sources = [self._loader, *_samplers(self._loader)]
        own = [getattr(source, "generator", None) for source in sources]
        found = [g for g in (self._generator, *own) if g is not None]
        return list({id(generator): generator for generator in found}.values())

    def _stream(self) -> Iterator[Batch]:
        sequence = contextlib.nullcontext
        if self._generator is not None:
            # What a stream draws for itself is not mixed with the noise of the steps: so a pass
            # can be begun again, and gone on with from its middle.
            seed = torch.randint(2**62, (), generator=self._generator).item()
            sequence = OwnSequence(seed)
            for sampler in _samplers(self._loader):
                if isinstance(sampler, DistributedSampler):
                    sampler.set_epoch(seed % 2**31)
        with sequence():
            stream = iter(self._loader)
        empty = True
        while True:
            with sequence():
                batch = next(stream, None)
            if batch is None:
                break
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


class _RowsOnDisk(Dataset):
    """Columns of which some lie in files, read by whole minibatches of row numbers."""

    def __init__(self, columns: Sequence[Any], name: str):
        for i, column in enumerate(columns):
            as_tensor(column[:1], name if i == 0 else f"{name} covariate {i}")
        _require_one_length(columns, name)
        self._columns = columns

    def __len__(self) -> int:
        return len(self._columns[0])

    def __getitem__(self, rows: list[int]) -> Batch:
        return tuple(torch.as_tensor(_native(column[rows], "data")) for column in self._columns)


def _columns(data: Data) -> Sequence[Any]:
    columns = data.tensors if isinstance(data, TensorDataset) else data
    return columns if isinstance(columns, tuple | list) else (columns,)


def _require_one_length(columns: Sequence[Any], name: str) -> None:
    lengths = [len(column) for column in columns]
    if len(set(lengths)) != 1:
        raise ValueError(f"{name} and its covariates must be of one length, got {lengths}")


def _samplers(loader: DataLoader | None) -> list[Any]:
    batches = getattr(loader, "batch_sampler", None)
    return [getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)]


class _Begun:
    """A pass over a stream that was begun to see its first minibatch, which it keeps."""

    def __init__(self, stream: Iterator[Batch]):
        self.first = next(stream)
        self._rest = stream

    def __iter__(self) -> Iterator[Batch]:
        yield self.first
        yield from self._rest


def _native(values: np.ndarray | Tensor, name: str) -> np.ndarray | Tensor:
    """Return an array of numbers in this machine's order of bytes."""
    if isinstance(values, Tensor):
        return values
    if values.dtype.kind not in "biuf" or values.dtype.itemsize > 8:
        raise ValueError(f"{name} must hold numbers, got dtype {values.dtype}")
    if np.ma.is_masked(values):
        raise ValueError(
            f"{name} is masked in places: fill these, or model them as missing with poutine.mask"
        )
    return np.ascontiguousarray(values, values.dtype.newbyteorder("="))


def as_tensor(values: Any, name: str) -> Tensor:
    """Take one column of data as a tensor with N >= 1 rows and no NaN or infinity.

    Args:
        values: tensor or numpy array (N, ...).
        name: what messages call it.

    Raises:
        ValueError: it is neither, holds no real numbers, has no rows, or is not finite.
    """
    if isinstance(values, np.ndarray):
        values = torch.from_numpy(np.array(_native(values, name)))  # a copy: it may be read-only
    if not isinstance(values, Tensor):
        raise ValueError(  # noqa: TRY004 - bad data are a ValueError throughout
            f"{name} must be a tensor, a numpy array, a tuple of these, a torch Dataset or a "
            f"DataLoader, got {type(values).__name__}"
        )
    if values.layout != torch.strided or values.is_nested or values.is_quantized:
        raise ValueError(f"{name} must be dense, got layout {values.layout}: use to_dense()")
    if values.is_complex() or values.is_meta:
        raise ValueError(
            f"{name} must hold real numbers, got dtype {values.dtype} on device {values.device}"
        )
    values = values.detach()
    if values.dtype in (torch.uint16, torch.uint32, torch.uint64):  # few operations take them
        values = values.to(torch.int64)
        if (values < 0).any():
            raise ValueError(f"{name} has numbers of 2**63 and more")
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
